"""
Whole checkpoints through the core: planned, loaded, run, saved; fused layers, scales of the cache, broken files.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fp8_checkpoints import LINEAR, REGISTRY, layers, tensors_of, write

from quantplug.errors import CheckpointError, ConfigError
from quantplug.inventory import Inventory, ModuleInfo
from quantplug.ledger import Ledger
from quantplug.lint import lint
from quantplug.load import load_layers
from quantplug.modules import QuantizedLinear
from quantplug.plan import Plan
from quantplug.planner import plan
from quantplug.schemes import SchemeCache
from quantplug.spec import ActivationSpec, ElementType
from quantplug.writeback import stored_tensors

BLOCK = {"strategy": "block", "block_n": 16, "block_k": 16}
STATIC = "float8_e4m3fn/tensor/static"
# name -> parameters of the stored layers, renamed tensors, configuration
SPELLINGS = {
    "blocks": ({**BLOCK, "scale_name": "weight_scale_inv"}, {}, {"weight_block_size": [16, 16]}),
    "blocks as bfloat16": (
        {**BLOCK, "scale_dtype": torch.bfloat16}, {"weight_scale": "weight_scale_inv"}, {"weight_block_size": [16, 16]},
    ),
    "blocks with powers of two": (
        {**BLOCK, "scale_dtype": torch.float8_e8m0fnu}, {"weight_scale": "weight_scale_inv"},
        {"weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
    ),
    "per tensor as engines have it": (
        {"strategy": "tensor", "scale_shape": (), "activation": STATIC}, {}, {"activation_scheme": "static"},
    ),
    "per tensor as Transformers has it": (
        {"strategy": "tensor", "scale_shape": (1, 1), "activation": STATIC},
        {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"},
        {"activation_scheme": "static", "weight_block_size": None},
    ),
    "e5m2": ({"strategy": "tensor", "element": "float8_e5m2"}, {}, {"fmt": "e5m2"}),
    "e4m3fnuz": ({"strategy": "tensor", "element": "float8_e4m3fnuz"}, {}, {"fmt": "e4m3fnuz"}),
    "rows that are divided": (
        {"strategy": "channel", "inverse": True, "scale_name": "weight_scale_inv", "scale_shape": (-1,)}, {},
        {"weight_scale_method": "row", "weight_scale_semantics": "inverse", "group_size": -1},
    ),
    "blocks that are divided": (
        {**BLOCK, "inverse": True, "scale_name": "weight_scale_inv"}, {},
        {"weight_scale_semantics": "inverse", "weight_block_size": [16, 16], "group_size": -1},
    ),
    "fbgemm": ({"strategy": "channel"}, {}, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
}  # fmt: skip


def renamed(quantized, names):
    for layer in quantized.values():
        layer.tensors = {names.get(suffix, suffix): tensor for suffix, tensor in layer.tensors.items()}
    return quantized


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_checkpoint_plans_loads_runs_and_is_saved_as_it_was(tmp_path, name):
    """Values are the oracle's, products those of the values, bytes those of the file."""
    params, names, section = SPELLINGS[name]
    quantized = renamed(layers(**params), names)
    tensors = tensors_of(quantized)
    directory = write(tmp_path, tensors, **section)
    made = plan(directory, platform="cpu", registry=REGISTRY, strict=True)
    assert Plan.from_json(made.to_json()) == made
    assert {layer.path for layer in made.layers if layer.quantized} == quantized.keys()
    loaded = load_layers(made, directory, registry=REGISTRY)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for path, layer in quantized.items():
        module = loaded.modules[path]
        assert np.array_equal(module.dequantize().numpy(), layer.values()), path
        if module.in_features == 40:
            assert torch.equal(module(x), torch.nn.functional.linear(x, module.dequantize()))
        if "activation" in params:
            assert float(module.activation[0].scale) == 0.03125
    saved = dict(stored_tensors(loaded.modules))
    assert saved.keys() == {key for key in tensors if key.rpartition(".")[0] in quantized}
    assert all(same_bytes(saved[key], tensors[key]) for key in saved)
    (directory / "model.safetensors").unlink()
    held = dict(stored_tensors(loaded.modules))
    assert held.keys() == saved.keys(), "each scale under the name that the file had"
    assert all(torch.equal(held[key].float().flatten(), saved[key].float().flatten()) for key in held)


