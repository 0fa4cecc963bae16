"""
`__metadata__` against configuration and tensors: classes that are refused, and every way in which the two can disagree.
"""

from __future__ import annotations

import json

import pytest
import torch
from torchao_files import CASES, REFERENCE, build, section, tensors, write

import quantplug
from quantplug.errors import ConfigError
from quantplug_torchao.refusals import TENSOR_CLASSES

PLACE = "layer.weight: __metadata__"


def described(case, **changes):
    """Return the description of a golden weight with some of it changed."""
    text = json.loads(CASES[case]["metadata"]["layer.weight"])
    data = changes.pop("data", {})
    text |= {f"_{key}": value for key, value in changes.items()}
    text["_data"] |= data
    return json.dumps(text)


def refused(directory, case, metadata, code, text, stored=None):
    """Plan a golden checkpoint whose header says something else."""
    write(directory, stored or tensors(CASES[case]), metadata, section(CASES[case]))
    with pytest.raises(ConfigError) as caught:
        quantplug.plan(directory, policy=REFERENCE)
    assert caught.value.code == code, caught.value
    assert text in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", [*TENSOR_CLASSES, "subprocess.Popen", ""])
def test_a_class_that_is_not_read_is_refused_by_name(name, tmp_path):
    text = f"is of class {name}: {TENSOR_CLASSES.get(name, 'not a class that this reader knows')}"
    error = refused(tmp_path, "int8", {"layer.weight": described("int8", type=name)}, "QP-CFG-REFUSED", text)
    assert error.where == PLACE
    assert error.expected == "Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor or Tensor"


