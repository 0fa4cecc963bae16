"""Routed experts: found by rule, run with the numbers of the dense class, saved as they were, and never half loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import FAMILIES, experts_registry, quantize_experts, write_family
from tiny_models import config_of, stored_tensors
from transformers import AutoModelForCausalLM

from quantplug.errors import QuantplugError
from quantplug.expertrules import ExpertLayer, ExpertRules
from quantplug.hooks import hookimpl
from quantplug.moe import ExpertFunction
from quantplug.names import Architecture
from quantplug.planner import plan as make_plan
from quantplug.plugins import build_registry
from quantplug_gptq import plugin as gptq
from quantplug_transformers import from_pretrained
from quantplug_transformers.experts import RoutedExperts, sizes_of
from quantplug_transformers.trial import check_class

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

REGISTRY = experts_registry()
SWIGLU = ExpertFunction("silu", limit=7.0, alpha=1.702, up_offset=1.0)
FUNCTIONS = {family: ExpertFunction("silu") for family in FAMILIES} | {
    "gpt_oss": SWIGLU,
    "gemma4_text": ExpertFunction("gelu_tanh"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """Directories of a family: dense, with quantized experts, and dense with the values of those."""
    made: dict[str, tuple[Path, Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path, Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            dense = write_family(family, root / "dense")
            made[family] = dense, quantize_experts(dense, root / "quantized", root / "values"), root / "values"
        return made[family]

    return of


def experts_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {path: m for path, m in model.named_modules() if path.endswith(".experts")}


def by_hand(module: torch.nn.Module, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Run the experts of gpt-oss one after the other, each with a product of `[M, K]` and `[N, K]`."""
    result = torch.zeros_like(rows)
    for number in range(module.gate_up_proj.shape[0]):
        tokens, slots = (ids == number).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        both, bias = module.gate_up_proj[number].t(), module.gate_up_proj_bias[number]
        both, bias = torch.cat([both[0::2], both[1::2]]), torch.cat([bias[0::2], bias[1::2]])
        gate, up = torch.nn.functional.linear(rows[tokens], both, bias).chunk(2, dim=-1)
        down, down_bias = module.down_proj[number].t().contiguous(), module.down_proj_bias[number]
        output = torch.nn.functional.linear(swiglu(gate, up), down, down_bias)
        result.index_add_(0, tokens, output * weights[tokens, slots, None])
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1.0)


def dense_of(values: Path, family: str) -> PreTrainedModel:
    """Return Transformers' own model with the values of the quantized experts."""
    model = AutoModelForCausalLM.from_pretrained(values, dtype=torch.float32, experts_implementation="eager")
    for module in experts_of(model).values():
        for parameter in module.parameters():
            # Out of a file they may lie where no vector register loads from in one go: other code, other roundings.
            parameter.data = parameter.data.clone()
        if family == "gpt_oss":
            # Its class multiplies turned matrices and computes f in another order of operations: float32 differs in the
            # last bit. That both are the same function is what `check_class` asks.
            module.forward = partial(by_hand, module)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_dense_class_with_the_values(family, written, ids, tmp_path) -> None:
    _, source, values = written(family)
    model = from_pretrained(source, dtype="float32", registry=REGISTRY)
    replaced = {path for path, module in experts_of(model).items() if isinstance(module, RoutedExperts)}
    assert replaced == set(experts_of(model))
    reference = dense_of(values, family)
    logits = model(ids).logits
    assert torch.equal(logits, reference(ids).logits)
    assert model.num_parameters() == reference.num_parameters()
    tokens = model.generate(ids, do_sample=False, max_new_tokens=4)
    assert torch.equal(tokens, reference.generate(ids, do_sample=False, max_new_tokens=4))
    from_pretrained(source, registry=REGISTRY).save_pretrained(tmp_path / "saved")
    wanted, found = stored_tensors(source), stored_tensors(tmp_path / "saved")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(t, found[n]) for n, t in wanted.items())
    # Transformers keeps this one in float32, whatever the model's dtype is.
    assert {n for n, t in wanted.items() if t.dtype != found[n].dtype} <= {n for n in wanted if "correction_bias" in n}
    again = from_pretrained(tmp_path / "saved", dtype="float32", registry=REGISTRY)
    assert torch.equal(again(ids).logits, logits)