def same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (two.dtype, two.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("name", ["blocks", "per tensor as engines have it", "fbgemm"])
def test_parts_of_a_fused_layer_keep_their_own_scales(tmp_path, name):
    """An engine's qkv: blocks are counted from the first row of each part (24 rows are 1.5 blocks), as the files do."""
    params, names, section = SPELLINGS[name]
    quantized = renamed(layers(1, **params), names)
    directory = write(tmp_path, tensors_of(quantized), **section)
    shards = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    fused = ModuleInfo("model.layers.0.self_attn.qkv_proj", "linear", shards=shards)
    alone = [ModuleInfo(path, "linear") for path in quantized if path not in shards]
    others = ("model.embed_tokens", "embedding"), ("model.norm", "other"), ("lm_head", "linear")
    inventory = Inventory((fused, *alone, *(ModuleInfo(*other) for other in others)))
    made = plan(directory, platform="cpu", registry=REGISTRY, inventory=inventory)
    module = load_layers(made, directory, registry=REGISTRY).modules[fused.path]
    assert len(made.layer(fused.path).segments) == 3
    wanted = np.concatenate([quantized[shard].values() for shard in shards])
    assert np.array_equal(module.dequantize().numpy(), wanted)


ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("kv_scale",),
        ("q_scale", "k_scale", "v_scale", "prob_scale"),
    ],
    ids="+".join,
)
def test_scales_of_keys_and_values_are_handed_over_in_every_spelling(tmp_path, names):
    """With what the configuration says about them; they are nobody's layer, and none is left over."""
    scales = {f"{ATTENTION}.{name}": torch.tensor(0.5 + place) for place, name in enumerate(names)}
    params, _, section = SPELLINGS["per tensor as engines have it"]
    directory = write(tmp_path, tensors_of(layers(**params)) | scales, **section, kv_cache_scheme="static")
    made = plan(directory, platform="cpu", registry=REGISTRY, strict=True)
    assert made.kv_cache.spec == ActivationSpec(ElementType.FLOAT8_E4M3FN, "tensor", dynamic=False)
    assert set(made.kv_cache.scales) == scales.keys()
    handed = load_layers(made, directory, registry=REGISTRY).kv_scales
    assert {name: float(scale) for name, scale in handed.items()} == {name: float(s) for name, s in scales.items()}


def test_what_the_tensors_say_prevails_over_lists(tmp_path):
    """A router that nobody listed is stored whole, a head that readers keep whole is stored quantized."""
    quantized = layers(1, strategy="tensor")
    quantized["lm_head"] = layers(1, strategy="tensor")["model.layers.0.self_attn.k_proj"]
    tensors = tensors_of(quantized) | {"model.layers.0.mlp.gate.weight": torch.zeros(4, 40).bfloat16()}
    directory = write(tmp_path, tensors)
    made = plan(directory, platform="cpu", registry=REGISTRY)
    assert not made.layer("model.layers.0.mlp.gate").quantized
    assert made.layer("lm_head").quantized
    assert sum("evidence" in warning for warning in made.warnings) == 2
    with pytest.raises(ConfigError) as caught:
        plan(directory, platform="cpu", registry=REGISTRY, strict=True)
    assert caught.value.code == "QP-SKIP-EVIDENCE"


UP = "model.layers.1.mlp.up_proj"
BROKEN = {
    "a scale is missing": (
        lambda t: t.pop(f"{UP}.weight_scale"), "QP-ST-MISSING", "has no weight_scale or weight_scale_inv",
    ),
    "a scale in two spellings": (
        lambda t: t.update({f"{UP}.weight_scale_inv": torch.ones(1)}), "QP-ST-EXTRA", "stores both",
    ),
    "a scale of x that nothing announces": (
        lambda t: t.update({f"{UP}.input_scale": torch.ones(1)}), "QP-ST-EXTRA", "up_proj.input_scale",
    ),
    "a scale of a layer that is whole": (
        lambda t: t.update({f"{UP}.weight": torch.zeros(72, 40).bfloat16()}), "QP-SKIP-AMBIGUOUS",
        "both a dense weight and weight_scale",
    ),
    "a layer fused in the file": (
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(2)}), "QP-ST-SHAPE", "2 scales for one weight of 72 rows",
    ),
    "blocks that are not announced": (
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(1, 40)}), "QP-ST-SHAPE", "shapes fit",
    ),
    "another element": (
        lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].view(torch.float8_e5m2)}), "QP-ST-DTYPE",
        "dtype float8_e5m2; expected float8_e4m3fn",
    ),
    "scales of the wrong dtype": (
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(1).double()}), "QP-ST-DTYPE", "dtype float64",
    ),
    "a flat weight": (
        lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].flatten()}), "QP-ST-SHAPE", "expected two dimensions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_while_planning_and_a_good_one_read_afterwards(tmp_path, name):
    """From headers alone, before a weight is read."""
    change, code, text = BROKEN[name]
    quantized = layers(strategy="tensor")
    tensors = tensors_of(quantized)
    good = write(tmp_path / "good", tensors)
    change(tensors)
    with pytest.raises((CheckpointError, ConfigError), match=text) as caught:
        plan(write(tmp_path / "bad", tensors), platform="cpu", registry=REGISTRY)
    assert caught.value.code == code
    assert "up_proj" in str(caught.value)
    loaded = load_layers(plan(good, platform="cpu", registry=REGISTRY), good, registry=REGISTRY)
    assert np.array_equal(loaded.modules[UP].dequantize().numpy(), quantized[UP].values())


