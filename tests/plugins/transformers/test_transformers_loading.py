"""`from_pretrained`: what it gives, what it refuses, and that a refusal costs nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import config_of, dequantized, quantize, write_dense
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from quantplug.errors import QuantplugError
from quantplug.hooks import hookimpl
from quantplug.kernel import Accepted, Cost, Rejected
from quantplug.modules import QuantizedLinear
from quantplug.planner import plan as make_plan
from quantplug.plugins import build_registry
from quantplug.policy import Policy
from quantplug.reference import ReferenceKernel
from quantplug_gptq import plugin as gptq
from quantplug_transformers import from_pretrained, register
from quantplug_transformers.devices import layer_devices, platform_kind
from quantplug_transformers.quantizer import QuantplugConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


LAYER = "model.layers.1.mlp.down_proj"


def copied(checkpoint: Path, directory: Path) -> Path:
    return shutil.copytree(checkpoint, directory)


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, **fields: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def test_model_is_an_ordinary_one_with_planned_layers_and_carries_plan_and_report(checkpoint, registry) -> None:
    told: list[tuple[str, int, int]] = []
    model = from_pretrained(str(checkpoint), registry=registry, progress=lambda *step: told.append(step))
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert model.dtype == torch.bfloat16
    replaced = {path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert replaced == {layer.path for layer in model.quantplug_plan.layers if layer.quantized}
    assert len(replaced) == 14
    report = model.quantplug_report
    assert report.kernels == {"reference": 14}
    assert report.file_bytes == sum(
        tensor.nbytes for name, tensor in load_file(checkpoint / "model.safetensors").items() if "_proj." in name
    )
    assert told[-1] == ("load", report.file_bytes, report.file_bytes)
    assert model.generation_config.max_new_tokens == 7


def test_printing_shows_schemes_and_kernels(checkpoint, registry) -> None:
    text = str(from_pretrained(checkpoint, registry=registry))
    assert "(down_proj): QuantizedLinear(gptq 4-bit group 32 asym, in=96, out=64, kernel=reference)" in text
    assert "(lm_head): Linear(in_features=64, out_features=128, bias=False)" in text


def test_loading_prints_no_table_of_unexpected_tensors(checkpoint, registry, caplog, monkeypatch) -> None:
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        from_pretrained(checkpoint, registry=registry)
    assert "UNEXPECTED" not in caplog.text
    assert "MISSING" not in caplog.text


def test_tied_embeddings_stay_one_tensor(checkpoint, registry) -> None:
    model = from_pretrained(checkpoint, registry=registry)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_quantized_head_is_its_own_although_the_configuration_ties_it(with_head, registry, ids, tmp_path) -> None:
    model = from_pretrained(with_head, dtype="float32", registry=registry)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert not model.config.tie_word_embeddings
    stored = load_file(with_head / "model.safetensors")["model.embed_tokens.weight"]
    model.tie_weights()
    assert torch.equal(model.model.embed_tokens.weight, stored.float())
    assert torch.equal(model(ids).logits, dequantized(with_head, tmp_path / "dense")(ids).logits)


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "float16", torch.bfloat16, "auto", None])
def test_dtype_reaches_dense_and_quantized_layers(dtype, checkpoint, registry, ids) -> None:
    model = from_pretrained(checkpoint, dtype=dtype, registry=registry)
    wanted = torch.bfloat16 if dtype in (None, "auto") else getattr(torch, str(dtype).removeprefix("torch."))
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model(ids).logits.dtype == wanted


def test_stored_dtype_of_dense_tensors_does_not_matter(checkpoint, registry, ids, tmp_path) -> None:
    other = copied(checkpoint, tmp_path / "other")
    edit_tensors(other, lambda t: t.update({n: v.float() for n, v in t.items() if v.dtype == torch.bfloat16}))
    model = from_pretrained(other, registry=registry)
    assert torch.equal(model(ids).logits, from_pretrained(checkpoint, registry=registry)(ids).logits)


def test_dense_checkpoint_loads_whole(dense, registry, ids) -> None:
    model = from_pretrained(dense, registry=registry)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert (model.quantplug_plan.dialect, model.quantplug_report.prepared_bytes) == ("", 0)
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(dense)(ids).logits)
    assert model.half().dtype == torch.float16


def test_a_file_of_another_name_and_a_sharded_checkpoint_are_read_as_the_core_reads_them(
    checkpoint, registry, ids, tmp_path
) -> None:
    expected = from_pretrained(checkpoint, registry=registry)
    renamed = copied(checkpoint, tmp_path / "renamed")
    (renamed / "model.safetensors").rename(renamed / "gptq_model-4bit-32g.safetensors")
    model = from_pretrained(renamed, registry=registry)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert "transformers_weights" not in model.config.to_dict()
    sharded = tmp_path / "sharded"
    expected.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert torch.equal(from_pretrained(sharded, registry=registry)(ids).logits, expected(ids).logits)


def test_description_in_a_file_of_its_own_is_saved_into_config_json(checkpoint, registry, ids, tmp_path) -> None:
    other = copied(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    section = config.pop("quantization_config")
    (other / "config.json").write_text(json.dumps(config))
    (other / "quantize_config.json").write_text(json.dumps({k: v for k, v in section.items() if k != "quant_method"}))
    model = from_pretrained(other, registry=registry)
    assert torch.equal(model(ids).logits, from_pretrained(checkpoint, registry=registry)(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == section


def test_plan_given_is_the_plan_used(checkpoint, registry, ids) -> None:
    plan = make_plan(checkpoint, dtype="float32", registry=registry)
    model = from_pretrained(checkpoint, plan=plan, registry=registry)
    assert model.quantplug_plan == plan
    assert model.dtype == torch.float32


def test_policy_override_and_strict_reach_the_plan(checkpoint, registry, tmp_path) -> None:
    deny = Policy.parse({"rule": [{"deny": ["reference"], "match": LAYER}]}, "test")
    with pytest.raises(QuantplugError, match=f"{LAYER}.*denied by test") as caught:
        from_pretrained(checkpoint, policy=deny, registry=registry)
    assert caught.value.code == "QP-PLAN-NOKERNEL"
    with pytest.raises(QuantplugError) as caught:
        from_pretrained(checkpoint, override={"bits": 8}, registry=registry)
    assert caught.value.code == "QP-CFG-OVERRIDE"
    odd = copied(checkpoint, tmp_path / "odd")
    edit_config(odd, quantization_config={
        **json.loads((odd / "config.json").read_text())["quantization_config"], "dynamic": {f"-:{LAYER}": {}},
    })  # fmt: skip
    assert LAYER in from_pretrained(odd, registry=registry).quantplug_plan.to_json()
    with pytest.raises(QuantplugError) as caught:
        from_pretrained(odd, strict=True, registry=registry)
    assert caught.value.code == "QP-SKIP-EVIDENCE"


def test_other_classes_and_fields_of_the_model_are_passed_on(checkpoint, registry, ids) -> None:
    model = from_pretrained(
        checkpoint, model_class=LlamaForCausalLM, attn_implementation="eager", rms_norm_eps=0.5, registry=registry
    )
    assert model.config._attn_implementation == "eager"
    assert model.config.rms_norm_eps == 0.5
    assert not torch.equal(model(ids).logits, from_pretrained(checkpoint, registry=registry)(ids).logits)


def test_registered_method_works_from_transformers_own_door(
    checkpoint, with_head, registry, ids, tmp_path, monkeypatch
) -> None:
    register()
    (tmp_path / "policy.toml").write_text('[[rule]]\npin = "reference"\n')
    monkeypatch.setenv("QUANTPLUG_POLICY", str(tmp_path / "policy.toml"))
    for directory in (checkpoint, with_head):
        config = AutoConfig.from_pretrained(directory)
        section = config.quantization_config
        config.quantization_config = {"quant_method": "quantplug", "source": section}
        model = AutoModelForCausalLM.from_pretrained(directory, config=config)
        ours = from_pretrained(directory, registry=registry)
        assert torch.equal(model(ids).logits, ours(ids).logits)
        assert model.quantplug_plan.layers == ours.quantplug_plan.layers
        assert model.quantplug_report.kernels == ours.quantplug_report.kernels
        assert model.config.quantization_config.to_dict() == section


def test_what_the_model_class_leaves_out_is_left_and_listed(checkpoint, registry, ids, tmp_path, monkeypatch) -> None:
    drafting = copied(checkpoint, tmp_path / "drafting")
    edit_tensors(
        drafting, lambda t: t.update({"mtp.0.norm.weight": torch.zeros(2), "mtp.0.up.qweight": torch.zeros(2)})
    )
    with pytest.raises(QuantplugError) as caught:
        from_pretrained(drafting, registry=registry)
    assert caught.value.code == "QP-ST-EXTRA"
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    model = from_pretrained(drafting, registry=registry)
    assert [(left.reason, left.names) for left in model.quantplug_plan.left] == [
        ("not run by the model class", ("mtp.0.norm.weight", "mtp.0.up.qweight"))
    ]
    assert list(model._keys_to_ignore_on_load_unexpected) == [r"^mtp\."]
    assert torch.equal(model(ids).logits, from_pretrained(checkpoint, registry=registry)(ids).logits)


def test_kernels_are_tried_on_this_machine_before_they_are_chosen(checkpoint) -> None:
    class Broken(ReferenceKernel):
        name = "test.broken"

        def supports(self, problem, platform):
            return Accepted(Cost(0.0, 0.0))

        def probe(self, platform):
            return Rejected("probe", "its operator is missing")

    class BrokenPlugin:
        @staticmethod
        @hookimpl
        def quantplug_kernels():
            return [Broken()]

    model = from_pretrained(checkpoint, registry=build_registry({"quantplug-gptq": gptq, "broken": BrokenPlugin}))
    assert model.quantplug_report.kernels == {"reference": 14}
    assert "its operator is missing" in model.quantplug_plan.to_json()


def test_a_configuration_file_cannot_speak_for_a_load() -> None:
    assert QuantplugConfig(request={"plan": "nonsense"}).request is None
    assert QuantplugConfig(source={"bits": 4}).to_dict() == {"bits": 4}


def drop_norm(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.pop("model.norm.weight"))


def drop_scales(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.pop(f"{LAYER}.scales"))


def drop_layer(directory: Path) -> None:
    edit_tensors(directory, lambda t: [t.pop(name) for name in list(t) if name.startswith(LAYER)])


def add_stranger(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({"model.norm.stranger": torch.zeros(2)}))


def add_module(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({"model.extra.weight": torch.zeros(2)}))


def reshape_norm(directory: Path) -> None:
    edit_tensors(directory, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)}))


def narrow_model(directory: Path) -> None:
    edit_config(directory, intermediate_size=64)


def spoil_scale(directory: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.scales"][0, 0] = float("nan")

    edit_tensors(directory, change)


def add_bias_to_model(directory: Path) -> None:
    edit_config(directory, attention_bias=True)


def unknown_model(directory: Path) -> None:
    edit_config(directory, model_type="nonsense")


def unusable_model(directory: Path) -> None:
    edit_config(directory, hidden_act="nonsense")


def other_family(directory: Path) -> None:
    edit_config(directory, model_type="gpt_neox")


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (drop_norm, "QP-ST-MISSING", "1 parameter(s) of LlamaForCausalLM are not stored: model.norm.weight"),
        (drop_scales, "QP-ST-MISSING", f"{LAYER}: lacks scales"),
        (drop_layer, "QP-ST-MISSING", LAYER),
        (add_stranger, "QP-ST-EXTRA", "1 tensor(s) have no place in LlamaForCausalLM: model.norm.stranger"),
        (add_module, "QP-ST-EXTRA", "model.extra.weight"),
        (reshape_norm, "QP-ST-SHAPE", "model.norm.weight: shape [32]; expected [64], as LlamaForCausalLM has it"),
        (narrow_model, "QP-ST-SHAPE", "expected 64 x 64, as the model has it"),
        (spoil_scale, "QP-ST-SCALE", LAYER),
        (add_bias_to_model, "QP-ST-MISSING", "the model has a bias here and the checkpoint has none"),
        (unknown_model, "QP-HOST-MODEL", "does not accept its config.json"),
        (unusable_model, "QP-HOST-MODEL", "cannot build 'llama' as AutoModelForCausalLM"),
        (other_family, "QP-ST-MISSING", "gpt_neox.layers.0"),
        (truncate, "QP-ST-LAYOUT", "model.safetensors"),
    ],
)
def test_bad_checkpoint_is_refused_with_its_code_and_a_good_one_loads_after_it(
    damage, code, words, checkpoint, registry, ids, tmp_path
) -> None:
    bad = copied(checkpoint, tmp_path / "bad")
    damage(bad)
    before = hashes(bad)
    with pytest.raises(QuantplugError) as caught:
        from_pretrained(bad, registry=registry)
    assert caught.value.code == code
    assert words in str(caught.value)
    assert hashes(bad) == before
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device.type == "cpu"
    from_pretrained(checkpoint, registry=registry)(ids)


def test_a_projection_of_an_expert_that_is_stored_twice_is_refused_by_name(registry, tmp_path) -> None:
    dense = write_dense(tmp_path / "dense", config_of("mixtral", num_local_experts=2, num_hidden_layers=1))
    source = quantize(dense, tmp_path / "source", keep=lambda path: path.endswith("gate"))
    path = "model.layers.0.block_sparse_moe.experts.0.w1"
    stored = load_file(source / "model.safetensors")["model.layers.0.self_attn.q_proj.qweight"]
    edit_tensors(source, lambda t: t.update({f"{path}.qweight": stored.clone(), f"{path}.weight": t[f"{path}.weight"]}))
    with pytest.raises(QuantplugError, match="both a dense weight and qweight") as caught:
        from_pretrained(source, registry=registry)
    assert (caught.value.code, caught.value.where) == ("QP-SKIP-AMBIGUOUS", path)


@pytest.mark.parametrize(
    "device_map", [{"": "cpu"}, "cpu", "auto", torch.device("cpu"), {"model": "cpu", "lm_head": "cpu"}]
)
def test_device_maps_of_one_kind_are_served(device_map, checkpoint, registry, ids) -> None:
    model = from_pretrained(checkpoint, device_map=device_map, registry=registry)
    assert torch.equal(model(ids).logits, from_pretrained(checkpoint, registry=registry)(ids).logits)


@pytest.mark.parametrize(
    ("device_map", "code", "words"),
    [
        ({"": "disk"}, "QP-HOST-DEVICE", "leaves the model on disk"),
        ({"model": "cpu", "lm_head": "disk"}, "QP-HOST-DEVICE", "leaves lm_head on disk"),
        ({"model": "cpu", "lm_head": "cuda:0"}, "QP-HOST-DEVICE", "spreads over cpu, cuda"),
        ("nonsense", "QP-HOST-DEVICE", "'nonsense' is not a device"),
        ("xpu", "QP-PLAN-PLATFORM", "xpu"),
    ],
)
def test_device_maps_that_cannot_be_served_are_refused(device_map, code, words, checkpoint, registry) -> None:
    with pytest.raises(QuantplugError) as caught:
        from_pretrained(checkpoint, device_map=device_map, registry=registry)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_device_map_that_transformers_itself_resolves_to_disk_is_refused(checkpoint, registry, tmp_path) -> None:
    with pytest.raises(QuantplugError) as caught:
        from_pretrained(
            checkpoint, device_map="auto", max_memory={"cpu": 4000}, offload_folder=tmp_path, registry=registry
        )
    assert caught.value.code == "QP-HOST-DEVICE"


def test_devices_of_layers_follow_the_longest_prefix(registry) -> None:
    class Placed:
        device = torch.device("cpu")
        hf_device_map = {"": "cpu", "model.layers.1": "meta:1", "model.layers.1.mlp": "meta:3"}

    device_of = layer_devices(Placed())  # type: ignore[arg-type]
    assert device_of("lm_head") == torch.device("cpu")
    assert device_of("model.layers.10.mlp") == torch.device("cpu")
    assert device_of("model.layers.1.self_attn") == torch.device("meta:1")
    assert device_of("model.layers.1.mlp.up_proj") == torch.device("meta:3")
    assert platform_kind(None, registry) == "cpu"


@pytest.mark.parametrize("name", ["config", "revision", "gguf_file", "state_dict", "tp_plan", "output_loading_info"])
def test_arguments_that_a_plan_knows_nothing_of_are_refused(name, checkpoint, registry) -> None:
    with pytest.raises(QuantplugError, match=rf"from_pretrained\({name}=…\)") as caught:
        from_pretrained(checkpoint, registry=registry, **{name: object()})
    assert caught.value.code == "QP-HOST-INPUT"
    assert caught.value.fix


def test_method_without_files_to_plan_for_is_refused() -> None:
    register()
    config = config_of("llama")
    config.quantization_config = {"quant_method": "quantplug"}
    with pytest.raises(QuantplugError, match="no checkpoint files") as caught:
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})
    assert caught.value.code == "QP-HOST-INPUT"


def test_what_transformers_finds_wrong_in_the_end_is_an_error(checkpoint, registry, monkeypatch) -> None:
    original = transformers.PreTrainedModel.from_pretrained.__func__

    def lies(cls, *args, **kwargs):
        model, info = original(cls, *args, **kwargs)
        return model, {**info, "missing_keys": {"model.norm.weight"}}

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(lies))
    with pytest.raises(QuantplugError, match=r"missing keys: model\.norm\.weight") as caught:
        from_pretrained(checkpoint, registry=registry)
    assert caught.value.code == "QP-ST-MISSING"
