"""
What each `quant_algo` of ModelOpt stores, as the scheme that decodes it, or why it is refused.

The names and layouts are those of ModelOpt's unified Hugging Face export (`modelopt.torch.export`: `quant_utils.py`,
`unified_export_hf.py`, `convert_hf_config.py`). Schemes are named, never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json
from quantplug.skip import SchemeRef

if TYPE_CHECKING:
    from quantplug.jsonio import Json

MIXED = "MIXED_PRECISION"
"""The algorithm of a file whose layers differ; `quantized_layers` lists them."""

_STATIC = "float8_e4m3fn/tensor/static"
_DYNAMIC = "float8_e4m3fn/tensor/dynamic"
_NVFP4_ACTIVATION = "float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"
_MXFP8_ACTIVATION = "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"


@dataclass(frozen=True, slots=True)
class Algorithm:
    """
    One `quant_algo` whose tensors are read.

    Attributes:
        scheme: what decodes a layer.
        bits: width of a weight's code, as `config_groups` states it.
        kind: "float" or "int", likewise.
        group_size: inputs per scale where the format fixes it, else 0 (the field is then absent or 0).
    """

    scheme: SchemeRef
    bits: int
    kind: str
    group_size: int = 0

    @property
    def activations(self) -> bool:
        """Whether activations are quantized, too."""
        return dict(self.scheme.params).get("activation", "none") != "none"


def _scheme(name: str, **params: Json) -> SchemeRef:
    return SchemeRef(name, tuple(sorted(params.items())))


def _nvfp4(activation: str) -> Algorithm:
    # Packed along K, the lower nibble first; the global scale multiplies, and so does that of the input.
    scheme = _scheme(
        "nvfp4", weight_name="weight", scale_name="weight_scale", global_name="weight_scale_2",
        input_global_name="input_scale", activation=activation,
    )  # fmt: skip
    return Algorithm(scheme, 4, "float", 16)


def _mxfp4(activation: str) -> Algorithm:
    scheme = _scheme("mxfp4", weight_name="weight", scale_name="weight_scale", activation=activation)
    return Algorithm(scheme, 4, "float", 32)


ALGORITHMS = {
    "FP8": Algorithm(_scheme("fp8", strategy="tensor", activation=_STATIC), 8, "float"),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm(
        _scheme("fp8", strategy="channel", activation="float8_e4m3fn/token/dynamic"), 8, "float"
    ),
    "FP8_PB_WO": Algorithm(_scheme("fp8", strategy="block", block_n=128, block_k=128, activation="none"), 8, "float"),
    "NVFP4": _nvfp4(_NVFP4_ACTIVATION),
    "W4A16_NVFP4": _nvfp4("none"),
    "W4A8_NVFP4_FP8": _nvfp4(_STATIC),
    "W4A8_MXFP4_FP8": _mxfp4(_DYNAMIC),  # ModelOpt 0.47 calibrates nothing here, and stores no input_scale
    "MXFP4": _mxfp4("none"),
    "MXFP8": Algorithm(_scheme("mxfp8", scale_name="weight_scale", activation=_MXFP8_ACTIVATION), 8, "float", 32),
    # Plain INT8 goes by SmoothQuant's name; in a file that stores a pre_quant_scale, nobody claims that tensor.
    "W8A8_SQ_PER_CHANNEL": Algorithm(_scheme("int8", strategy="channel", activation="int8/tensor/static"), 8, "int"),
    "W8A16": Algorithm(_scheme("int8", strategy="channel", activation="none"), 8, "int"),
}
"""By name in upper case (ModelOpt writes some in lower case)."""

_PRESCALED = "the inputs of some layers are first multiplied by a stored pre_quant_scale, which no scheme here applies"
_PACKED_ALONG_N = "two rows of the weight share a byte, and " + _PRESCALED
_REFUSED = {
    "W4A16_AWQ": _PACKED_ALONG_N,
    "INT4_AWQ": _PACKED_ALONG_N,
    "W4A8_AWQ": _PACKED_ALONG_N + "; codes are rounded to FP8 in between",
    "NVFP4_AWQ": _PRESCALED,
    "INT8_SQ": _PRESCALED,
    "NVFP4_SVD": "a low-rank product of the inputs is added, and " + _PRESCALED,
    "FP8_PB_REAL": "whether activations are quantized, and in which blocks, is not stated anywhere",
    "FP8_BLOCK_SCALES": "some tools write its scales as weight_scale, others as weight_scale_inv",
}
"""Algorithms that are recognised and not read, with the reason."""

_FIX = "Use a copy of the model in another format, or convert the dense model (quantplug convert)."


def algorithm(name: Json, where: str) -> Algorithm:
    """
    Return what a `quant_algo` other than `MIXED_PRECISION` stores.

    Args:
        name: as the file spells it.
        where: where it stands.

    Raises:
        ConfigError: `QP-CFG-FIELD` when it is no text, `QP-CFG-REFUSED` with the reason when it is known and not read,
            `QP-CFG-UNKNOWN` when it is not known.
    """
    expected = f"one of {', '.join(sorted(ALGORITHMS))} or {MIXED}"
    if not isinstance(name, str):
        raise ConfigError("QP-CFG-FIELD", where, f"quant_algo is {describe_json(name)}", expected=expected)
    found = ALGORITHMS.get(name.upper())
    if found is not None:
        return found
    reason = _REFUSED.get(name.upper())
    if reason is None:
        raise ConfigError(
            "QP-CFG-UNKNOWN", where, f"quant_algo {name!r} is not a known algorithm", expected=expected, fix=_FIX
        )
    raise ConfigError("QP-CFG-REFUSED", where, f"quant_algo {name!r}: {reason}", expected=expected, fix=_FIX)
