"""
Transformers as a witness that is at hand: its modules' names, its rounding, its dequantized weights, its configuration.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fp8_checkpoints import LINEAR, REGISTRY, tensors_of, write

from quantplug.config import RawConfig
from quantplug.inventory import ModuleInfo
from quantplug.load import load_layers
from quantplug.matcher import Matcher
from quantplug.planner import plan
from quantplug_fp8.dialect import FP8Dialect
from quantplug_fp8.fbgemm import FbgemmDialect

witness = pytest.importorskip("transformers.integrations.finegrained_fp8")
configurations = pytest.importorskip("transformers.utils.quantization_config")
LISTS = pytest.importorskip("transformers.quantizers.quantizers_utils")


def quantized_by_it(config, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors of a tiny model as Transformers rounds them, and its own dequantized weights, float32."""
    tool = SimpleNamespace(quantization_config=config)
    tensors, values = {}, {}
    for name, (n, k) in LINEAR.items():
        path = f"model.layers.0.{name}"
        dense = torch.randn(n, k, generator=generator)
        stored = witness.Fp8Quantize(tool).convert({f"{path}.weight": dense})
        weight, scales = stored[f"{path}.weight"], stored[f"{path}.weight_scale_inv"]
        values[path] = witness.Fp8Dequantize(tool)._dequantize_one(weight, scales, torch.float32)
        tensors |= stored
    return tensors, values


@pytest.mark.parametrize(
    ("block", "scale_fmt"), [((8, 8), "float"), ((4, 8), "ue8m0"), ((8, 4), "float"), (None, "float")]
)
def test_what_it_writes_is_read_as_it_reads_it(tmp_path, block, scale_fmt):
    """Blocks that it can write (whole ones), and one scale per tensor; float32 and power-of-two scales."""
    config = configurations.FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    tensors, values = quantized_by_it(config, torch.Generator().manual_seed(11))
    section = {key: list(value) if isinstance(value, tuple) else value for key, value in config.to_dict().items()}
    directory = write(tmp_path, tensors_of({}) | tensors, **section)
    made = plan(directory, platform="cpu", registry=REGISTRY, strict=True)
    modules = load_layers(made, directory, registry=REGISTRY).modules
    assert modules.keys() == values.keys()
    assert all(torch.equal(modules[path].dequantize(), values[path]) for path in values)
    assert not any("quantization_config" in warning for warning in made.warnings)


@pytest.mark.parametrize("block", [None, (16, 16)])
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_its_modules_have_the_tensors_that_the_format_declares(block, scheme):
    """Names, shapes and dtypes of `FP8Linear`, blocks cut off at both edges."""
    module = witness.FP8Linear(40, 24, block, scheme)
    section = {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": block and list(block)}
    use = FP8Dialect().parse(RawConfig("fp8", section, {}, {})).default
    format_ = REGISTRY.scheme("fp8").item.build(dict(use.params), "test")
    held = {name: tensor for name, tensor in module.state_dict().items() if name != "bias"}
    shape = format_.shape_of({name: tuple(tensor.shape) for name, tensor in held.items()}, "layer")
    declared = {spec.suffix: spec for spec in format_.params(shape)}
    for name, tensor in held.items():
        assert tuple(tensor.shape) in (declared[name].shape, *declared[name].other_shapes)
        assert str(tensor.dtype).removeprefix("torch.") in declared[name].dtypes
    assert ("activation_scale" in held) == (scheme == "static")


@pytest.mark.parametrize("dialect", [FP8Dialect(), FbgemmDialect()], ids=lambda dialect: dialect.name)
def test_its_defaults_are_understood(dialect):
    """Every key that its configurations have, without a note but about the bound of FBGEMM."""
    kinds = {"fp8": configurations.FineGrainedFP8Config, "fbgemm_fp8": configurations.FbgemmFp8Config}
    section = kinds[dialect.name]().to_dict()
    section = {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
    config = dialect.parse(RawConfig(dialect.name, section, {}, {}))
    assert len(config.notes) == (dialect.name == "fbgemm_fp8")


@pytest.mark.parametrize(
    "listed", [["mlp.gate"], ["model.layers.1"], ["lm_head", "self_attn"], ["model.layers.0.mlp.down_proj"], ["layers"]]
)
def test_its_lists_mean_the_same(listed):
    """The layers that it keeps whole are those kept whole here, for paths, their parts and their ends."""
    paths = [
        f"model.layers.{number}.{name}"
        for number in (0, 1, 10)
        for name in (*LINEAR, "mlp.gate", "mlp.gate_up_proj", "self_attn.o_proj")
    ]
    config = FP8Dialect().parse(RawConfig("fp8", {"quant_method": "fp8", "modules_to_not_convert": listed}, {}, {}))
    matcher = Matcher(config.rules, config.default)
    ours = {path for path in paths if matcher.decide(ModuleInfo(path, "linear")).use is None}
    theirs = {path for path in paths if not LISTS.should_convert_module(path, listed)}
    assert theirs <= ours
    # A part of a path in its middle is a part here, and nothing there.
    assert ours - theirs == {path for path in paths if listed != ["model.layers.1"] and _in_the_middle(path, listed)}


def _in_the_middle(path: str, listed: list[str]) -> bool:
    return any(f".{text}." in path and not path.startswith(f"{text}.") for text in listed)
