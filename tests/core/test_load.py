"""Checked loading: all or nothing, with an account."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from toy_checkpoints import toy_checkpoint, toy_registry, toy_tensors, write_checkpoint

from quantplug.errors import CheckpointError, LoadError, PlanError, QuantplugError
from quantplug.kernel import Rejected
from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug.writeback import stored_tensors
from quantplug_testkit import toys

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quantplug.platform import Platform
    from quantplug.plugins import Registry
    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Prepared, Weight


def loaded(directory: Path, registry: Registry | None = None, **arguments: object):
    registry = registry or toy_registry()
    return load_layers(plan(directory, platform="cpu", registry=registry), directory, registry=registry, **arguments)


def file_hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def test_loaded_layers_compute_what_the_stored_tensors_say(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    result = loaded(directory)
    tensors = toy_tensors()
    path = "model.layers.1.self_attn.q_proj"
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    values = tensors[f"{path}.codes"].float() * tensors[f"{path}.scale"]
    expected = torch.nn.functional.linear(x.float(), values, tensors[f"{path}.bias"].float()).to(torch.bfloat16)
    assert torch.equal(result.modules[path](x), expected)
    assert len(result.modules) == 8
    assert result.report.kernels == {"toy.fast": 8}
    assert result.report.file_bytes == sum(t.nbytes for n, t in tensors.items() if "_proj" in n)


def test_saving_yields_the_source_bytes_and_without_the_source_what_the_kernel_holds(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    result = loaded(directory)
    wanted = {name: tensor for name, tensor in toy_tensors().items() if "_proj" in name}

    def same() -> bool:
        written = dict(stored_tensors(result.modules))
        return written.keys() == wanted.keys() and all(torch.equal(written[n], t) for n, t in wanted.items())

    assert same()
    (directory / "model.safetensors").unlink()
    assert same()


def test_saving_without_source_and_without_a_way_back_is_a_clear_error(tmp_path: Path) -> None:
    class NoWayBack(toys.ToyKernel):
        name = "toy.oneway"

        def unprepare(self, prepared: Prepared) -> tuple[Weight, ...]:
            raise NotImplementedError("kernel toy.oneway has no way back")

    registry = one_kernel(NoWayBack())
    directory = toy_checkpoint(tmp_path)
    result = loaded(directory, registry)
    write_checkpoint(directory, {n: t + 1 for n, t in toy_tensors().items()}, {"quant_method": "toy"})
    with pytest.raises(LoadError, match=r"its bytes are others now; and kernel toy\.oneway has no way back") as raised:
        list(stored_tensors(result.modules))
    assert raised.value.code == "QP-LOAD-SOURCE"


def one_kernel(kernel: object) -> Registry:
    """Return the toy registry with that kernel instead of the toys' own."""
    from types import SimpleNamespace

    from quantplug.hooks import hookimpl
    from quantplug.plugins import build_registry

    @hookimpl
    def quantplug_kernels() -> list[object]:
        return [kernel]

    return build_registry(
        {
            "toys": SimpleNamespace(
                quantplug_api=">=1,<2",
                quantplug_schemes=toys.quantplug_schemes,
                quantplug_dialects=toys.quantplug_dialects,
                quantplug_kernels=quantplug_kernels,
            )
        }
    )


@pytest.mark.parametrize("error", [RuntimeError("out of tiles"), LoadError("QP-LOAD-PREPARE", "x", "y")])
def test_a_kernel_that_fails_to_prepare_leaves_nothing_and_a_good_load_follows(
    tmp_path: Path, error: Exception
) -> None:
    class Liar(toys.ToyKernel):
        name = "toy.liar"
        calls = 0

        def prepare(
            self,
            problem: LinearProblem,
            segments: Sequence[Weight],
            activation: Sequence[ActivationParams | None],
            device: torch.device,
            out: Prepared | None = None,
        ) -> Prepared:
            Liar.calls += 1
            if Liar.calls == 5:
                raise error
            return super().prepare(problem, segments, activation, device, out)

    directory = toy_checkpoint(tmp_path)
    before = file_hashes(directory)
    with pytest.raises(LoadError) as raised:
        loaded(directory, one_kernel(Liar()))
    assert raised.value.code == "QP-LOAD-PREPARE"
    assert file_hashes(directory) == before
    assert len(loaded(directory).modules) == 8


def test_a_kernel_that_refuses_this_machine_stops_the_load_before_anything_is_read(tmp_path: Path) -> None:
    class Unusable(toys.ToyKernel):
        name = "toy.unusable"

        def probe(self, platform: Platform) -> Rejected | None:
            return Rejected("probe", "the operator is missing", "install it")

    with pytest.raises(PlanError, match=r"kernel toy\.unusable on cpu:.*: the operator is missing") as raised:
        loaded(toy_checkpoint(tmp_path), one_kernel(Unusable()))
    assert raised.value.code == "QP-PLAN-PLATFORM"


def test_values_that_the_format_forbids_stop_the_load_by_name(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors["model.layers.1.mlp.down_proj.scale"][3] = float("nan")
    directory = write_checkpoint(tmp_path / "bad", tensors, {"quant_method": "toy"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.scale: is NaN"):
        loaded(directory)
    assert len(loaded(toy_checkpoint(tmp_path / "good")).modules) == 8


def test_a_file_that_changes_between_plan_and_load_is_noticed(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    registry = toy_registry()
    made = plan(directory, platform="cpu", registry=registry)
    tensors = toy_tensors()
    del tensors["model.layers.0.mlp.up_proj.scale"]
    write_checkpoint(directory, tensors, {"quant_method": "toy"})
    with pytest.raises(QuantplugError, match=r"model\.layers\.0\.mlp\.up_proj\.scale"):
        load_layers(made, directory, registry=registry)


def test_a_file_that_is_truncated_while_it_is_read_is_an_error_not_a_dead_process(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    file = directory / "model.safetensors"

    def truncate(stage: str, done: int, total: int) -> None:
        with file.open("r+b") as handle:
            handle.truncate(file.stat().st_size // 2)

    with pytest.raises(CheckpointError) as raised:
        loaded(directory, progress=truncate)
    assert raised.value.code == "QP-ST-CHANGED"


def test_progress_rises_to_the_total_and_its_errors_cost_nothing(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    seen: list[tuple[str, int, int]] = []
    loaded(directory, progress=lambda *event: seen.append(event))
    assert [event[0] for event in seen] == ["load"] * 8
    assert seen[-1][1] == seen[-1][2] > seen[0][1]

    def broken(stage: str, done: int, total: int) -> None:
        raise ValueError("no terminal")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(loaded(directory, progress=broken).modules) == 8
    assert "no terminal" in str(caught[0].message)


def test_an_interrupt_is_not_swallowed(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    directory = toy_checkpoint(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        loaded(directory, progress=interrupt)
    assert len(loaded(directory).modules) == 8
