"""
MXFP4: e2m1 codes, two in a byte, one power of two for every 32 of them along K (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.spec import ElementType
from quantplug_mx.parameters import EITHER, SCALE_NAMES, WEIGHT_NAMES, check_known, read_name, read_permission
from quantplug_mx.scheme import GroupedScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.weight import Weight

_KEYS = ("weight_name", "scale_name", "activation")


@dataclass(frozen=True)
class MXFP4Scheme(GroupedScheme):
    """One spelling of MXFP4; attributes as `GroupedScheme`."""

    name: ClassVar[str] = "mxfp4"
    suffixes: ClassVar[frozenset[str]] = frozenset({*WEIGHT_NAMES, *SCALE_NAMES, "input_scale"})
    element: ClassVar[ElementType] = ElementType.FLOAT4_E2M1FN
    group: ClassVar[int] = 32
    codes_per_byte: ClassVar[int] = 2
    weight_dtype: ClassVar[str] = "uint8"
    scale_dtypes: ClassVar[tuple[str, ...]] = ("uint8", "float8_e8m0fnu")
    scale_dtype: ClassVar[str] = "float8_e8m0fnu"

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; the defaults are `weight_packed`, `weight_scale` and weight only.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`.
        """
        check_known(params, _KEYS, cls.name, where)
        return cls(
            read_name(params, "weight_name", WEIGHT_NAMES, where),
            read_name(params, "scale_name", (*SCALE_NAMES, EITHER), where),
            read_permission(params, where, global_scale=False),
        )

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, Json]]:
        """Offer the format for dense weights, x left alone."""
        return {"mxfp4": {}}

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """Round to nearest on the nearest powers of two. A Hessian changes nothing."""
        from quantplug.weight import Weight
        from quantplug_mx.rounding import round_mxfp4

        rounded = round_mxfp4(dense.detach(), self.group)
        return Weight(rounded.codes, rounded.scales, self.weight_spec())

    def _decode(self, tensors: Mapping[str, torch.Tensor], scale_name: str, where: str) -> Weight:
        import torch

        from quantplug.weight import Weight
        from quantplug_mx.checks import check_e8m0_scales
        from quantplug_mx.layout import unpack_nibbles

        scales = tensors[scale_name].view(torch.float8_e8m0fnu)
        check_e8m0_scales(scales, f"{where}.{scale_name}")
        return Weight(unpack_nibbles(tensors[self.weight_name]), scales, self.weight_spec())

    def _encode(self, weight: Weight) -> dict[str, torch.Tensor]:
        import torch

        return {
            self.weight_name: self._packed(weight.codes),
            self._written_scale_name: weight.scales.contiguous().view(torch.uint8),
        }
