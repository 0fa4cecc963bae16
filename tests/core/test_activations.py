"""The one text in which schemes spell a permission to quantize activations."""

from __future__ import annotations

import pytest

from quantplug.activations import read_activation, spell_activation
from quantplug.errors import ConfigError
from quantplug.spec import ActivationSpec, ElementType

SPECS = {
    "none": None,
    "int8/token/dynamic": ActivationSpec(ElementType.INT8, "token", True),
    "uint8/tensor/static": ActivationSpec(ElementType.UINT8, "tensor", False),
    "float8_e4m3fn/group128/dynamic": ActivationSpec(ElementType.FLOAT8_E4M3FN, "group", True, 128),
    "float8_e4m3fn/group32/dynamic/float8_e8m0fnu": ActivationSpec(
        ElementType.FLOAT8_E4M3FN, "group", True, 32, "float8_e8m0fnu"
    ),
    "float4_e2m1fn/group16/dynamic/float8_e4m3fn+global": ActivationSpec(
        ElementType.FLOAT4_E2M1FN, "group", True, 16, "float8_e4m3fn", True
    ),
}


@pytest.mark.parametrize("text", SPECS)
def test_every_text_says_one_thing_and_is_spelled_so_again(text):
    spec = read_activation(text, "activation")
    assert spec == SPECS[text]
    assert spell_activation(spec) == text


@pytest.mark.parametrize("value", [
    "int8", "int8/token", "int9/token/dynamic", "int8/group0/dynamic", 8, True, "int8/row/static", ["int8"],
    "int8/token/dynamic ", "int8/token/dynamic/float16",
])  # fmt: skip
def test_what_has_another_form_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="activation") as raised:
        read_activation(value, "gptq: activation")
    assert raised.value.code == "QP-CFG-FIELD"
