r"""
auto-round's expressions match more than was meant: `.*mlp\.gate.*` also covers `mlp.gate_proj`, which it did quantize.

It covers the name `mlp.gate_up_proj`, too, by which hosts call the fused layer, and so speaks for both its shards; an
expression such as `.*mlp\.gate(_proj)?` speaks for one of them only.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from quantplug.errors import ConfigError
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.load import load_layers
from quantplug.planner import plan
from quantplug.plugins import registry

SHARDS = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
ROUTER = "model.layers.0.mlp.gate"
FIELDS = {"bits": 4, "group_size": 32, "sym": True}
OVERRULED = {r".*mlp\.gate.*": SHARDS, r".*mlp\.gate(_proj)?$": SHARDS[:1]}
"""Expressions for the router, and the quantized layers they say are whole where those are fused."""
CASES = [(method, expression) for method in ("auto-round", "gptq") for expression in OVERRULED]


def section(method: str, expression: str) -> dict[str, object]:
    """Return a configuration in which the expression leaves layers whole."""
    if method == "gptq":
        return {"quant_method": "gptq", **FIELDS, "desc_act": False, "dynamic": {f"-:{expression}": {}}}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        **FIELDS,
        "block_name_to_quantize": "model.layers",
        "extra_config": {"model.layers.0.self_attn.q_proj": {"bits": 8}, expression: {"bits": 16}},
    }


FUSED = Inventory(
    (
        ModuleInfo("model.layers.0.mlp.gate_up_proj", "linear", shards=SHARDS),
        ModuleInfo(ROUTER, "linear"),
    )
)


@pytest.fixture
def checkpoint(tmp_path):
    """Return a function that writes the router dense and both projections quantized, as auto-round does."""
    scheme = registry().schemes["gptq"].item.build({**FIELDS, "checkpoint_format": "gptq"}, "test")
    generator = torch.Generator().manual_seed(6)
    weights = {path: scheme.quantize(torch.randn(32, 64, generator=generator) * 0.02) for path in SHARDS}
    tensors = {f"{path}.{suffix}": t for path, w in weights.items() for suffix, t in scheme.encode(w).items()}
    tensors[f"{ROUTER}.weight"] = torch.randn(8, 64, generator=generator).half()

    def write(method: str, expression: str):
        save_file(tensors, tmp_path / "model.safetensors")
        config = {"model_type": "llama", "dtype": "float32", "quantization_config": section(method, expression)}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path, weights

    return write


@pytest.mark.parametrize(("method", "expression"), CASES)
def test_a_host_that_fuses_the_projections_runs_what_is_stored(method, expression, checkpoint):
    """The tensors of both shards are there, whether the rules agree about them or not, and the plan says so."""
    directory, weights = checkpoint(method, expression)
    planned = plan(directory, platform="cpu", inventory=FUSED)
    layer = planned.layer("model.layers.0.mlp.gate_up_proj")
    assert {segment.scheme.name for segment in layer.segments} == {"gptq"}
    assert {dict(segment.scheme.params)["bits"] for segment in layer.segments} == {4}
    assert len(layer.notes) == len(OVERRULED[expression])
    for note, shard in zip(layer.notes, OVERRULED[expression], strict=True):
        assert f"keeps it whole, but {shard} is stored quantized" in note
    assert not planned.layer(ROUTER).quantized
    loaded = load_layers(planned, directory).modules[layer.path]
    assert torch.equal(loaded.dequantize(), torch.cat([weights[path].dequantize() for path in SHARDS]))


@pytest.mark.parametrize(("method", "expression"), CASES)
def test_strict_mode_makes_it_an_error(method, expression, checkpoint):
    directory, _ = checkpoint(method, expression)
    with pytest.raises(ConfigError, match="gate_proj is stored quantized") as caught:
        plan(directory, platform="cpu", inventory=FUSED, strict=True)
    assert caught.value.code == "QP-SKIP-EVIDENCE"


@pytest.mark.parametrize(("method", "expression"), CASES)
def test_a_host_that_does_not_fuse_gets_the_same(method, expression, checkpoint):
    """And the scheme of the blocks, not that of another layer's own rule."""
    directory, weights = checkpoint(method, expression)
    single = Inventory(tuple(ModuleInfo(path, "linear") for path in (*SHARDS, ROUTER)))
    planned = plan(directory, platform="cpu", inventory=single)
    loaded = load_layers(planned, directory).modules
    for path in SHARDS:
        assert torch.equal(loaded[path].dequantize(), weights[path].dequantize())
    assert len(planned.layer(SHARDS[0]).notes) == 1
    assert planned.layer(SHARDS[1]).notes == ()
