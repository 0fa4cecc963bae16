"""
From schemes to the section of a configuration that compressed-tensors' readers understand.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quantplug.activations import read_activation
from quantplug.errors import ConfigError
from quantplug.jsonio import describe_json
from quantplug.skip import SchemeRef
from quantplug.spec import ElementType
from quantplug_compressed_tensors.formats import FLOAT, INT, MIXED, MXFP4, MXFP8, NAIVE, NVFP4, PACK
from quantplug_compressed_tensors.targets import LINEAR

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from quantplug.jsonio import Json

_SHARED: dict[str, Json] = {
    "strategy": "channel", "group_size": -1, "block_n": 128, "block_k": 128, "symmetric": True, "activation": "none",
    "actorder": "none", "scale_name": "weight_scale",
}  # fmt: skip
DESCRIBED: dict[str, dict[str, Json]] = {
    "ct-pack": {**_SHARED, "grid": "minmax", "scale_dtype": "bfloat16"},
    "int8": {**_SHARED, "bits": 8},
    "fp8": {**_SHARED, "element": "float8_e4m3fn"},
    "mxfp8": {"activation": "none", "scale_name": "weight_scale"},
    "mxfp4": {"activation": "none", "scale_name": "weight_scale", "weight_name": "weight_packed"},
    "nvfp4": {
        "activation": "none", "scale_name": "weight_scale", "weight_name": "weight_packed",
        "global_name": "weight_global_scale", "input_global_name": "input_global_scale",
    },
}  # fmt: skip
"""Schemes that can be described, with the defaults of their parameters."""
_FREE = frozenset({
    "bits", "strategy", "group_size", "block_n", "block_k", "symmetric", "activation", "actorder", "grid",
    "scale_dtype",
})  # fmt: skip
"""Parameters that have words, or that say only how dense weights were quantized; others must be the defaults."""
_UNSPOKEN = frozenset({ElementType.FLOAT8_E5M2, ElementType.FLOAT8_E4M3FNUZ, ElementType.FLOAT8_E5M2FNUZ})
_MX_SCALES, _NV_SCALES = "torch.uint8", "torch.float8_e4m3fn"


def describe(base: SchemeRef, layers: Mapping[str, SchemeRef], dense: Collection[str]) -> dict[str, Json]:
    """
    Return the section of a checkpoint.

    Args:
        base: scheme of most layers, described for the class "Linear".
        layers: checkpoint path of every quantized layer -> its scheme.
        dense: checkpoint paths of linear layers that stayed whole.

    Raises:
        ConfigError: `QP-CFG-FIELD` for parameters that this spelling has no words for.
    """
    endings = _endings((*layers, *dense))
    common = _operands(base)
    groups: list[tuple[dict[str, Json], list[Json]]] = [(common, [LINEAR])]
    for path, ref in layers.items():
        operands = _operands(ref)
        if operands == common:
            continue
        targets = next((targets for known, targets in groups if known == operands), None)
        if targets is None:
            targets = []
            groups.append((operands, targets))
        targets.append(_exactly(path, endings))
    forms = {str(operands["format"]) for operands, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": targets, **operands} for number, (operands, targets) in enumerate(groups)
        },
        "ignore": [_exactly(path, endings) for path in dense],
    }


def _operands(ref: SchemeRef) -> dict[str, Json]:
    """Return what a group says besides its targets."""
    params = dict(ref.params)
    for key, value in params.items():
        default = DESCRIBED[ref.name].get(key)
        if key not in _FREE and value != default:
            raise ConfigError(
                "QP-CFG-FIELD",
                f"{ref.name}: {key}",
                f"{key} is {describe_json(value)}, for which a compressed-tensors configuration has no words",
                expected=describe_json(default),
            )
    inputs = _inputs(params.get("activation"), f"{ref.name}: activation")
    weights: dict[str, Json] = {"symmetric": params.get("symmetric", True), "dynamic": False}
    if ref.name in ("ct-pack", "int8"):
        form = PACK if ref.name == "ct-pack" else INT
        weights |= {"num_bits": params.get("bits", 8), "type": "int", **_sharing(params)}
        if params.get("actorder", "none") != "none":
            weights["actorder"] = params["actorder"]
    elif ref.name == "fp8":
        form = NAIVE if inputs is None else FLOAT
        weights |= {"num_bits": 8, "type": "float", **_sharing(params)}
    elif ref.name == "nvfp4":
        form = NVFP4
        weights |= {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": _NV_SCALES,
        }  # fmt: skip
    else:
        form = MXFP4 if ref.name == "mxfp4" else MXFP8
        weights |= {
            "num_bits": 4 if form == MXFP4 else 8, "type": "float", "strategy": "group", "group_size": 32,
            "scale_dtype": _MX_SCALES,
        }  # fmt: skip
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": form}


def _sharing(params: Mapping[str, Json]) -> dict[str, Json]:
    """Return which weights share a scale."""
    size = params.get("group_size", -1)
    strategy = params.get("strategy", "channel" if size == -1 else "group")
    shared: dict[str, Json] = {"strategy": strategy, "group_size": size if strategy == "group" else None}
    if strategy == "block":
        shared["block_structure"] = [params.get("block_n", 128), params.get("block_k", 128)]
    return shared


def _inputs(value: Json, where: str) -> dict[str, Json] | None:
    """Return the arguments of activations, None where they stay as they are."""
    spec = read_activation(value, where)
    if spec is None:
        return None
    if spec.element in _UNSPOKEN:
        raise ConfigError(
            "QP-CFG-FIELD",
            where,
            f"{spec.element} is a type for which a compressed-tensors configuration has no words",
            expected="integers, float8_e4m3fn or float4_e2m1fn",
        )
    said: dict[str, Json] = {
        "num_bits": spec.element.bits,
        "type": "float" if spec.element.floating else "int",
        "symmetric": spec.element.signed,
        "strategy": "tensor_group" if spec.global_scale else spec.granularity,
        "group_size": spec.group_size or None,
        "dynamic": "local" if spec.global_scale else spec.dynamic,
    }
    if spec.scale_dtype != "float32":
        said["scale_dtype"] = _NV_SCALES if spec.global_scale else _MX_SCALES
    return said


def _endings(paths: Iterable[str]) -> frozenset[str]:
    """Return the last components of all paths, in every number but the whole."""
    found = set()
    for path in paths:
        parts = path.split(".")
        found |= {".".join(parts[start:]) for start in range(1, len(parts))}
    return frozenset(found)


def _exactly(path: str, endings: Collection[str]) -> str:
    """Return a target for one layer: its name, or an expression where the name would be read as more than that."""
    if path in endings or ("." not in path and path[:1].isupper()):
        return f"re:^{re.escape(path)}$"
    return path
