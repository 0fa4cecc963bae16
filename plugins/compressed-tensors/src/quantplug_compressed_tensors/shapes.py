"""
What a pack-quantized file stores for one layer: names, shapes and dtypes, and the size that stored shapes stand for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError
from quantplug.spec import LinearShape, ParamSpec, PerChannel, PerGroup, scale_shape
from quantplug_compressed_tensors.parameters import BITS, SCALE_DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.spec import Granularity
    from quantplug_compressed_tensors.scheme import PackScheme

_ONE = ((), (1, 1))
_RANKS = {"weight_packed": 2, "weight_shape": 1, "weight_g_idx": 1}


def word_count(codes: int, bits: int) -> int:
    """Return the int32 words that a row of that many codes takes."""
    return -(-codes * bits // 32)


def scale_shapes(granularity: Granularity, shape: LinearShape) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the shape that scales are stored in, and others that writers use for the same numbers."""
    match granularity:
        case PerChannel():
            return (shape.out_features, 1), ((shape.out_features,),)
        case PerGroup():
            return scale_shape(granularity, shape.out_features, shape.in_features), ()
        case _:
            return (1,), _ONE


def declared(scheme: PackScheme, shape: LinearShape) -> tuple[ParamSpec, ...]:
    """Return the tensors of a layer; `weight_g_idx` only where groups may be in another order."""
    n, k = shape.out_features, shape.in_features
    grouped, packed = isinstance(scheme.granularity, PerGroup), (32, scheme.bits)
    size, others = scale_shapes(scheme.granularity, shape)
    rows, inputs = 0 if len(size) > 1 else None, 1 if grouped else None
    dtypes = (scheme.scale_dtype, *(dtype for dtype in SCALE_DTYPES if dtype != scheme.scale_dtype))
    words = (n, word_count(k, scheme.bits))
    specs = [
        ParamSpec("weight_packed", words, ("int32",), True, 1, packed, output_axis=0, input_axis=1),
        ParamSpec("weight_scale", size, dtypes, True, None, (1, 1), rows, inputs, others),
    ]
    if not scheme.symmetric and len(size) == 1:
        specs.append(ParamSpec("weight_zero_point", size, ("int8",), other_shapes=others))
    elif not scheme.symmetric:
        words = (word_count(n, scheme.bits), size[1])
        specs.append(
            ParamSpec("weight_zero_point", words, ("int32",), True, 0, packed, output_axis=0, input_axis=inputs)
        )
    specs.append(ParamSpec("weight_shape", (2,), ("int64", "int32")))
    if scheme.reorders:
        specs.append(ParamSpec("weight_g_idx", (k,), ("int32",), input_axis=0))
    if scheme.activation is not None and not scheme.activation.dynamic:
        specs.append(ParamSpec("input_scale", (1,), dtypes, other_shapes=_ONE))
        if not scheme.activation.element.signed:
            specs.append(ParamSpec("input_zero_point", (1,), ("int8",), other_shapes=_ONE))
    return tuple(specs)


def shape_of(scheme: PackScheme, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
    """
    Return N from the packed codes, and the largest K that all shapes allow.

    Raises:
        CheckpointError: `QP-ST-MISSING`, or `QP-ST-SHAPE` with the parameters that the shapes would fit.
    """
    for suffix in sorted(scheme.required_suffixes - stored.keys()):
        raise CheckpointError(
            "QP-ST-MISSING", f"{where}.{suffix}", "is not there", expected=f"every tensor of {scheme.describe()}"
        )
    for suffix, rank in _RANKS.items():
        if len(stored.get(suffix, (0,) * rank)) != rank:
            raise CheckpointError(
                "QP-ST-SHAPE",
                f"{where}.{suffix}",
                f"shape {list(stored[suffix])}",
                expected=f"{rank} dimension{'s' if rank > 1 else ''}",
            )
    shape = LinearShape(stored["weight_packed"][0], _inputs(scheme, stored))
    for spec in declared(scheme, shape):
        found = stored.get(spec.suffix, spec.shape)
        if found != spec.shape and found not in spec.other_shapes:
            raise CheckpointError(
                "QP-ST-SHAPE",
                f"{where}.{spec.suffix}",
                f"shape {list(found)}",
                expected=f"{list(spec.shape)} for {scheme.describe()} and {shape.in_features} inputs",
                fix=_fitting(scheme, stored),
            )
    return shape


def _inputs(scheme: PackScheme, stored: Mapping[str, tuple[int, ...]]) -> int:
    """Return the largest K that the shapes allow."""
    if "weight_g_idx" in stored:
        return stored["weight_g_idx"][0]
    inputs = stored["weight_packed"][1] * 32 // scheme.bits
    grouped = _grouped_inputs(scheme, stored)
    return inputs if grouped is None else min(inputs, grouped)


def _grouped_inputs(scheme: PackScheme, stored: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the inputs that full groups have, None where scales are not those of groups."""
    scales = stored["weight_scale"]
    if isinstance(scheme.granularity, PerGroup) and len(scales) == 2:
        return scales[1] * scheme.granularity.size
    return None


def _fitting(scheme: PackScheme, stored: Mapping[str, tuple[int, ...]]) -> str:
    """Say which parameters the shapes of a layer would fit, for an error that refuses the announced ones."""
    words, inputs = stored["weight_packed"][1], _grouped_inputs(scheme, stored)
    if inputs is not None and scheme.bits == 3 and words == -(-inputs // 10):
        return (
            "The shapes fit words of ten 3-bit codes each, which compressed-tensors wrote before it packed them "
            "without gaps; write the file again with a newer version."
        )
    fits = [bits for bits in BITS if inputs is not None and word_count(inputs, bits) == words]
    if fits:
        return f"The shapes fit num_bits {fits[0]} with these groups; correct the configuration if it is wrong."
    return "Check num_bits, strategy and group_size in the configuration."
