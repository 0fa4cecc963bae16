"""
From canonical experts, which come one by one, into the kernel's layout, and back where it offers a way.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import ref

import numpy as np
import pytest
import torch

from quantplug.expertweights import ExpertWeights
from quantplug.weight import Weight
from quantplug_testkit.bounds import CASTS, dequantize_roundings, gamma, stored_error, unit_roundoff, weight_error
from quantplug_testkit.canonical import segment_of, transposed_weight, weight_tensors
from quantplug_testkit.compare import assert_bitwise_equal, assert_within
from quantplug_testkit.conformance.case import assert_unchanged, snapshot
from quantplug_testkit.conformance.experts.case import ExpertSubject
from quantplug_testkit.oracles.rounding import round_to
from quantplug_testkit.plain_experts import expert_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from quantplug.expertweights import PreparedExperts
    from quantplug_testkit.conformance.experts.hazard import ExpertHazard


class ExpertPrepareTests(ExpertSubject):
    """`prepare`, `dequantize`, `unprepare`, and `PreparedExperts` itself."""

    def test_prepare_says_what_it_made(self, form: ExpertHazard) -> None:
        """The result carries the kernel's layout and the problem, on the device that was asked for."""
        case = self.case(form)
        made = case.prepared
        assert made.layout_id == self.kernel.layout_id, (
            f"layout_id is {made.layout_id!r}, the kernel's is {self.kernel.layout_id!r}"
        )
        assert made.problem == form.problem, f"problem is {made.problem}, not {form.problem}"
        for name, tensor in made.named_tensors().items():
            assert tensor.device.type == case.device.type, f"{name} is on {tensor.device}, not on {case.device}"

    def test_experts_are_taken_one_by_one(self, form: ExpertHazard) -> None:
        """
        When the next expert is asked for, the one before the last is no longer held, and its codes only if they are
        what was prepared: a layer is loaded with the memory of itself and one or two experts.
        """
        case = self.case(form)
        seen = _Seen(form)
        made = self.kernel.prepare(form.problem, seen.experts(), case.device)
        assert seen.count == form.problem.experts, f"{seen.count} of {form.problem.experts} experts are asked for"
        kept = {tensor.data_ptr() for tensor in made.named_tensors().values()}
        waiting = seen.waiting - kept
        assert not waiting, f"codes of {len(waiting)} projections wait for the last expert before they are prepared"

    def test_experts_of_a_list_are_taken_alike(self, form: ExpertHazard) -> None:
        """Any iterable gives the same bits, and is read once."""
        case = self.case(form)
        listed = self.kernel.prepare(form.problem, list(case.experts()), case.device)
        _assert_equal(listed, case.prepared, "prepare of a list")

    def test_prepare_leaves_the_experts_alone(self, form: ExpertHazard) -> None:
        """What is handed over stays the caller's, bit by bit; running the layer does not change it either."""
        case = self.case(form)
        experts = list(case.experts())
        given = {
            f"expert {number} {name}": tensor
            for number, expert in enumerate(experts)
            for name, tensor in expert_tensors(expert).items()
        }
        before = snapshot(given)
        case.prepared = self.kernel.prepare(form.problem, experts, case.device)
        assert_unchanged(before, given, "prepare")
        case.apply(case.inputs(3), case.route(3))
        assert_unchanged(before, given, "apply")

    def test_preparing_again_keeps_addresses(self, form: ExpertHazard) -> None:
        """`out=` overwrites in place, so that captured graphs and views see the new weights, all of them."""
        case = self.case(form)
        kept = case.prepared
        addresses = {name: tensor.data_ptr() for name, tensor in kept.named_tensors().items()}
        again = case.prepare(seed=1, out=kept)
        for holder, what in ((again, "what is returned"), (kept, "what was passed as out")):
            found = {name: tensor.data_ptr() for name, tensor in holder.named_tensors().items()}
            assert found == addresses, f"{what} lies elsewhere after prepare(out=): {found}, not {addresses}"
        _assert_equal(again, case.prepare(seed=1), "prepare(out=)")

    def test_prepare_takes_weights_of_any_stride(self, form: ExpertHazard) -> None:
        """Formats hand over transposed views; the layout is that of the same weights on dense memory."""
        case = self.case(form)
        views = (
            replace(expert, w13=tuple(transposed_weight(part) for part in expert.w13), w2=transposed_weight(expert.w2))
            for expert in case.experts()
        )
        _assert_equal(
            self.kernel.prepare(form.problem, views, case.device), case.prepared, "prepare of transposed views"
        )

    def test_memory_is_as_declared(self, form: ExpertHazard) -> None:
        """What is held is no more than codes at their width, the other tensors and the declared extra bytes."""
        case = self.case(form)
        entitled = sum(_bytes(expert) for expert in case.experts())
        held = case.prepared.nbytes
        assert held <= entitled + case.extra_bytes, (
            f"{form.name} holds {held} bytes, with {entitled} for the experts and {case.extra_bytes} as extra"
        )

    def test_deepcopy_is_independent(self, form: ExpertHazard) -> None:
        """A deep copy gives the same results, and from its own memory."""
        case = self.case(form)
        x, routing = case.inputs(3), case.route(3)
        first = case.apply(x, routing)
        original = case.prepared.named_tensors()
        case.prepared = copy.deepcopy(case.prepared)
        for name, tensor in case.prepared.named_tensors().items():
            shared = tensor.numel() and tensor.data_ptr() == original[name].data_ptr()
            assert not shared, f"{name} of the deep copy shares memory with the original"
            original[name].zero_()
        case.check_again(first, case.apply(x, routing), x, routing, "the deep copy's result")

    def test_dequantize_gives_the_values(self, form: ExpertHazard) -> None:
        """The optional way to dense values is exact, or within the declared casts, for each expert."""
        case = self.case(form)
        casts = [cast for cast in case.casts if cast.what in CASTS]
        for number in {0, form.problem.experts - 1}:
            try:
                found = self.kernel.dequantize(case.prepared, number)
            except NotImplementedError:
                pytest.skip(f"{self.kernel.name} does not dequantize")
            expert = form.expert(number)
            for values, parts in zip(found, (expert.w13, (expert.w2,)), strict=True):
                assert values.dtype == torch.float32, f"values are {values.dtype}, not float32"
                segments = [segment_of(part) for part in parts]
                exact = np.concatenate([segment.values() for segment in segments])
                off = np.concatenate([weight_error(segment, casts) for segment in segments])
                if off.any() or any(part.global_scale is not None for part in parts):
                    roundings = max(dequantize_roundings(segment) for segment in segments)
                    off += gamma(roundings, unit_roundoff("float32")) * (np.abs(exact) + off)
                    assert_within(values, exact, stored_error(exact, off, "float32"), f"values [{form.name}]")
                else:
                    rounded = round_to(exact, "float32")
                    assert_within(values, rounded, np.zeros_like(rounded), f"values [{form.name}]")

    def test_unprepare_gives_the_weights_back(self, form: ExpertHazard) -> None:
        """The optional way back yields every tensor of an expert's weights, bit by bit."""
        case = self.case(form)
        for number in {0, form.problem.experts - 1}:
            try:
                found = self.kernel.unprepare(case.prepared, number)
            except NotImplementedError:
                pytest.skip(f"{self.kernel.name} has no way back")
            expected = form.expert(number)
            ours, theirs = ([*expert.w13, expert.w2] for expert in (found, expected))
            assert [weight.spec for weight in ours] == [weight.spec for weight in theirs], "specs differ"
            for part, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                now = {name: tensor.cpu() for name, tensor in weight_tensors(one).items()}
                before = weight_tensors(other)
                assert sorted(now) == sorted(before), f"{sorted(now)} come back, not {sorted(before)}"
                assert_unchanged(before, now, f"unprepare of expert {number}, part {part} [{form.name}]")


