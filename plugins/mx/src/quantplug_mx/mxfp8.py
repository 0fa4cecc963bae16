"""
MXFP8: e4m3 codes, one power of two for every 32 of them along K (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.spec import ElementType
from quantplug_mx.parameters import EITHER, SCALE_NAMES, check_known, read_name, read_permission
from quantplug_mx.scheme import GroupedScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.weight import Weight

_KEYS = ("scale_name", "activation")


@dataclass(frozen=True)
class MXFP8Scheme(GroupedScheme):
    """One spelling of MXFP8; attributes as `GroupedScheme`."""

    name: ClassVar[str] = "mxfp8"
    suffixes: ClassVar[frozenset[str]] = frozenset({"weight", *SCALE_NAMES, "input_scale"})
    element: ClassVar[ElementType] = ElementType.FLOAT8_E4M3FN
    group: ClassVar[int] = 32
    codes_per_byte: ClassVar[int] = 1
    weight_dtype: ClassVar[str] = "float8_e4m3fn"
    scale_dtypes: ClassVar[tuple[str, ...]] = ("uint8", "float8_e8m0fnu")
    scale_dtype: ClassVar[str] = "float8_e8m0fnu"

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; the defaults are `weight_scale` and weight only.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`.
        """
        check_known(params, _KEYS, cls.name, where)
        return cls(
            "weight",
            read_name(params, "scale_name", (*SCALE_NAMES, EITHER), where),
            read_permission(params, where, global_scale=False),
        )

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, Json]]:
        """Offer the format for dense weights, with the permission to quantize x in the same way."""
        return {"mxfp8": {"activation": "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"}}

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """Round to nearest on scales of which no code is cut off. A Hessian changes nothing."""
        from quantplug.weight import Weight
        from quantplug_mx.rounding import round_mxfp8

        rounded = round_mxfp8(dense.detach(), self.group)
        return Weight(rounded.codes, rounded.scales, self.weight_spec())

    def _decode(self, tensors: Mapping[str, torch.Tensor], scale_name: str, where: str) -> Weight:
        import torch

        from quantplug.weight import Weight
        from quantplug_mx import checks

        codes, scales = tensors[self.weight_name], tensors[scale_name].view(torch.float8_e8m0fnu)
        checks.check_e4m3_codes(codes, f"{where}.{self.weight_name}")
        checks.check_e8m0_scales(scales, f"{where}.{scale_name}")
        return Weight(codes, scales, self.weight_spec())

    def _encode(self, weight: Weight) -> dict[str, torch.Tensor]:
        import torch

        return {
            self.weight_name: weight.codes.contiguous(),
            self._written_scale_name: weight.scales.contiguous().view(torch.uint8),
        }
