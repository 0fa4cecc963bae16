"""
NVFP4: e2m1 codes, two in a byte, an e4m3 scale for every 16 of them along K, and one factor of all scales (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.spec import ElementType, ParamSpec
from quantplug_mx.parameters import (
    GLOBAL_NAMES,
    INPUT_GLOBAL_NAMES,
    SCALE_NAMES,
    WEIGHT_NAMES,
    check_known,
    read_name,
    read_permission,
)
from quantplug_mx.scheme import GroupedScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.weight import ActivationParams, Weight

_KEYS = ("weight_name", "scale_name", "global_name", "input_global_name", "activation")
_RECIPROCAL = (GLOBAL_NAMES[0], INPUT_GLOBAL_NAMES[0])


@dataclass(frozen=True)
class NVFP4Scheme(GroupedScheme):
    """
    One spelling of NVFP4.

    Attributes:
        weight_name: suffix of the codes.
        scale_name: suffix of the scales.
        activation: the permission to quantize x.
        global_name: suffix of what all scales are divided by (`weight_global_scale`) or multiplied by
            (`weight_scale_2`).
        input_global_name: the same for dynamic scales of x: `input_global_scale`, or `input_scale`.
    """

    name: ClassVar[str] = "nvfp4"
    suffixes: ClassVar[frozenset[str]] = frozenset({*WEIGHT_NAMES, *SCALE_NAMES, *GLOBAL_NAMES, *INPUT_GLOBAL_NAMES})
    element: ClassVar[ElementType] = ElementType.FLOAT4_E2M1FN
    group: ClassVar[int] = 16
    codes_per_byte: ClassVar[int] = 2
    weight_dtype: ClassVar[str] = "uint8"
    scale_dtypes: ClassVar[tuple[str, ...]] = ("float8_e4m3fn",)
    scale_dtype: ClassVar[str] = "float8_e4m3fn"
    has_global_scale: ClassVar[bool] = True

    global_name: str
    input_global_name: str

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; the defaults are compressed-tensors' names and weight only.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`.
        """
        check_known(params, _KEYS, cls.name, where)
        return cls(
            read_name(params, "weight_name", WEIGHT_NAMES, where),
            read_name(params, "scale_name", SCALE_NAMES, where),
            read_permission(params, where, global_scale=True),
            read_name(params, "global_name", GLOBAL_NAMES, where),
            read_name(params, "input_global_name", INPUT_GLOBAL_NAMES, where),
        )

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, Json]]:
        """Offer the format for dense weights, x left alone: its factor would have to be measured."""
        return {"nvfp4": {}}

    def decode_activation(self, tensors: Mapping[str, torch.Tensor], where: str) -> ActivationParams | None:
        """Return the factor of all dynamic scales of x, or the one static scale; raises `CheckpointError`."""
        from quantplug.weight import ActivationParams

        if self.activation is None or not self.activation.global_scale:
            return GroupedScheme.decode_activation(self, tensors, where)
        return ActivationParams(global_scale=_factor(tensors, self.input_global_name, where))

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """Turn canonical form into stored tensors; raises `ConvertError` (`QP-CONV-SPEC`) as `GroupedScheme.encode`."""
        stored = GroupedScheme.encode(self, weight, activation)
        if self.activation is not None and self.activation.global_scale:
            if activation is None or activation.global_scale is None:
                raise self._broken("an unknown factor of the scales of x", "one that was measured")
            stored[self.input_global_name] = _stored_factor(activation.global_scale, self.input_global_name)
        return stored

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """
        Round to nearest; the largest magnitude of all gets the largest scale and the largest code.

        The factor is rounded as it will be stored before scales are chosen, and scales before codes are. A Hessian
        changes nothing.
        """
        import torch

        from quantplug.weight import Weight
        from quantplug_mx.rounding import round_nvfp4, spanning_factor

        dense = dense.detach()
        exact = torch.tensor(spanning_factor(dense), dtype=torch.float64)
        limits = torch.finfo(torch.float32)
        stored = _stored_factor(exact.clamp(1 / limits.max, 1 / limits.tiny), self.global_name)
        factor = _factor({self.global_name: stored}, self.global_name, self.name)
        rounded = round_nvfp4(dense, self.group, factor)
        return Weight(rounded.codes, rounded.scales, self.weight_spec(), global_scale=factor)

    def _decode(self, tensors: Mapping[str, torch.Tensor], scale_name: str, where: str) -> Weight:
        from quantplug.weight import Weight
        from quantplug_mx import checks
        from quantplug_mx.layout import unpack_nibbles

        codes, scales = unpack_nibbles(tensors[self.weight_name]), tensors[scale_name]
        checks.check_e4m3_scales(scales, codes, self.group, f"{where}.{scale_name}")
        factor = _factor(tensors, self.global_name, where)
        checks.check_range(scales, factor, f"{where}.{self.global_name}")
        return Weight(codes, scales, self.weight_spec(), global_scale=factor)

    def _encode(self, weight: Weight) -> dict[str, torch.Tensor]:
        stored = {self.weight_name: self._packed(weight.codes), self.scale_name: weight.scales.contiguous()}
        if weight.global_scale is not None:
            stored[self.global_name] = _stored_factor(weight.global_scale, self.global_name)
        return stored

    def _single_params(self) -> tuple[ParamSpec, ...]:
        names = [self.global_name]
        if self.activation is not None and self.activation.global_scale:
            names.append(self.input_global_name)
        return (*map(_single_param, names), *GroupedScheme._single_params(self))


def _single_param(name: str) -> ParamSpec:
    shapes: tuple[tuple[int, ...], ...] = ((1,), ()) if name in _RECIPROCAL else ((), (1,))
    return ParamSpec(name, shapes[0], ("float32",), other_shapes=shapes[1:])


def _factor(tensors: Mapping[str, torch.Tensor], name: str, where: str) -> torch.Tensor:
    """
    Return the factor that a stored number g stands for: itself, or its reciprocal in float64.

    Dividing a scale by g and multiplying it by the reciprocal then round to the same float32, and g comes back
    (SPEC.md, "The factor of all scales").
    """
    import torch

    from quantplug_mx.checks import check_single

    stored = tensors[name].reshape(())
    check_single(stored, f"{where}.{name}")
    return stored.to(torch.float64).reciprocal() if name in _RECIPROCAL else stored


def _stored_factor(factor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the number that stands for a factor, in the shape its name has: the inverse of `_factor`."""
    import torch

    number = factor.to(torch.float64).reciprocal() if name in _RECIPROCAL else factor
    return number.to(torch.float32).reshape(_single_param(name).shape)
