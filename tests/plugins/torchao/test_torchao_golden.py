"""
What torchao wrote: every configuration that is read, and layers of real models, from planning to values and back.
"""

from __future__ import annotations

import pytest
import torch
from torchao_files import CASES, REFERENCE, WITNESS, section, tensor, tensors, write

import quantplug
from quantplug.load import load_layers
from quantplug.writeback import stored_tensors

SCHEMES = {
    "int8": "torchao int8 per channel sym",
    "int8-tensor": "torchao int8 per tensor sym",
    "int8-group": "torchao int8 group 32 sym",
    "int8-dynamic": "torchao int8 per channel sym, x int8 per token, dynamic",
    "int8-dynamic-tensor": "torchao int8 per tensor sym, x int8 per tensor, dynamic",
    "int8-dynamic-tensor-row": "torchao int8 per channel sym, x int8 per tensor, dynamic",
    "int8-dynamic-asym": "torchao int8 per channel sym, x uint8 per token, dynamic",
    "int8-dynamic-reduced": "torchao int8 per channel sym",
    **{f"int{bits}-group": f"torchao int{bits} group 32 sym" for bits in range(1, 8)},
    **{f"int{bits}-axis-asym": f"torchao int{bits} per channel asym" for bits in (1, 2, 3, 4, 6, 8)},
    "int4-group-asym": "torchao int4 group 32 asym",
    "int4-no-clipping": "torchao int4 per channel sym",
    "int4-hqq": "torchao int4 group 32 sym",
    "int4-float32-scales": "torchao int4 group 32 sym",
    "int4-dynamic": "torchao int4 group 32 sym, x uint8 per token, dynamic",
    "int4-dynamic-asym": "torchao int4 group 32 asym, x uint8 per token, dynamic",
    "int8-intx-dynamic": "torchao int8 per channel sym, x uint8 per token, dynamic",
    "float8": "torchao float8_e4m3fn per channel",
    "float8-e5m2": "torchao float8_e5m2 per channel",
    "float8-tensor": "torchao float8_e4m3fn per tensor",
    "float8-group": "torchao float8_e4m3fn group 32",
    "float8-dynamic": "torchao float8_e4m3fn per tensor, x float8_e4m3fn per tensor, dynamic",
    "float8-dynamic-row": "torchao float8_e4m3fn per channel, x float8_e4m3fn per token, dynamic",
    "float8-dynamic-bounded": "torchao float8_e4m3fn per channel",
    "float8-dynamic-block": "torchao float8_e4m3fn block 128x128, x float8_e4m3fn group 128, dynamic",
}
REAL = {
    "ao-int8wo": "torchao int8 per channel sym",
    "ao-int8wo-g64": "torchao int8 group 64 sym",
    "ao-int8dyn": "torchao int8 per channel sym, x int8 per token, dynamic",
    "ao-int4wo-intx-g32": "torchao int4 group 32 sym",
    "ao-int8dyn-int4-g32": "torchao int4 group 32 sym, x uint8 per token, dynamic",
    "ao-float8wo": "torchao float8_e4m3fn per channel",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*slow reference kernel")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def loaded(directory, path, scheme):
    """Plan and load one layer, and check that its stored bytes come back, also from what is in memory."""
    plan = quantplug.plan(directory, policy=REFERENCE)
    layer = plan.layer(path)
    assert layer.scheme == scheme
    assert not layer.notes
    modules = load_layers(plan, directory).modules
    stored = dict(stored_tensors(modules))
    assert {name for _, name in layer.segments[0].tensors} == stored.keys()
    for name, again in modules[path].encode().items():
        assert same(again, stored[name])
    return modules[path]


def test_every_case_is_here():
    assert SCHEMES.keys() == CASES.keys()
    assert REAL.keys() == WITNESS["cases"].keys()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_configuration_means_what_torchao_computes(name, tmp_path):
    """To the bit: in bfloat16, and in float32 where torchao's class dequantizes to that."""
    case = CASES[name]
    stored = tensors(case)
    directory = write(tmp_path, stored, case["metadata"], section(case))
    module = loaded(directory, "layer", SCHEMES[name])
    values = module.dequantize(torch.float32)
    assert torch.equal(values.to(torch.bfloat16), tensor(case["dequantized"]["bfloat16"]))
    if case["dequantized"]["float32"] is not None:
        assert torch.equal(values, tensor(case["dequantized"]["float32"]))


@pytest.mark.parametrize("name", REAL)
def test_layers_of_a_real_model_dequantize_to_what_torchao_says(name, tmp_path):
    """The first rows of a layer, with the configuration and the description that Transformers wrote."""
    case = WITNESS["cases"][name]
    (label,) = case["metadata"]
    path = label.removesuffix(".weight")
    directory = write(tmp_path, tensors(case), case["metadata"], case["quantization_config"])
    module = loaded(directory, path, REAL[name])
    assert torch.equal(module.dequantize(torch.float32).to(torch.bfloat16), tensor(case["dequantized"]))


def test_a_file_without_descriptions_is_read_by_its_configuration(tmp_path):
    case = CASES["int4-group-asym"]
    module = loaded(write(tmp_path, tensors(case), {}, section(case)), "layer", SCHEMES["int4-group-asym"])
    assert torch.equal(module.dequantize(torch.bfloat16), tensor(case["dequantized"]["bfloat16"]))


def test_symmetric_zero_points_may_be_left_out(tmp_path):
    """They are an optional part of an Int8Tensor; what is read back has none either."""
    case = CASES["int8-group"]
    stored = tensors(case)
    del stored["layer._weight_zero_point"]
    metadata = {"layer.weight": case["metadata"]["layer.weight"].replace('"zero_point", ', "")}
    module = loaded(write(tmp_path, stored, metadata, section(case)), "layer", SCHEMES["int8-group"])
    assert torch.equal(module.dequantize(torch.float32), tensor(case["dequantized"]["float32"]))
