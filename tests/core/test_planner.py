"""Plans: what is decided from headers and configuration alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from toy_checkpoints import dense_tensors, toy_checkpoint, toy_registry, toy_tensors, write_checkpoint

from quantplug.entries import path_entries
from quantplug.errors import CheckpointError, ConfigError, PlanError, QuantplugError
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.onload import OnLoad
from quantplug.plan import Plan
from quantplug.planner import plan
from quantplug.spec import LinearShape

if TYPE_CHECKING:
    from pathlib import Path

TOY = {"quant_method": "toy"}


def make(directory: Path, **arguments: object) -> Plan:
    return plan(directory, platform="cpu", registry=toy_registry(), **arguments)  # type: ignore[arg-type]


def test_a_plan_names_rule_scheme_kernel_and_tensors_of_every_layer(tmp_path: Path) -> None:
    result = make(toy_checkpoint(tmp_path, keep=("layers.1.mlp",)))
    layer = result.layer("model.layers.0.self_attn.q_proj")
    assert layer.scheme == "toy limit 127"
    assert layer.rule == "default of toy"
    assert layer.segments[0].tensors == (
        ("codes", "model.layers.0.self_attn.q_proj.codes"),
        ("scale", "model.layers.0.self_attn.q_proj.scale"),
    )
    assert layer.tensors == ("model.layers.0.self_attn.q_proj.bias",)
    assert layer.problem is not None
    assert layer.problem.bias
    assert layer.file_bytes == 32 * 32 + 32 * 4 + 32 * 2
    decision = result.decision_of(layer)
    assert decision is not None
    assert decision.kernel == "toy.fast"
    kept = result.layer("model.layers.1.mlp.up_proj")
    assert not kept.quantized
    assert kept.rule.startswith("layers.1.mlp (config.json: quantization_config.keep")
    assert result.layer("lm_head").rule == "tied to model.embed_tokens: stored once, not quantized"
    assert result.layer("model.embed_tokens").kind == "embedding"
    assert result.warnings == ()
    assert result.plugins == (("toys", ""),)


def test_equal_problems_share_one_decision(tmp_path: Path) -> None:
    result = make(toy_checkpoint(tmp_path))
    assert len(result.decisions) == 4
    assert sum(layer.quantized for layer in result.layers) == 8


def test_a_plan_survives_json_unchanged_and_its_hash_covers_the_choices_only(tmp_path: Path) -> None:
    directory = toy_checkpoint(tmp_path)
    result = make(directory)
    assert Plan.from_json(result.to_json()) == result
    assert make(directory).hash == result.hash
    assert make(directory, dtype="float32").hash != result.hash
    on_gpu = plan(directory, platform="cuda:9.0", registry=toy_registry())
    assert on_gpu.hash != result.hash
    slow = [warning for warning in on_gpu.warnings if "run on the slow reference kernel" in warning]
    assert len(slow) == len(on_gpu.decisions) == 4, "once a decision, not once a layer"
    assert all("and layers like it" in warning for warning in slow)
    assert all("(toy.fast: runs on cpu, not on cuda:9.0" in warning for warning in slow)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.update(version=99), "version 99"),
        (lambda p: p.pop("layers"), "fields missing or unknown: ['layers']"),
        (lambda p: p.update(extra=1), "fields missing or unknown: ['extra']"),
        (lambda p: p.update(dtype=3), "plan.dtype: 3; expected str"),
        (lambda p: p["layers"].append(3), "plan.layers[13]: 3; expected an object"),
        (lambda p: p["layers"][0].update({"is": "os.system"}), "is 'os.system'"),
        (lambda p: p["decisions"][0].update(basis="guessed"), "'guessed'"),
    ],
)
def test_a_tampered_plan_is_refused_with_the_place(tmp_path: Path, change: object, text: str) -> None:
    body = json.loads(make(toy_checkpoint(tmp_path)).to_json())
    change(body)  # type: ignore[operator]
    with pytest.raises(PlanError) as raised:
        Plan.from_json(json.dumps(body))
    assert raised.value.code == "QP-PLAN-JSON"
    assert text in str(raised.value)


def test_a_rule_that_matches_nothing_is_reported(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, toy_tensors(), {**TOY, "keep": ["model.layers.7."]})
    result = make(directory)
    assert any("'model.layers.7.' (config.json: quantization_config.keep" in w for w in result.warnings)
    assert [use.matched for use in result.entries] == [0]


def test_tensors_overrule_a_rule_where_they_are_unambiguous_and_strict_makes_that_an_error(tmp_path: Path) -> None:
    dense_though_not_listed = write_checkpoint(tmp_path / "a", toy_tensors(("layers.0.mlp",)), TOY)
    layer = make(dense_though_not_listed).layer("model.layers.0.mlp.up_proj")
    assert not layer.quantized
    assert layer.notes[0].startswith("evidence: default of toy assigns toy limit 127, but")
    quantized_though_listed = write_checkpoint(tmp_path / "b", toy_tensors(), {**TOY, "keep": ["layers.0.mlp"]})
    assert make(quantized_though_listed).layer("model.layers.0.mlp.up_proj").quantized
    for directory in (dense_though_not_listed, quantized_though_listed):
        with pytest.raises(ConfigError) as raised:
            make(directory, strict=True)
        assert raised.value.code == "QP-SKIP-EVIDENCE"


def damaged(name: str, tensor: torch.Tensor | None, directory: Path) -> Path:
    tensors = toy_tensors()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return write_checkpoint(directory, tensors, TOY)


@pytest.mark.parametrize(
    ("name", "tensor", "code", "text"),
    [
        ("model.layers.0.mlp.up_proj.scale", None, "QP-ST-MISSING", "lacks scale"),
        ("model.layers.0.mlp.up_proj.scale", torch.ones(48), "QP-ST-SHAPE", "shape [48]; expected [48, 1]"),
        (
            "model.layers.0.mlp.up_proj.scale",
            torch.ones(48, 1).half(),
            "QP-ST-DTYPE",
            "float16; expected float32",
        ),
        (
            "model.layers.0.mlp.up_proj.weight",
            torch.ones(48, 32),
            "QP-SKIP-AMBIGUOUS",
            "stores both a dense weight",
        ),
        ("model.layers.0.mlp.up_proj.zeros", torch.ones(48, 1), "QP-ST-EXTRA", "1 tensor(s) are claimed by no module"),
        ("model.layers.0.mlp.up_proj.codes", torch.ones(48).char(), "QP-ST-SHAPE", "codes are [48]"),
    ],
)
def test_stored_tensors_that_do_not_fit_the_format_stop_the_plan(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, code: str, text: str
) -> None:
    with pytest.raises(QuantplugError) as raised:
        make(damaged(name, tensor, tmp_path / "bad"))
    assert (raised.value.code, text in str(raised.value)) == (code, True), str(raised.value)
    assert make(toy_checkpoint(tmp_path / "good")).layers


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("model.embed_tokens.weight", torch.ones(40, 32).to(torch.float8_e4m3fn), "embeddings in quantized form"),
        ("model.embed_tokens.weight", torch.ones(40, 32).char(), "dtype int8: it holds quantized values"),
        ("model.embed_tokens.qweight", torch.ones(40, 4).int(), "dtype int32: it holds quantized values"),
        (f"{EXPERTS}.gate_up_proj_blocks", torch.ones(2, 8, 1, 16).byte(), "no name rule of its family"),
        (f"{EXPERTS}.gate_up_proj_scales", torch.ones(2, 8).byte(), "no name rule of its family"),
        (f"{EXPERTS}.down_proj", torch.ones(2, 8, 8).to(torch.float8_e5m2), "no name rule of its family"),
        (f"{EXPERTS}.down_proj", torch.ones(2, 8, 8).char(), "no name rule of its family"),
        (
            "model.norm.weight",
            torch.ones(32).to(torch.float8_e4m3fn),
            "such a module in quantized form cannot be read",
        ),
        ("visual.proj.weight", torch.ones(8, 8).char(), "name no format that stores them so"),
    ],
)
def test_quantized_values_are_never_taken_for_a_module_that_stays_whole(
    tmp_path: Path, name: str, tensor: torch.Tensor, text: str
) -> None:
    """What no rule reads is an error that says what it is, not a tensor handed on as it lies there."""
    with pytest.raises(CheckpointError) as raised:
        make(damaged(name, tensor, tmp_path))
    assert (raised.value.code, text in raised.value.what) == ("QP-ST-DTYPE", True), str(raised.value)
    assert raised.value.where == f"model.safetensors: {name}"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.embed_positions.position_ids", torch.arange(8)),
        ("model.layers.0.self_attn.bias", torch.ones(1, 1, 8, 8).byte()),
        ("model.layers.0.self_attn.mask", torch.ones(8, 8, dtype=torch.bool)),
        ("model.batch_norm.num_batches_tracked", torch.tensor(3)),
        ("model.window.relative_position_index", torch.ones(8, 8).int()),
        ("model.embed_tokens.embed_scale", torch.tensor(4.0)),
        ("model.logits.logit_scale", torch.tensor(4, dtype=torch.int64)),
    ],
)
def test_integers_of_a_models_own_are_handed_on(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    """Positions, masks and counters are what they say."""
    layers = make(damaged(name, tensor, tmp_path)).layers
    assert [name for layer in layers for item in layer.tensors if item == name]


def test_a_fused_module_of_a_model_takes_its_shards_in_order(tmp_path: Path) -> None:
    shards = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    tensors = {name: t for name, t in toy_tensors().items() if name.startswith(shards) and not name.endswith("bias")}
    fused = ModuleInfo("model.layers.0.self_attn.qkv_proj", "linear", shape=LinearShape(48, 32), shards=shards)
    directory = write_checkpoint(tmp_path / "good", tensors, TOY)
    layer = make(directory, inventory=Inventory((fused,))).layers[0]
    assert [segment.name for segment in layer.segments] == list(shards)
    wrong = ModuleInfo(fused.path, "linear", shape=LinearShape(64, 32), shards=shards)
    with pytest.raises(CheckpointError, match=r"describe 48 x 32; expected 64 x 32"):
        make(directory, inventory=Inventory((wrong,)))
    one_dense = {n: t for n, t in tensors.items() if not n.startswith(shards[1])}
    one_dense[f"{shards[1]}.weight"] = torch.ones(16, 32)
    with pytest.raises(ConfigError, match="its shards are partly quantized") as raised:
        make(write_checkpoint(tmp_path / "mixed", one_dense, TOY), inventory=Inventory((fused,)))
    assert raised.value.code == "QP-SKIP-SHARDS"


SHARDS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
FUSED = Inventory((ModuleInfo("model.layers.0.self_attn.qkv_proj", "linear", shards=SHARDS),))


def fused_checkpoint(directory: Path, dense: tuple[str, ...]) -> Path:
    """Write the two shards alone, some of them dense, with a rule that keeps the first of them whole."""
    tensors = {n: t for n, t in toy_tensors(keep=dense).items() if n.startswith(SHARDS) and not n.endswith("bias")}
    return write_checkpoint(directory, tensors, {**TOY, "keep": ["self_attn.q_proj"]})


def test_where_rules_disagree_about_shards_the_tensors_decide_if_they_agree(tmp_path: Path) -> None:
    """Writers' expressions match more than was meant; the plan says so, and strict mode makes it an error."""
    quantized = fused_checkpoint(tmp_path / "a", ())
    planned = make(quantized, inventory=FUSED)
    layer = planned.layers[0]
    assert [segment.name for segment in layer.segments] == list(SHARDS)
    assert layer.rule == f"{SHARDS[0]}: self_attn.q_proj; {SHARDS[1]}: default"
    (note,) = layer.notes
    assert note.startswith("evidence: self_attn.q_proj (config.json: quantization_config.keep")
    assert note.endswith(f"keeps it whole, but {SHARDS[0]} is stored quantized")
    assert note in planned.warnings
    whole = fused_checkpoint(tmp_path / "b", ("self_attn",))
    layer = make(whole, inventory=FUSED).layers[0]
    assert not layer.quantized
    assert layer.notes == (f"evidence: default of toy assigns toy limit 127, but {SHARDS[1]} is stored dense",)
    for directory in (quantized, whole):
        with pytest.raises(ConfigError) as raised:
            make(directory, inventory=FUSED, strict=True)
        assert raised.value.code == "QP-SKIP-EVIDENCE"