DTYPE = "torch.dtype"
CONTRADICTIONS = {
    "another class": (
        "int8", described("float8", tensor_data_names=["qdata", "scale", "zero_point"]),
        "says class Float8Tensor; expected Int8Tensor or IntxUnpackedToInt8Tensor for torchao int8 per channel sym",
    ),
    "integers that are floats": (
        "float8", described("int8", tensor_data_names=["qdata", "scale"]),
        "says class Int8Tensor; expected Float8Tensor for torchao float8_e4m3fn per channel",
    ),
    "bytes that are four bits": (
        "int4-group", described("int8-group"), "says class Int8Tensor; expected IntxUnpackedToInt8Tensor",
    ),
    "other bits": (
        "int4-group", described("int3-group"), "says codes of type 'int3'; expected int4 as in the configuration",
    ),
    "no bits": ("int4-group", described("int4-group", data={"target_dtype": None}), "says codes of type None"),
    "other groups": (
        "int4-group", described("int4-group", data={"block_size": [1, 64]}),
        "says block_size [1, 64]; expected [1, 32] as in the configuration, for codes [16, 64]",
    ),
    "rows, not groups": ("int8-group", described("int8"), "says block_size [1, 64]; expected [1, 32]"),
    "the tensor, not rows": ("int8", described("int8-tensor"), "says block_size [16, 64]; expected [1, 64]"),
    "rows, not the tensor": ("int8-tensor", described("int8"), "says block_size [1, 64]; expected [16, 64]"),
    "no block": ("int8", described("int8", data={"block_size": []}), "says block_size []"),
    "other blocks": (
        "float8-dynamic-block", described("float8-dynamic-block", data={"block_size": [64, 128]}),
        "says block_size [64, 128]; expected [128, 128]",
    ),
    "x left alone": (
        "int8-dynamic", described("int8"),
        "says nothing about x; expected torchao int8 per channel sym, x int8 per token, dynamic as in the config",
    ),
    "x of floats left alone": ("float8-dynamic-row", described("float8"), "says nothing about x"),
    "x of few bits left alone": ("int4-dynamic", described("int4-group"), "says nothing about x"),
    "a part more": (
        "float8", described("float8", tensor_data_names=["qdata", "scale", "zero_point"]),
        "says class Float8Tensor, of _weight_qdata, _weight_scale, _weight_zero_point; expected the tensors that are "
        "stored (_weight_qdata, _weight_scale)",
    ),
    "a part less": (
        "int8", described("int8", tensor_data_names=["qdata", "scale"]), "says class Int8Tensor, of _weight_qdata, _we",
    ),
    "nothing": ("int8", described("int8", tensor_data_names=[]), "says class Int8Tensor, of nothing"),
    "a weight that stayed whole": (
        "int8", '{"_type": "Tensor"}', "says class Tensor, of weight; expected the tensors that are stored",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_description_that_contradicts_is_an_error(name, tmp_path):
    case, text, message = CONTRADICTIONS[name]
    error = refused(tmp_path, case, {"layer.weight": text}, "QP-CFG-CONTRADICTION", message)
    assert error.where == PLACE


def test_a_dense_weight_that_is_described_as_quantized_is_an_error(tmp_path):
    stored = {"layer.weight": torch.ones(16, 64, dtype=torch.bfloat16)}
    metadata = CASES["int8"]["metadata"]
    text = "expected the tensors that are stored (weight)"
    refused(tmp_path, "int8", metadata, "QP-CFG-CONTRADICTION", text, stored)


def test_a_dense_weight_that_is_described_as_such_stays_whole(tmp_path):
    stored = {"layer.weight": torch.ones(16, 64, dtype=torch.bfloat16)}
    write(tmp_path, stored, {"layer.weight": '{"_type": "Tensor"}'}, section(CASES["int8"]))
    assert not quantplug.plan(tmp_path, policy=REFERENCE).layer("layer").quantized


MALFORMED = {
    "no JSON": ("{", "QP-CFG-JSON", ""),
    "a key twice": ('{"_type": "Tensor", "_type": "Tensor"}', "QP-CFG-DUPLICATE", "_type"),
    "a number": ("3", "QP-CFG-FIELD", "is no JSON object"),
    "no class": ("{}", "QP-CFG-FIELD", "_type is missing"),
    "no attributes": ('{"_type": "Int8Tensor"}', "QP-CFG-FIELD", "_data is missing"),
    "parts of no list": ('{"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": 1}', "QP-CFG-FIELD", "a list of"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_description_that_cannot_be_read_is_an_error(name, tmp_path):
    text, code, message = MALFORMED[name]
    assert refused(tmp_path, "int8", {"layer.weight": text}, code, message).where == PLACE


def test_factors_of_x_are_refused_by_name(tmp_path):
    """SmoothQuant and AWQ of torchao multiply x by a part of the weight, which would be a file of other numbers."""
    stored = tensors(CASES["int8"]) | {"layer._weight_act_pre_scale": torch.ones(64)}
    parts = ["qdata", "scale", "zero_point", "act_pre_scale"]
    metadata = {"layer.weight": described("int8", tensor_data_names=parts)}
    text = "the weight has act_pre_scale besides codes, scales and zero points"
    refused(tmp_path, "int8", metadata, "QP-CFG-REFUSED", text, stored)


def test_a_quantized_bias_is_refused(tmp_path):
    metadata = {**CASES["int8"]["metadata"], "layer.bias": described("int8")}
    refused(tmp_path, "int8", metadata, "QP-CFG-REFUSED", "layer.bias: __metadata__: bias is of class Int8Tensor")


def test_one_scale_for_all_weights_may_be_spelled_without_a_block():
    scheme = build(element="float8_e4m3fn", strategy="tensor")
    stored = {"_weight_qdata": (16, 64), "_weight_scale": (1, 1)}
    for block in ([], None, [16, 64]):
        scheme.check_metadata({"weight": described("float8-tensor", data={"block_size": block})}, stored, "layer")


def test_int8_codes_may_be_of_either_class():
    """A file without zero points of its own kind: both classes store the same bytes."""
    stored = {"_weight_qdata": (16, 64), "_weight_scale": (16, 1), "_weight_zero_point": (16, 1)}
    for case in ("int8", "int8-intx-dynamic"):
        build().check_metadata({"weight": described(case)}, stored, "layer")