@pytest.mark.parametrize(
    ("suffix", "byte", "code"),
    [("weight", 0x7F, "QP-ST-CODE"), ("weight", 0xFF, "QP-ST-CODE"), ("weight_scale", 0xFF, "QP-ST-SCALE")],
)
def test_a_damaged_value_is_refused_while_loading_and_nothing_is_installed(tmp_path, suffix, byte, code):
    """The plan is made from headers, so that it stands; the load is all or nothing."""
    tensors = tensors_of(layers(strategy="tensor"))
    tensors[f"{UP}.{suffix}"] = tensors[f"{UP}.{suffix}"].clone()
    tensors[f"{UP}.{suffix}"].view(torch.uint8).flatten()[-4:] = byte
    directory = write(tmp_path, tensors)
    made = plan(directory, platform="cpu", registry=REGISTRY)
    with pytest.raises(CheckpointError, match=rf"up_proj\.{suffix}") as caught:
        load_layers(made, directory, registry=REGISTRY)
    assert caught.value.code == code


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_frameworks_own_loader_may_bring_a_scale_in_any_of_its_shapes(tmp_path, shape):
    """The parameter has one of them."""
    quantized = layers(1, strategy="tensor", scale_shape=shape)
    directory = write(tmp_path, tensors_of(quantized))
    made = plan(directory, platform="cpu", registry=REGISTRY)
    path = "model.layers.0.mlp.down_proj"
    module = QuantizedLinear(made.layer(path), made, REGISTRY, SchemeCache(REGISTRY))
    module.create_weights(Ledger())
    for name, parameter in module.named_parameters():
        parameter.weight_loader(parameter, quantized[path].tensors[name])
    module.process_weights_after_loading()
    assert np.array_equal(module.dequantize().numpy(), quantized[path].values())


@pytest.mark.parametrize("recipe", ["fp8", "fp8-tensor", "fp8-block"])
def test_dense_weights_are_rounded_while_they_are_loaded(tmp_path, recipe):
    """By the name of a recipe, each layer but the head."""
    normal = torch.Generator().manual_seed(3)
    paths = [f"model.layers.0.{name}" for name in LINEAR]
    dense = {f"{path}.weight": torch.randn(*LINEAR[path[15:]], generator=normal).bfloat16() for path in paths}
    directory = write(tmp_path, tensors_of({}) | dense)
    (directory / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    made = plan(directory, platform="cpu", registry=REGISTRY, quantize=recipe)
    loaded = load_layers(made, directory, registry=REGISTRY)
    assert loaded.modules.keys() == set(paths)
    scheme = REGISTRY.scheme("fp8").item.build(REGISTRY.recipe(recipe).item.params, recipe)
    for path in paths:
        wanted = scheme.quantize(dense[f"{path}.weight"])
        assert torch.equal(loaded.modules[path].dequantize(), wanted.dequantize())
        # Half a step of three fraction bits, half the smallest step, and float32's rounding of quotient and product.
        weight = dense[f"{path}.weight"].float()
        error = (wanted.dequantize() - weight).abs()
        assert bool((error <= weight.abs() * (2**-4 + 2**-22) + wanted.scales.max() * 2**-10).all())


def test_lint_does_not_take_scales_that_divide_for_factors(tmp_path):
    """A thousand is large for what multiplies and usual for what divides; 0 is nothing to divide by."""
    quantized = layers(strategy="channel", inverse=True, scale_name="weight_scale_inv")
    for layer in quantized.values():
        layer.tensors["weight_scale_inv"] = torch.full((layer.shape.out_features,), 1000.0)
    section = {"weight_scale_method": "row", "weight_scale_semantics": "inverse", "group_size": -1}
    found = lint(write(tmp_path / "good", tensors_of(quantized), **section), registry=REGISTRY).findings
    assert not [finding for finding in found if finding.code == "QP-LINT-HUGE"]
    first = next(iter(quantized))
    quantized[first].tensors["weight_scale_inv"][3] = 0
    found = lint(write(tmp_path / "bad", tensors_of(quantized), **section), registry=REGISTRY).findings
    assert [finding.where for finding in found if finding.code == "QP-ST-SCALE"] == [f"{first}.weight_scale_inv"]
