"""
From canonical weights into the kernel's layout, and back where it offers a way.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from quantplug.weight import ActivationParams
from quantplug_testkit.bounds import dequantize_roundings, gamma, stored_error, unit_roundoff, weight_error
from quantplug_testkit.canonical import transposed_weight, weight_tensors
from quantplug_testkit.compare import assert_bitwise_equal, assert_within
from quantplug_testkit.conformance.case import (
    Subject,
    assert_unchanged,
    oracle_segments,
    oracle_values,
    snapshot,
)
from quantplug_testkit.oracles.rounding import round_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.weight import Prepared, Weight
    from quantplug_testkit.conformance.problems import Hazard


class PrepareTests(Subject):
    """`prepare`, `dequantize`, `unprepare`, and `Prepared` itself."""

    def test_prepare_says_what_it_made(self, family: Hazard) -> None:
        """The result carries the kernel's layout and the problem, on the device that was asked for."""
        case = self.case(family)
        assert case.prepared.layout_id == self.kernel.layout_id, (
            f"layout_id is {case.prepared.layout_id!r}, the kernel's is {self.kernel.layout_id!r}"
        )
        assert case.prepared.problem == family.problem, f"problem is {case.prepared.problem}, not {family.problem}"
        for name, tensor in case.prepared.tensors.items():
            assert tensor.device.type == case.device.type, f"{name} is on {tensor.device}, not on {case.device}"

    def test_prepare_leaves_the_weights_alone(self, family: Hazard) -> None:
        """What is handed over stays the caller's, bit by bit; running the layer does not change it either."""
        weights, activation = family.weights(), family.activation()
        given = {**_tensors(weights), **_stored(activation)}
        before = snapshot(given)
        case = self.case(family)
        case.prepared = self.kernel.prepare(family.problem, weights, activation, case.device)
        assert_unchanged(before, given, "prepare")
        case.apply(case.inputs(3))
        assert_unchanged(before, given, "apply")

    def test_preparing_twice_gives_the_same_bits(self, family: Hazard) -> None:
        """Equal weights give equal layouts."""
        device = torch.device(self.device)
        first = self.kernel.prepare(family.problem, family.weights(), family.activation(), device)
        second = self.kernel.prepare(family.problem, family.weights(), family.activation(), device)
        _assert_equal(second, first, "the second prepare")

    def test_preparing_again_keeps_addresses(self, family: Hazard) -> None:
        """`out=` overwrites in place, so that captured graphs and views see the new weights, all of them."""
        device = torch.device(self.device)
        kept = self.kernel.prepare(family.problem, family.weights(), family.activation(), device)
        addresses = {name: tensor.data_ptr() for name, tensor in kept.tensors.items()}
        other = (family.weights(seed=1), family.activation(seed=1))
        again = self.kernel.prepare(family.problem, *other, device, out=kept)
        for holder, what in ((again, "what is returned"), (kept, "what was passed as out")):
            found = {name: tensor.data_ptr() for name, tensor in holder.tensors.items()}
            assert found == addresses, f"{what} lies elsewhere after prepare(out=): {found}, not {addresses}"
        fresh = self.kernel.prepare(family.problem, *other, device)
        _assert_equal(again, fresh, "prepare(out=)")

    def test_prepare_takes_weights_of_any_stride(self, family: Hazard) -> None:
        """Formats hand over transposed views; the layout is that of the same weights on dense memory."""
        device = torch.device(self.device)
        dense = self.kernel.prepare(family.problem, family.weights(), family.activation(), device)
        views = [transposed_weight(weight) for weight in family.weights()]
        _assert_equal(
            self.kernel.prepare(family.problem, views, family.activation(), device),
            dense,
            "prepare of transposed views",
        )

    def test_memory_is_as_declared(self, family: Hazard) -> None:
        """What is held is no more than codes at their width, the other tensors and the declared extra bytes."""
        case = self.case(family)
        extra = case.extra_bytes
        held = case.prepared.nbytes
        entitled = sum(_bytes(weight) for weight in family.weights())
        entitled += sum(tensor.nbytes for tensor in _stored(family.activation()).values())
        assert held <= entitled + extra, (
            f"{family.name} holds {held} bytes, with {entitled} for the weight and {extra} declared as extra"
        )

    def test_deepcopy_is_independent(self, family: Hazard) -> None:
        """A deep copy gives the same results, and from its own memory."""
        case = self.case(family)
        x = case.inputs(3)
        first = case.apply(x)
        original = case.prepared
        case.prepared = copy.deepcopy(original)
        for name, tensor in case.prepared.tensors.items():
            shared = tensor.numel() and tensor.data_ptr() == original.tensors[name].data_ptr()
            assert not shared, f"{name} of the deep copy shares memory with the original"
            original.tensors[name].zero_()
        case.check_again(first, case.apply(x), x, "the deep copy's result")

    def test_dequantize_gives_the_values(self, family: Hazard) -> None:
        """The optional way to dense values is exact, or within the declared casts."""
        case = self.case(family)
        exact = oracle_values(family)
        for dtype in dict.fromkeys(("float32", family.problem.dtype)):
            try:
                values = self.kernel.dequantize(case.prepared, getattr(torch, dtype))
            except NotImplementedError:
                pytest.skip(f"{self.kernel.name} does not dequantize")
            assert values.dtype == getattr(torch, dtype), f"values are {values.dtype}, not {dtype}"
            off = np.concatenate([weight_error(segment, case.casts) for segment in oracle_segments(family)])
            if off.any() or any(segment.weight.global_scale for segment in family.problem.segments):
                roundings = max(dequantize_roundings(segment) for segment in oracle_segments(family))
                off += gamma(roundings, unit_roundoff("float32")) * (np.abs(exact) + off)
                assert_within(values, exact, stored_error(exact, off, dtype), f"values [{family.name}]")
            else:
                rounded = round_to(round_to(exact, "float32"), dtype)
                assert_within(values, rounded, np.zeros_like(rounded), f"values [{family.name}]")

    def test_unprepare_gives_the_weights_back(self, family: Hazard) -> None:
        """The optional way back yields every tensor of every segment, bit by bit."""
        case = self.case(family)
        try:
            found = self.kernel.unprepare(case.prepared)
        except NotImplementedError:
            pytest.skip(f"{self.kernel.name} has no way back")
        expected = family.weights()
        assert len(found) == len(expected), f"{len(found)} segments come back, not {len(expected)}"
        assert [weight.spec for weight in found] == [weight.spec for weight in expected], "specs differ"
        now = {name: tensor.cpu() for name, tensor in _tensors(found).items()}
        assert sorted(now) == sorted(_tensors(expected)), f"{sorted(now)} come back, not {sorted(_tensors(expected))}"
        assert_unchanged(_tensors(expected), now, f"unprepare [{family.name}]")


