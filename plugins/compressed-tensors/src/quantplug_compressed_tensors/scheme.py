"""
Pack-quantized as a number format: what a file stores for one layer, and the way to canonical form and back (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.errors import ConfigError, ConvertError
from quantplug.jsonio import get_bool, get_int
from quantplug.scheme import LinearScheme
from quantplug.spec import ElementType, LinearShape, PerChannel, PerGroup, WeightSpec, scale_shape
from quantplug.stored import check_stored
from quantplug_compressed_tensors import shapes
from quantplug_compressed_tensors.parameters import (
    BITS,
    KEYS,
    MINMAX,
    Q4_0,
    SCALE_DTYPES,
    read_granularity,
    read_grid,
    read_order,
    read_permission,
    read_scale_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, Granularity, ParamSpec
    from quantplug.weight import ActivationParams, Weight

_ROWS = PerChannel()


@dataclass(frozen=True, slots=True)
class PackScheme(LinearScheme):
    """
    One set of parameters.

    Attributes:
        bits: width of one code: 2, 3, 4 or 8.
        granularity: which weights share a scale.
        symmetric: whether codes are signed and have no zero points.
        actorder: "group" where `weight_g_idx` may assign inputs to groups in any order; "weight" stores nothing of it.
        activation: the permission to quantize x; static ones have a stored `input_scale`.
        grid: how `quantize` chooses scales and codes; the stored form does not show it.
        scale_dtype: what `quantize` writes scales in; what a file has is kept.
    """

    name: ClassVar[str] = "ct-pack"
    suffixes: ClassVar[frozenset[str]] = frozenset({
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
        "input_zero_point",
    })  # fmt: skip

    bits: int
    granularity: Granularity = _ROWS
    symmetric: bool = True
    actorder: str = "none"
    activation: ActivationSpec | None = None
    grid: str = MINMAX
    scale_dtype: str = SCALE_DTYPES[0]

    @property
    def reorders(self) -> bool:
        """Whether `weight_g_idx` may assign inputs to groups in any order."""
        return self.actorder == "group"

    @property
    def required_suffixes(self) -> frozenset[str]:
        """All that `params` declares."""
        return frozenset(spec.suffix for spec in self.params(LinearShape(1, 1)))

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, Json]]:
        """Offer 4 bits with and without zero points in the usual sizes of groups, per row, and llama.cpp's q4_0."""
        found: dict[str, Mapping[str, Json]] = {}
        for size in (32, 64, 128):
            found[f"int4-g{size}"] = {"bits": 4, "group_size": size}
            found[f"uint4-g{size}"] = {"bits": 4, "group_size": size, "symmetric": False}
        return found | {"int4-channel": {"bits": 4}, "q4_0": {"bits": 4, "group_size": 32, "grid": Q4_0}}

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; bits are required, the rest default to symmetric rows, in order, weight only.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`.
        """
        unknown = sorted(params.keys() - set(KEYS))
        if unknown:
            raise ConfigError(
                "QP-CFG-UNKNOWN", f"{where}: {unknown[0]}", "is no parameter of ct-pack", expected=" or ".join(KEYS)
            )
        bits = get_int(params, "bits", f"{where}: bits", minimum=1, maximum=8)
        if bits not in BITS:
            raise ConfigError(
                "QP-CFG-REFUSED",
                f"{where}: bits",
                f"codes of {bits} bits are not read",
                expected=f"{', '.join(map(str, BITS))} bits, for which the project has a type",
                fix="Use a copy of the model in another width, or convert the dense model (quantplug convert).",
            )
        granularity, grid = read_granularity(params, where), read_grid(params, where)
        return cls(
            bits=bits,
            granularity=granularity,
            symmetric=get_bool(params, "symmetric", f"{where}: symmetric", default=True),
            actorder=read_order(params, granularity, where),
            activation=read_permission(params, where),
            grid=grid,
            scale_dtype=read_scale_dtype(params, grid, where),
        )

    def describe(self) -> str:
        """Return "ct-pack int4 group 64 sym", for instance."""
        spec = replace(self.weight_spec(), element=ElementType.integer(self.bits, signed=True))
        return (
            f"ct-pack {spec.describe()} {'sym' if self.symmetric else 'asym'}"
            + (f" {Q4_0}" if self.grid == Q4_0 else "")
            + (f", x {self.activation.describe()}" if self.activation else "")
        )

    @property
    def scale_suffixes(self) -> frozenset[str]:
        """Scales keep the dtype of the file."""
        return frozenset({"weight_scale"})

    def weight_spec(self) -> WeightSpec:
        """Return signed codes without zero points for symmetric files, unsigned codes with them otherwise."""
        element = ElementType.integer(self.bits, signed=self.symmetric)
        return WeightSpec(element, self.granularity, self.scale_dtype, self.reorders)

    def activation_spec(self) -> ActivationSpec | None:
        """Return the permission as it was spelled."""
        return self.activation

    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """Declare the tensors; `weight_g_idx` only where groups may be in another order."""
        return shapes.declared(self, shape)

    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """
        Return N from the packed codes, and the largest K that all shapes allow.

        Only `weight_shape` tells K where neither the last word nor the last group of a row is full; `decode` checks it.

        Raises:
            CheckpointError: `QP-ST-MISSING`, or `QP-ST-SHAPE` with the parameters that the shapes would fit.
        """
        return shapes.shape_of(self, stored, where)

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """
        Turn stored tensors into canonical form.

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-DTYPE`, `QP-ST-SHAPE`, `QP-ST-SCALE`, `QP-ST-ZEROS`, `QP-ST-GIDX`,
                `QP-ST-PADDING`.
        """
        import torch

        from quantplug.weight import Weight
        from quantplug_compressed_tensors import checks
        from quantplug_compressed_tensors.coding import read_zeros
        from quantplug_compressed_tensors.layout import unpack

        check_stored(self.params(shape), tensors, where)
        checks.check_size(tensors["weight_shape"], shape, where)
        scales = tensors["weight_scale"]
        checks.check_scales(scales, f"{where}.weight_scale")
        k, middle = shape.in_features, 1 << (self.bits - 1)
        size = scale_shape(self.granularity, shape.out_features, k)
        offset = middle if self.symmetric else 0
        fields = unpack(tensors["weight_packed"], self.bits, subtract=offset)
        if fields.shape[1] > k:
            checks.check_unused(fields[:, k:] + offset, k, f"{where}.weight_packed")
        g_idx = None
        if self.reorders and isinstance(self.granularity, PerGroup):
            g_idx = checks.group_index(tensors["weight_g_idx"], k, self.granularity.size, size[1], where)
        return Weight(
            codes=fields[:, :k].view(torch.int8) if self.symmetric else fields[:, :k],
            scales=scales.reshape(size),
            spec=replace(self.weight_spec(), scale_dtype=str(scales.dtype).removeprefix("torch.")),
            zeros=None
            if self.symmetric
            else read_zeros(tensors["weight_zero_point"], size, self.bits, f"{where}.weight_zero_point"),
            g_idx=g_idx,
        )

    def decode_activation(self, tensors: Mapping[str, torch.Tensor], where: str) -> ActivationParams | None:
        """
        Return the stored scale of x and, for unsigned codes, its zero point, raised by half the range.

        Raises:
            CheckpointError: `QP-ST-SCALE`, `QP-ST-ZEROS`.
        """
        from quantplug_compressed_tensors.coding import read_input

        if self.activation is None or self.activation.dynamic:
            return None
        return read_input(tensors, self.activation, where)

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """
        Turn canonical form into stored tensors; a trivial `weight_g_idx` is written where the order is "group".

        Raises:
            ConvertError: `QP-CONV-SPEC` when the weight or what is known about x does not obey this scheme's contract.
        """
        import torch

        from quantplug_compressed_tensors import coding
        from quantplug_compressed_tensors.layout import pack

        self._check_contract(weight)
        n, k = weight.codes.shape
        size, _ = shapes.scale_shapes(self.granularity, LinearShape(n, k))
        stored = {
            "weight_packed": pack(
                coding.raised(weight.codes, self.bits) if self.symmetric else weight.codes, self.bits
            ),
            "weight_scale": weight.scales.reshape(size).contiguous(),
            "weight_shape": torch.tensor([n, k], dtype=torch.int64),
        }
        if weight.zeros is not None:
            stored["weight_zero_point"] = coding.write_zeros(weight.zeros, size, self.bits)
        if self.reorders and isinstance(self.granularity, PerGroup):
            trivial = torch.arange(k, dtype=torch.int32) // self.granularity.size
            stored["weight_g_idx"] = trivial if weight.g_idx is None else weight.g_idx.to(torch.int32).contiguous()
        if self.activation is not None and not self.activation.dynamic:
            unsigned = not self.activation.element.signed
            if activation is None or activation.scale is None or (activation.zero is not None) != unsigned:
                raise self._broken("what is not known about x", "its scale" + (" and zero point" if unsigned else ""))
            stored |= coding.write_input(activation, self.activation, weight.scales.dtype)
        return stored

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """
        Round to nearest on scales that span each range, or find the q4_0 grid that the weights lie on.

        Scales have eight significant bits where the grid is "minmax", so that bfloat16 holds them. Those of q4_0 become
        float32 where some block has no scale in `scale_dtype`. A Hessian changes nothing.

        Raises:
            ConvertError: `QP-CONV-SPEC` for stored scales of x, which only a calibration could find.
        """
        import torch

        from quantplug.weight import Weight
        from quantplug_compressed_tensors import q4_0, rounding

        if self.activation is not None and not self.activation.dynamic:
            raise self._broken("scales of x, which were never measured", "a dynamic activation")
        dtype = getattr(torch, self.scale_dtype)
        if self.grid == Q4_0:
            codes, scales, zeros = *q4_0.quantize(dense.detach(), dtype), None
        else:
            codes, scales, zeros = rounding.quantize(
                dense.detach(), self.granularity, self.bits, dtype, symmetric=self.symmetric
            )
        spec = replace(self.weight_spec(), scale_dtype=str(scales.dtype).removeprefix("torch."))
        return Weight(codes, scales, spec, zeros)

    def _check_contract(self, weight: Weight) -> None:
        spec, want = weight.spec, replace(self.weight_spec(), scale_dtype=weight.spec.scale_dtype)
        if spec != want or spec.scale_dtype not in SCALE_DTYPES:
            raise self._broken(f"a weight of {spec.describe()}, scales in {spec.scale_dtype}", want.describe())
        if self.grid == Q4_0 and spec.scale_dtype != self.scale_dtype:
            raise ConvertError(
                "QP-CONV-SPEC",
                self.describe(),
                f"cannot store scales that need {spec.scale_dtype}",
                expected=self.scale_dtype,
                fix=f"Ask for scale_dtype={spec.scale_dtype}.",
            )
        size = scale_shape(self.granularity, weight.out_features, weight.in_features)
        for name, tensor in (("scales", weight.scales), ("zero points", weight.zeros)):
            if tensor is not None and tuple(tensor.shape) != size:
                raise self._broken(f"{name} {list(tensor.shape)}", f"{list(size)}")
        half = 1 << (self.bits - 1)
        lowest, highest = (-half, half - 1) if self.symmetric else (0, 2 * half - 1)
        for name, tensor in (("code", weight.codes), ("zero point", weight.zeros)):
            if tensor is not None and tensor.numel():
                low, high = (int(value) for value in tensor.aminmax())
                if low < lowest or high > highest:
                    raise self._broken(f"the {name} {low if low < lowest else high}", f"{lowest} to {highest}")

    def _broken(self, what: str, expected: str) -> ConvertError:
        return ConvertError("QP-CONV-SPEC", self.describe(), f"cannot store {what}", expected=expected)