def test_where_rules_and_tensors_disagree_about_shards_nobody_can_decide(tmp_path: Path) -> None:
    """The tensors follow the rules, or contradict both of them: the error is that of the rules."""
    for name, dense in {"as ruled": SHARDS[:1], "the other way round": SHARDS[1:]}.items():
        with pytest.raises(ConfigError, match=r"come to different schemes; kept whole: .*q_proj by") as raised:
            make(fused_checkpoint(tmp_path / name, dense), inventory=FUSED)
        assert raised.value.code == "QP-SKIP-SHARDS"
    tensors = {n: t for n, t in dense_tensors().items() if n.startswith(SHARDS) and not n.endswith("bias")}
    directory = write_checkpoint(tmp_path / "dense", tensors, None)
    with pytest.raises(ConfigError, match="come to different schemes") as raised:
        make(directory, inventory=FUSED, quantize=OnLoad("toy", path_entries(["q_proj"], "skip")))
    assert raised.value.code == "QP-SKIP-SHARDS"


def test_a_model_without_tensors_for_a_module_is_an_error(tmp_path: Path) -> None:
    inventory = Inventory((ModuleInfo("model.layers.0.mlp.gate_proj", "linear"),))
    with pytest.raises(CheckpointError, match="the checkpoint has no tensors for it"):
        make(toy_checkpoint(tmp_path), inventory=inventory)