def _tensors(weights: Sequence[Weight]) -> dict[str, torch.Tensor]:
    return {
        f"segment {number} {name}": tensor
        for number, weight in enumerate(weights)
        for name, tensor in weight_tensors(weight).items()
    }


def _stored(activation: Sequence[ActivationParams | None]) -> dict[str, torch.Tensor]:
    return {
        f"segment {number} {field.name} of x": tensor
        for number, params in enumerate(activation)
        for field in fields(ActivationParams)
        if (tensor := getattr(params, field.name, None)) is not None
    }


def _assert_equal(actual: Prepared, expected: Prepared, what: str) -> None:
    __tracebackhide__ = True
    assert sorted(actual.tensors) == sorted(expected.tensors), (
        f"{what} makes {sorted(actual.tensors)}, not {sorted(expected.tensors)}"
    )
    assert dict(actual.meta) == dict(expected.meta), f"{what} has meta {actual.meta}, not {expected.meta}"
    for name, tensor in expected.tensors.items():
        assert_bitwise_equal(actual.tensors[name], tensor, f"{name} of {what}")


def _bytes(weight: Weight) -> int:
    codes = -(-weight.codes.numel() * weight.spec.element.bits // 8)
    others = [tensor for name, tensor in weight_tensors(weight).items() if name != "codes"]
    return codes + sum(tensor.numel() * tensor.element_size() for tensor in others)