class _Expert(ExpertWeights):
    """One that can be watched."""

    __slots__ = ("__weakref__",)


class _Weight(Weight):
    """One that can be watched."""

    __slots__ = ("__weakref__",)


class _Seen:
    """Experts that know who still holds them when the next one is asked for."""

    def __init__(self, hazard: ExpertHazard) -> None:
        self.hazard = hazard
        self.count = 0
        self.waiting: set[int] = set()
        self._earlier: list[tuple[int, str, Callable[[], object]]] = []
        self._codes: list[tuple[int, ref[torch.Tensor]]] = []

    def experts(self) -> Iterator[ExpertWeights]:
        """Yield the experts; the last is followed by a look at all before it."""
        for number in range(self.hazard.problem.experts):
            self._look(number)
            self.count += 1
            yield self._watched(number)
        self._look(self.hazard.problem.experts)

    def _watched(self, number: int) -> ExpertWeights:
        made = self.hazard.expert(number)
        w13 = tuple(_watch(part) for part in made.w13)
        expert = _Expert(w13, _watch(made.w2), made.b13, made.b2, made.a13, made.a2)
        self._earlier.append((number, "expert", ref(expert)))
        for weight in (*w13, expert.w2):
            self._earlier.append((number, "a weight of expert", ref(weight)))
            self._codes.append((number, ref(weight.codes)))
        return expert

    def _look(self, number: int) -> None:
        """At what is alive of those before the last: a loop's variable may still hold the last one."""
        held = [
            f"{what} {earlier}" for earlier, what, each in self._earlier if earlier < number - 1 and each() is not None
        ]
        assert not held, f"when expert {number} is asked for, {', '.join(held)} is still held [{self.hazard.name}]"
        alive = (each() for earlier, each in self._codes if earlier < number - 1)
        self.waiting |= {codes.data_ptr() for codes in alive if codes is not None}


def _watch(weight: Weight) -> _Weight:
    return _Weight(weight.codes, weight.scales, weight.spec, weight.zeros, weight.g_idx, weight.global_scale)


def _assert_equal(actual: PreparedExperts, expected: PreparedExperts, what: str) -> None:
    __tracebackhide__ = True
    ours, theirs = actual.named_tensors(), expected.named_tensors()
    assert sorted(ours) == sorted(theirs), f"{what} makes {sorted(ours)}, not {sorted(theirs)}"
    assert dict(actual.meta) == dict(expected.meta), f"{what} has meta {actual.meta}, not {expected.meta}"
    for name, tensor in theirs.items():
        assert_bitwise_equal(ours[name], tensor, f"{name} of {what}")


def _bytes(expert: ExpertWeights) -> int:
    codes = [weight.codes for weight in (*expert.w13, expert.w2)]
    bits = [weight.spec.element.bits for weight in (*expert.w13, expert.w2)]
    others = sum(tensor.nbytes for tensor in expert_tensors(expert).values()) - sum(each.nbytes for each in codes)
    return others + sum(-(-each.numel() * width // 8) for each, width in zip(codes, bits, strict=True))