def test_asking_for_a_layer_that_is_not_there_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"Nearest: model\.layers\.0\.self_attn\.q_proj"):
        make(toy_checkpoint(tmp_path)).layer("layers.0.self_attn.q_proj")


def test_an_activation_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="'int4' is not an activation dtype"):
        make(toy_checkpoint(tmp_path), dtype="int4")


def test_tensors_that_nobody_consumes_are_left_by_a_named_rule_or_not_at_all(tmp_path: Path) -> None:
    """A model that has no module for them says which modules it has; a bare checkpoint claims everything as it is."""
    tensors = toy_tensors()
    modules = tuple(ModuleInfo(layer.path, layer.kind) for layer in make(toy_checkpoint(tmp_path / "a")).layers)  # type: ignore[arg-type]
    tied = tuple(
        ModuleInfo(m.path, m.kind, tied_to="model.embed_tokens") if m.path == "lm_head" else m for m in modules
    )
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    directory = write_checkpoint(tmp_path / "b", tensors, {**TOY, "keep": ["lm_head"]})
    without_head = Inventory(tuple(m for m in tied if m.path != "lm_head"))
    with pytest.raises(CheckpointError, match=r"claimed by no module: lm_head\.weight"):
        make(directory, inventory=without_head)
    left = make(directory, inventory=Inventory(tied)).left
    assert {item.reason: item.names for item in left} == {
        "stale copy: tied to model.embed_tokens": ("lm_head.weight",),
        "derived buffer: computed from the configuration": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
    }