@torch.no_grad()
def test_a_plan_of_the_files_alone_serves_a_model_that_calls_its_modules_otherwise(written, ids) -> None:
    _, source, values = written("mixtral")
    made = make_plan(source, dtype="float32", registry=REGISTRY)
    assert [layer.path for layer in made.layers if layer.experts] == [
        f"model.layers.{number}.block_sparse_moe.experts" for number in range(2)
    ]
    model = from_pretrained(source, plan=made, registry=REGISTRY)
    assert torch.equal(model(ids).logits, dense_of(values, "mixtral")(ids).logits)


@torch.no_grad()
def test_names_that_no_engine_maps_are_found_by_their_container(written, ids, tmp_path) -> None:
    """As llm-compressor and GPTQModel write Mixtral: other projections, in the one place or the other."""
    _, source, values = written("mixtral")
    for place in ("block_sparse_moe", "mlp"):
        target = copy_of(source, tmp_path / place)
        spelled = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj.", "block_sparse_moe": place}

        def rename(name: str, spelled: Mapping[str, str] = spelled) -> str:
            for old, new in spelled.items():
                name = name.replace(old, new)
            return name

        edit(target, lambda t, rename=rename: {rename(name): tensor for name, tensor in t.items()})
        model = from_pretrained(target, dtype="float32", registry=REGISTRY)
        assert torch.equal(model(ids).logits, dense_of(values, "mixtral")(ids).logits)
        from_pretrained(target, registry=REGISTRY).save_pretrained(tmp_path / f"{place}-saved")
        saved = stored_tensors(tmp_path / f"{place}-saved").keys()
        assert {name for name in stored_tensors(target) if ".experts." in name} <= saved


def copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = directory / "model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file, {"format": "pt"})


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    assert old in tensors
    return {new if name == old else name: tensor for name, tensor in tensors.items()}


SCALES = "model.layers.1.mlp.experts.2.up_proj.scales"
STACKED = "model.layers.1.mlp.experts.up_proj_scales"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: {n: x for n, x in t.items() if n != SCALES}, "QP-ST-MISSING"),
        (lambda t: renamed(t, SCALES, SCALES.removesuffix("s")), "QP-ST-MISSING"),
        (lambda t: renamed(t, SCALES, SCALES.replace(".2.", ".9.")), "QP-ST-MISSING"),
        (lambda t: t | {SCALES.replace(".2.", ".9."): t[SCALES].clone()}, "QP-ST-EXTRA"),
        (lambda t: t | {STACKED: t[SCALES].clone()[None]}, "QP-ST-EXTRA"),
        (lambda t: t | {SCALES: torch.full_like(t[SCALES], float("nan"))}, "QP-ST-SCALE"),
    ],
    ids=["dropped", "renamed", "of another expert", "of no expert", "for all experts as well", "not a number"],
)
def test_scales_are_never_lost_on_the_way(change, code, written, ids, tmp_path) -> None:
    """Transformers from 5.21 on reports lost scales in a table, and returns NaN."""
    _, source, _ = written("qwen3_moe")
    target = copy_of(source, tmp_path / "bad")
    edit(target, change)
    with pytest.raises(QuantplugError) as caught:
        from_pretrained(target, registry=REGISTRY)
    assert caught.value.code == code
    assert bool(from_pretrained(source, registry=REGISTRY)(ids).logits.isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_is_asked_whether_it_computes_what_the_rules_say(family) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(family, **FAMILIES[family]))
    path, module = next(iter(experts_of(model).items()))
    own = dict(module.named_parameters(recurse=False))
    right = ExpertLayer(4, 2, FUNCTIONS[family], ExpertRules().files[0])
    check_class(path, module, right)
    assert dict(module.named_parameters(recurse=False)) == own
    wrong = [
        replace(right, function=replace(right.function, name="gelu")),
        replace(right, function=replace(right.function, limit=5.0)),
        replace(right, function=replace(right.function, alpha=1.5)),
        replace(right, function=replace(right.function, up_offset=0.5)),
        replace(right, function=replace(right.function, gated=False)),
        replace(right, router_weight_on_input=True),
    ]
    for layer in wrong if right.function.name == "silu" else [wrong[0], *wrong[1:2], *wrong[3:]]:
        with pytest.raises(QuantplugError, match="does not compute what the rules") as caught:
            check_class(path, module, layer)
        assert (caught.value.code, caught.value.where) == ("QP-PLAN-MODEL", path)


