"""
Every way in which a rule says that experts may lie: joined, stacked, turned, flattened, in each order of rows.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from toy_experts import HIDDEN, INNER

from quantplug.errors import CheckpointError, ConfigError
from quantplug.expertrules import PER_EXPERT, W123, Ending, ExpertFiles, ExpertRules, joined, stacked
from quantplug.hooks import hookimpl
from quantplug.load import load_layers
from quantplug.moe import ExpertFunction
from quantplug.names import Architecture
from quantplug.planner import plan
from quantplug.plugins import build_registry
from quantplug_testkit import toys

EXPERTS = 3
TOY = toys.ToyScheme.build({}, "test")
CODES, TURNED, FLAT = (
    Ending("_q", "codes"),
    Ending("_q", "codes", transposed=True),
    Ending("_q", "codes", flattened=True),
)
SCALE, BIAS = Ending("_s", "scale"), Ending("_b", "bias")

SPELLINGS = {
    "apart": PER_EXPERT,
    "w1 w3 w2": W123,
    "no gate": ExpertFiles(gate=""),
    **{f"joined, {order}": joined("w13", "w2", order=order) for order in ("gate_up", "up_gate", "interleaved")},
    **{
        f"stacked, {order}": stacked(CODES, SCALE, BIAS, order=order) for order in ("gate_up", "up_gate", "interleaved")
    },
    "stacked apart": ExpertFiles(stacked=True, endings=(CODES, SCALE, BIAS)),
    "stacked, turned": stacked(TURNED, SCALE, BIAS, order="interleaved"),
    "stacked, flattened": stacked(FLAT, SCALE, BIAS),
}


def family(files):
    rules = ExpertRules(
        files=(files,), function=ExpertFunction("relu2" if not files.gated else "silu"), function_field=""
    )
    mine = Architecture("mine", ("mine",), experts=rules)
    return build_registry({"toys": toys, "mine": SimpleNamespace(quantplug_architectures=hookimpl(lambda: [mine]))})


def random_expert(generator, gated):
    """Return quantized (gate, up, down), or (up, down), and a bias for each."""
    shapes = [*([(INNER, HIDDEN)] * (1 + gated)), (HIDDEN, INNER)]
    weights = [TOY.quantize(torch.randn(shape, generator=generator)) for shape in shapes]
    return weights, [torch.randn(shape[0], generator=generator) for shape in shapes]


def rows_of(parts, order):
    """Return gate and up in one, rows in an order."""
    gate, up = parts
    if order == "interleaved":
        return torch.stack([gate, up], 1).flatten(0, 1)
    return torch.cat([gate, up] if order == "gate_up" else [up, gate])


def projections_of(files, weights, biases):
    """Return {projection: tensors by suffix} of one expert, as its format has them."""
    stored = [{"codes": w.codes, "scale": w.scales, "bias": b} for w, b in zip(weights, biases, strict=True)]
    if files.joined:
        *first, last = stored
        stored = [{s: rows_of([part[s] for part in first], files.order) for s in last}, last]
    return dict(zip(files.projections, stored, strict=True))


def tensors_of(files, experts):
    """Return what a file holds."""
    parts = [projections_of(files, *expert) for expert in experts]
    if not files.stacked:
        return {
            f"m.experts.{number}.{projection}.{suffix}": tensor.contiguous()
            for number, part in enumerate(parts)
            for projection, tensors in part.items()
            for suffix, tensor in tensors.items()
        }
    state = {}
    for projection in files.projections:
        for ending in files.endings:
            tensor = torch.stack([part[projection][ending.suffix] for part in parts])
            if ending.transposed:
                tensor = tensor.transpose(1, 2)
            state[f"m.experts.{projection}{ending.text}"] = (
                tensor.unflatten(-1, (-1, 4)) if ending.flattened else tensor
            ).contiguous()
    return state


def write(directory, state, experts=EXPERTS, **fields):
    config = {"model_type": "mine", "num_experts": experts, "num_experts_per_tok": 2, "dtype": "float32", **fields}
    config["quantization_config"] = {"quant_method": "toy"}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_loads_the_same_experts(name, tmp_path):
    """Weights and biases, to the bit."""
    files = SPELLINGS[name]
    generator = torch.Generator().manual_seed(2)
    experts = [random_expert(generator, files.gated) for _ in range(EXPERTS)]
    write(tmp_path, tensors_of(files, experts))
    registry = family(files)
    made = plan(tmp_path, registry=registry)
    assert [(layer.path, layer.kind) for layer in made.layers] == [("m.experts", "experts")]
    assert not made.left
    module = load_layers(made, tmp_path, registry=registry).experts["m.experts"]
    held = dict(module.named_buffers())
    for number, (weights, biases) in enumerate(experts):
        w13, w2 = module.dequantize(number)
        assert torch.equal(w13, torch.cat([weight.dequantize() for weight in weights[:-1]]))
        assert torch.equal(w2, weights[-1].dequantize())
        assert torch.equal(held["prepared_0_b13"][number], torch.cat(biases[:-1]))
        assert torch.equal(held["prepared_0_b2"][number], biases[-1])
    sources = {source.name for source in module.sources}
    assert sources == set(tensors_of(files, experts))


def test_two_orders_of_one_file_are_two_models(tmp_path):
    """Nothing in the shapes tells them apart: the rule decides."""
    generator = torch.Generator().manual_seed(2)
    experts = [random_expert(generator, gated=True) for _ in range(EXPERTS)]
    write(tmp_path, tensors_of(SPELLINGS["stacked, gate_up"], experts))
    values = {}
    for order in ("gate_up", "up_gate"):
        registry = family(SPELLINGS[f"stacked, {order}"])
        module = load_layers(plan(tmp_path, registry=registry), tmp_path, registry=registry).experts["m.experts"]
        values[order] = module.dequantize(0)[0]
    assert torch.equal(values["gate_up"], values["up_gate"].roll(INNER, 0))
    assert not torch.equal(values["gate_up"], values["up_gate"])


@pytest.mark.parametrize("name", ["apart", "joined, gate_up", "stacked, gate_up"])
@pytest.mark.parametrize("lacking", ["bias", "scale"])
def test_what_one_projection_lacks_is_missed(name, lacking, tmp_path):
    """A bias that only some have would be 0 for the others."""
    files = SPELLINGS[name]
    generator = torch.Generator().manual_seed(2)
    state = tensors_of(files, [random_expert(generator, gated=True) for _ in range(EXPERTS)])
    ending = {"bias": "_b", "scale": "_s"}[lacking] if files.stacked else f".{lacking}"
    del state[next(key for key in state if key.endswith(f"{files.down}{ending}"))]
    write(tmp_path, state)
    with pytest.raises(CheckpointError, match=rf"{files.down}.*(no bias|lacks scale)") as caught:
        plan(tmp_path, registry=family(files))
    assert caught.value.code == "QP-ST-MISSING"


def test_experts_in_two_spellings_are_no_experts_of_either(tmp_path):
    """What the one misses, the other has too many."""
    generator = torch.Generator().manual_seed(2)
    state = tensors_of(PER_EXPERT, [random_expert(generator, gated=True) for _ in range(EXPERTS)])
    state |= {key.replace("down_proj", "w2"): state.pop(key) for key in list(state) if ".1.down_proj" in key}
    write(tmp_path, state)
    registry = build_registry({"toys": toys})
    with pytest.raises(CheckpointError, match=r"m\.experts\.1\.down_proj") as caught:
        plan(tmp_path, registry=registry)
    assert caught.value.code == "QP-ST-MISSING"


def test_a_projection_of_another_size_is_refused(tmp_path):
    """Which one, and what the others are."""
    generator = torch.Generator().manual_seed(2)
    experts = [random_expert(generator, gated=True) for _ in range(EXPERTS)]
    experts[2][0][1] = TOY.quantize(torch.randn(INNER + 4, HIDDEN, generator=generator))
    experts[2][1][1] = torch.zeros(INNER + 4)
    write(tmp_path, tensors_of(PER_EXPERT, experts))
    with pytest.raises(
        CheckpointError, match=rf"m\.experts\.2\.up_proj.*{INNER + 4} x {HIDDEN}.*expected {INNER} x"
    ) as e:
        plan(tmp_path, registry=family(PER_EXPERT))
    assert e.value.code == "QP-ST-SHAPE"


def test_a_function_that_nobody_knows_is_refused(tmp_path):
    """It would be run as another one."""
    generator = torch.Generator().manual_seed(2)
    write(
        tmp_path,
        tensors_of(PER_EXPERT, [random_expert(generator, gated=True) for _ in range(EXPERTS)]),
        hidden_act="xielu",
    )
    with pytest.raises(ConfigError, match=r"hidden_act.*'xielu'") as caught:
        plan(tmp_path, registry=build_registry({"toys": toys}))
    assert caught.value.code == "QP-CFG-FIELD"
