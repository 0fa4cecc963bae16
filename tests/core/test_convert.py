"""From dense to quantized checkpoints."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from toy_checkpoints import dense_tensors, toy_checkpoint, toy_registry, write_checkpoint

from quantplug.convert import convert
from quantplug.entries import path_entries
from quantplug.errors import ConvertError
from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug.spec import LinearShape, ParamSpec
from quantplug.writer import TensorFileWriter
from quantplug_testkit import toys

if TYPE_CHECKING:
    from pathlib import Path


def run(source: Path, destination: Path, **arguments: object):
    return convert(source, destination, scheme="toy", params={}, registry=toy_registry(), **arguments)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = write_checkpoint(tmp_path / "dense", dense_tensors())
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.py").write_text("raise SystemExit")
    return directory


def test_a_converted_checkpoint_plans_loads_and_holds_the_rounded_weights(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", skip=path_entries(["layers.1.mlp"], "caller"))
    assert report.quantized == {"toy limit 127": 6}
    assert set(report.dense) == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    registry = toy_registry()
    made = plan(tmp_path / "out", platform="cpu", registry=registry, strict=True)
    modules = load_layers(made, tmp_path / "out", registry=registry).modules
    scheme = toys.ToyScheme.build({}, "test")
    dense = dense_tensors()
    for path, module in modules.items():
        assert torch.equal(module.dequantize(), scheme.quantize(dense[f"{path}.weight"]).dequantize())
    kept = load_file(tmp_path / "out" / "model.safetensors")
    copied = [name for name in dense if name in kept]
    assert len(copied) == 1 + 2 + 2 + 1 + 2
    assert all(torch.equal(kept[name], dense[name]) for name in copied)
    assert report.written_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_companions_come_along_and_code_does_not(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip


def test_a_tied_head_that_is_quantized_is_stored_on_its_own(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", head={"limit": 100})
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["lm_head.codes"].shape == (40, 32)
    assert torch.equal(tensors["model.embed_tokens.weight"], dense_tensors()["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_destination_appears_whole_or_not_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = TensorFileWriter.write, 0

    def full_disk(self: TensorFileWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name, tensor)

    monkeypatch.setattr(TensorFileWriter, "write", full_disk)
    with pytest.raises(ConvertError, match="No space left on device") as raised:
        run(source, tmp_path / "out")
    assert raised.value.code == "QP-CONV-SPACE"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense"]
    monkeypatch.undo()
    run(source, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense", "out"]


def with_comment(monkeypatch: pytest.MonkeyPatch, *, required: bool) -> None:
    """Give the toy format a third tensor, which its `encode` does not write."""
    declared = toys.ToyScheme.params

    def params(self: toys.ToyScheme, shape: LinearShape) -> tuple[ParamSpec, ...]:
        return *declared(self, shape), ParamSpec("comment", (1,), ("int8",), required)

    monkeypatch.setattr(toys.ToyScheme, "params", params)
    monkeypatch.setattr(toys.ToyScheme, "suffixes", toys.ToyScheme.suffixes | {"comment"})


def test_what_a_format_may_leave_out_is_not_announced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that files may have and this one's writer never gives."""
    with_comment(monkeypatch, required=False)
    run(source, tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith("comment")]


def test_a_scheme_that_writes_other_tensors_than_it_announces_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is wrong, the file would be: nothing is written, and both are named."""
    with_comment(monkeypatch, required=True)
    with pytest.raises(ConvertError, match=r"up_proj\.scale; expected .*up_proj\.comment.*, as it announced") as raised:
        run(source, tmp_path / "out", skip=path_entries(["q_proj", "k_proj", "down_proj"], "caller"))
    assert raised.value.code == "QP-CONV-SPEC"
    assert raised.value.where == "model.layers.0.mlp.up_proj"
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_is_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_bytes(b"half")
    run(source, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert plan(tmp_path / "out", platform="cpu", registry=toy_registry()).layers


def test_an_existing_destination_is_never_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConvertError, match="already exists") as raised:
        run(source, tmp_path / "out")
    assert raised.value.code == "QP-CONV-EXISTS"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_quantized_source_and_weights_that_are_not_finite_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"is already quantized \(toy\)") as raised:
        run(toy_checkpoint(tmp_path / "quantized"), tmp_path / "out")
    assert raised.value.code == "QP-CONV-SOURCE"
    tensors = dense_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = float("inf")
    with pytest.raises(ConvertError, match=r"up_proj\.weight: is not finite at \[3, 5\]") as raised:
        run(write_checkpoint(tmp_path / "inf", tensors), tmp_path / "out")
    assert raised.value.code == "QP-CONV-VALUE"
    assert not (tmp_path / "out").exists()


def test_a_scheme_that_only_reads_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(toys.ToyScheme, "quantize")
    with pytest.raises(ConvertError, match="scheme toy: reads checkpoints and does not write them") as raised:
        run(source, tmp_path / "out")
    assert raised.value.code == "QP-CONV-SCHEME"
    assert not (tmp_path / "out").exists()


def test_progress_counts_the_source_bytes(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run(source, tmp_path / "out", progress=lambda *event: seen.append(event))
    assert seen[-1][1] == seen[-1][2] == sum(t.nbytes for t in dense_tensors().values())