def described(**fields: object) -> object:
    class Rules:
        @staticmethod
        @hookimpl
        def quantplug_architectures() -> list[Architecture]:
            return [Architecture("other", ("qwen3_moe",), experts=ExpertRules(**fields))]

    return build_registry({"quantplug-gptq": gptq, "rules": Rules})


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"count": ("num_experts_per_tok",)}, "holds 4 experts, and the configuration names 2"),
        ({"function": ExpertFunction("relu"), "function_field": ""}, "does not compute what the rules"),
    ],
)
def test_rules_that_contradict_the_class_are_refused(rules, words, written) -> None:
    _, source, _ = written("qwen3_moe")
    with pytest.raises(QuantplugError, match=words) as caught:
        from_pretrained(source, registry=described(**rules))
    assert caught.value.code == "QP-PLAN-MODEL"


def test_experts_of_another_size_than_the_class_has_are_refused(written) -> None:
    _, source, _ = written("qwen3_moe")
    made = make_plan(source, dtype="float32", registry=REGISTRY)
    with pytest.raises(QuantplugError, match=r"the file holds 4 experts \[32, 64\] without biases") as caught:
        from_pretrained(source, plan=made, registry=REGISTRY, num_experts=5)
    assert caught.value.code == "QP-PLAN-MODEL"


def test_a_layer_of_experts_left_whole_stays_the_class_own(written, tmp_path, ids) -> None:
    dense, source, values = written("qwen3_moe")
    target, own = copy_of(source, tmp_path / "mixed"), load_file(dense / "model.safetensors")

    def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: t for name, t in tensors.items() if "layers.1.mlp.experts" not in name}
        return kept | {name: t for name, t in own.items() if "layers.1.mlp.experts" in name}

    edit(target, whole)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["dynamic"]["-:.*layers\\.1\\.mlp\\.experts"] = {}
    (target / "config.json").write_text(json.dumps(config))
    edit(copy_of(values, tmp_path / "values"), whole)
    model = from_pretrained(target, dtype="float32", registry=REGISTRY, experts_implementation="eager")
    kinds = [type(module).__name__ for module in experts_of(model).values()]
    assert kinds == ["RoutedExperts", "Qwen3MoeExperts"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense_of(tmp_path / "values", "qwen3_moe")(ids).logits)
    from_pretrained(target, registry=REGISTRY).save_pretrained(tmp_path / "saved")
    assert stored_tensors(tmp_path / "saved").keys() == stored_tensors(target).keys()


def test_layers_that_draft_are_left_out_and_named(written, tmp_path, ids) -> None:
    _, source, _ = written("glm4_moe")
    target = copy_of(source, tmp_path / "next")
    edit(target, lambda t: t | {n.replace("layers.1.", "layers.2."): x.clone() for n, x in t.items() if ".1.mlp" in n})
    model = from_pretrained(target, registry=REGISTRY)
    (left,) = model.quantplug_plan.left
    assert left.reason == "not run by the model class"
    assert all(name.startswith("model.layers.2.") for name in left.names)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, from_pretrained(source, registry=REGISTRY)(ids).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@torch.no_grad()
def test_dense_experts_are_quantized_on_load_and_saved_as_a_checkpoint(family, written, ids, tmp_path) -> None:
    dense, _, _ = written(family)
    model = from_pretrained(dense, quantize="int8", dtype="float32")
    assert all(isinstance(module, RoutedExperts) for module in experts_of(model).values())
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved", dtype="float32")
    assert all(isinstance(module, RoutedExperts) for module in experts_of(again).values())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_prepared_experts_refuse_to_move_and_are_left_where_they_are(written) -> None:
    model = from_pretrained(written("qwen3_moe")[1], dtype="float32", registry=REGISTRY)
    with pytest.raises(QuantplugError) as caught:
        model.half()
    assert caught.value.code == "QP-RUN-MOVE"
    assert model.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_gives_the_same_numbers(written, ids) -> None:
    """The loop over experts waits for the router: it stays outside of the graph."""
    model = from_pretrained(written("qwen3_moe")[1], dtype="float32", registry=REGISTRY)
    wanted = model(ids).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(ids).logits, wanted)


def test_what_is_no_module_of_stacked_experts_is_not_taken_for_one() -> None:
    module = torch.nn.Module()
    module.down_proj = torch.nn.Parameter(torch.zeros(4, 8, 6))
    assert sizes_of(module, 8) is None
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 12, 8))
    assert str(sizes_of(module, 8)) == "4 experts [6, 8] without biases"
    assert sizes_of(module, 7) is None
    module.norm = torch.nn.Parameter(torch.zeros(8))
    assert sizes_of(module, 8) is None
