"""
How a scheme's parameters spell the permission to quantize activations: one text, the same for every format.

`int8/token/dynamic`, `float8_e4m3fn/tensor/static`, `float8_e4m3fn/group128/dynamic`. Where dynamic scales are rounded,
their dtype stands behind it: `float8_e4m3fn/group32/dynamic/float8_e8m0fnu` (MX); `+global` where a stored factor
multiplies them: `float4_e2m1fn/group16/dynamic/float8_e4m3fn+global` (NVFP4).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, cast

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json
from quantplug.spec import ActivationSpec, ElementType

if TYPE_CHECKING:
    from quantplug.jsonio import Json

SCALE_DTYPES = ("float8_e8m0fnu", "float8_e4m3fn")
"""What dynamic scales may be rounded to."""

_FORM = re.compile(
    r"(?P<element>[a-z0-9_]+)/(?P<shared>tensor|token|group(?P<size>[1-9][0-9]{0,6}))/(?P<when>dynamic|static)"
    rf"(?:/(?P<scale>{'|'.join(SCALE_DTYPES)})(?P<factor>\+global)?)?"
)
_ELEMENTS = frozenset(element.value for element in ElementType)
_EXAMPLES = "none, or a text such as 'int8/token/dynamic', 'float8_e4m3fn/group128/dynamic'"


def spell_activation(spec: ActivationSpec | None) -> str:
    """Return the text that `read_activation` reads; "none" for no permission."""
    if spec is None:
        return "none"
    shared = f"group{spec.group_size}" if spec.granularity == "group" else spec.granularity
    parts = [spec.element.value, shared, "dynamic" if spec.dynamic else "static"]
    if spec.scale_dtype != "float32":
        parts.append(spec.scale_dtype + ("+global" if spec.global_scale else ""))
    return "/".join(parts)


def read_activation(value: Json, where: str) -> ActivationSpec | None:
    """
    Read the parameter `activation` of a scheme.

    Raises:
        ConfigError: `QP-CFG-FIELD` when it has another form, or names a type that activations are not quantized to.
    """
    if value is None or value == "none":
        return None
    found = _FORM.fullmatch(value) if isinstance(value, str) else None
    if found is None or found["element"] not in _ELEMENTS:
        raise ConfigError("QP-CFG-FIELD", where, f"is {describe_json(value)}", expected=_EXAMPLES)
    shared = found["shared"].rstrip("0123456789")
    return ActivationSpec(
        ElementType(found["element"]),
        cast("Literal['tensor', 'token', 'group']", shared),
        dynamic=found["when"] == "dynamic",
        group_size=int(found["size"] or 0),
        scale_dtype=found["scale"] or "float32",
        global_scale=found["factor"] is not None,
    )
