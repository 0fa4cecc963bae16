"""`save_pretrained`: the bytes that were read, with the source and without it."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import stored_tensors

from quantplug.errors import LoadError
from quantplug.hooks import hookimpl
from quantplug.kernel import Accepted, Cost
from quantplug.plugins import build_registry
from quantplug.reference import ReferenceKernel
from quantplug.weight import Prepared
from quantplug_gptq import plugin as gptq
from quantplug_transformers import from_pretrained

if TYPE_CHECKING:
    from pathlib import Path


class OneWay(ReferenceKernel):
    """A kernel that keeps values it cannot turn back into codes."""

    name = "test.one_way"
    layout_id = "values"

    def supports(self, problem, platform):
        return Accepted(Cost(0.0, 0.0))

    def prepare(self, problem, segments, activation, device, out=None):
        values = torch.cat([weight.dequantize(torch.float32) for weight in segments])
        return Prepared(self.layout_id, problem, {"values": values})

    def dequantize(self, prepared, dtype):
        return prepared.tensors["values"].to(dtype)

    def unprepare(self, prepared):
        raise NotImplementedError("values only")


class OneWayPlugin:
    @staticmethod
    @hookimpl
    def quantplug_kernels():
        return [OneWay()]


def assert_same_tensors(directory: Path, other: Path) -> None:
    wanted, written = stored_tensors(directory), stored_tensors(other)
    assert wanted.keys() == written.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == written[name].dtype
        assert (
            tensor.numpy(force=True).tobytes() == written[name].numpy(force=True).tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(tensor.view(torch.int16), written[name].view(torch.int16))
        )


def test_saved_files_hold_the_same_tensors_and_say_the_same_of_them(checkpoint, registry, ids, tmp_path) -> None:
    model = from_pretrained(checkpoint, registry=registry)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(checkpoint, tmp_path / "saved")
    before, after = (json.loads((d / "config.json").read_text()) for d in (checkpoint, tmp_path / "saved"))
    assert after["quantization_config"] == before["quantization_config"]
    assert {k: v for k, v in after.items() if before.get(k) != v} == {}
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["max_new_tokens"] == 7
    again = from_pretrained(tmp_path / "saved", registry=registry)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.quantplug_plan.hash == model.quantplug_plan.hash


def test_quantized_head_is_saved_beside_the_embedding_and_the_tie_is_gone(with_head, registry, ids, tmp_path) -> None:
    model = from_pretrained(with_head, registry=registry)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(with_head, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(from_pretrained(tmp_path / "saved", registry=registry)(ids).logits, model(ids).logits)


def test_dense_tensors_are_saved_as_they_are_now(checkpoint, registry, tmp_path) -> None:
    model = from_pretrained(checkpoint, registry=registry)
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(stored_tensors(tmp_path / "saved")["model.norm.weight"], torch.full((64,), 2.0).bfloat16())


def test_a_model_whose_source_is_gone_is_saved_from_what_the_kernels_hold(checkpoint, registry, tmp_path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    model = from_pretrained(source, registry=registry)
    shutil.rmtree(source)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(checkpoint, tmp_path / "saved")


def test_a_model_can_be_saved_over_its_own_source(checkpoint, registry, tmp_path) -> None:
    source = shutil.copytree(checkpoint, tmp_path / "source")
    from_pretrained(source, registry=registry).save_pretrained(source)
    assert_same_tensors(checkpoint, source)


def test_without_source_and_way_back_saving_is_an_error_and_the_model_still_runs(checkpoint, ids, tmp_path) -> None:
    one_way = build_registry({"quantplug-gptq": gptq, "one-way": OneWayPlugin})
    source = shutil.copytree(checkpoint, tmp_path / "source")
    model = from_pretrained(source, registry=one_way)
    assert model.quantplug_report.kernels == {"test.one_way": 14}
    model.save_pretrained(tmp_path / "while it is there")
    assert_same_tensors(checkpoint, tmp_path / "while it is there")
    expected = model(ids).logits
    shutil.rmtree(source)
    with pytest.raises(LoadError, match=r"model\.layers\.0\.self_attn\.q_proj.*values only") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert caught.value.code == "QP-LOAD-SOURCE"
    assert "Keep the checkpoint directory where it was" in caught.value.fix
    assert list((tmp_path / "saved").iterdir()) == []
    assert torch.equal(model(ids).logits, expected)


def test_a_copy_of_a_model_is_saved_alike(checkpoint, registry, tmp_path) -> None:
    copy.deepcopy(from_pretrained(checkpoint, registry=registry)).save_pretrained(tmp_path / "saved")
    assert_same_tensors(checkpoint, tmp_path / "saved")


def test_dense_checkpoint_is_saved_without_a_word_of_quantization(dense, registry, tmp_path) -> None:
    from_pretrained(dense, registry=registry).save_pretrained(tmp_path / "saved")
    assert_same_tensors(dense, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
