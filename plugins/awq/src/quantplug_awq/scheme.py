"""
AWQ as a number format: what a file stores for one layer, and the way to canonical form and back (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.errors import CheckpointError, ConfigError, ConvertError
from quantplug.jsonio import get_bool, get_str
from quantplug.scheme import LinearScheme
from quantplug.spec import ElementType, LinearShape, ParamSpec, PerChannel, PerGroup, WeightSpec
from quantplug.stored import check_stored
from quantplug_awq.fields import GEMM, gemv_words, layout_of, read_bits, read_group_size, unfit

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.spec import Granularity
    from quantplug.weight import ActivationParams, Weight

_KEYS = ("bits", "group_size", "zero_point", "version")
_SCALES = ("float16", "bfloat16", "float32")
_MIDDLE = 8


@dataclass(frozen=True, slots=True)
class AWQScheme(LinearScheme):
    """
    One set of AWQ parameters; codes have 4 bits.

    Attributes:
        group_size: inputs that share a scale; -1 for all of them.
        zero_point: whether zero points vary. Else every one is the middle one, so that codes can be signed.
        version: the layout, "gemm" or "gemv".
    """

    name: ClassVar[str] = "awq"
    suffixes: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})

    group_size: int
    zero_point: bool = True
    version: str = GEMM

    @property
    def required_suffixes(self) -> frozenset[str]:
        """All three, also where zero points are all the same."""
        return self.suffixes

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; group_size is required, the rest default to 4 bits, zero points, GEMM's layout.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`, `QP-CFG-REFUSED`.
        """
        unknown = sorted(params.keys() - set(_KEYS))
        if unknown:
            raise ConfigError(
                "QP-CFG-UNKNOWN", f"{where}: {unknown[0]}", "is no parameter of awq", expected=" or ".join(_KEYS)
            )
        read_bits(params, "bits", f"{where}: bits", default=4)
        version = get_str(params, "version", f"{where}: version", default=GEMM)
        return cls(
            group_size=read_group_size(params, "group_size", f"{where}: group_size"),
            zero_point=get_bool(params, "zero_point", f"{where}: zero_point", default=True),
            version=layout_of(version, f"{where}: version"),
        )

    def describe(self) -> str:
        """Return "awq 4-bit group 64 asym", for instance."""
        group = "per channel" if self.group_size == -1 else f"group {self.group_size}"
        layout = "" if self.version == GEMM else f" {self.version}"
        return f"awq 4-bit {group} {'asym' if self.zero_point else 'sym'}{layout}"

    @property
    def scale_suffixes(self) -> frozenset[str]:
        """Scales keep the dtype of the file."""
        return frozenset({"scales"})

    def weight_spec(self) -> WeightSpec:
        """Return unsigned codes with zero points, or signed codes where all are the middle one."""
        granularity: Granularity = PerChannel() if self.group_size == -1 else PerGroup(self.group_size)
        return WeightSpec(ElementType.integer(4, signed=not self.zero_point), granularity, _SCALES[0])

    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """
        Declare the three tensors.

        Raises:
            ConfigError: `QP-CFG-FIELD` for a size that the layout has no place for.
        """
        n, k = shape.out_features, shape.in_features
        fault = unfit(self.version, self.group_size, n, k)
        if fault:
            raise ConfigError("QP-CFG-FIELD", self.describe(), fault, expected="a layer that fits its layout")
        groups, eight = self._groups(k), (8, 1)
        if self.version == GEMM:
            return (
                ParamSpec("qweight", (k, n // 8), ("int32",), True, 1, eight, output_axis=1, input_axis=0),
                ParamSpec("qzeros", (groups, n // 8), ("int32",), True, 1, eight, output_axis=1, input_axis=0),
                ParamSpec("scales", (groups, n), _SCALES, output_axis=1, input_axis=0),
            )
        words = gemv_words(groups, self._size(k))
        return (
            ParamSpec("qweight", (n, k // 8), ("int32",), True, 1, eight, output_axis=0, input_axis=1),
            ParamSpec("qzeros", (n, words), ("int32",), True, 1, eight, output_axis=0, input_axis=1),
            ParamSpec("scales", (n, 8 * words), _SCALES, output_axis=0, input_axis=1),
        )

    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """
        Return N and K from `qweight`.

        Raises:
            CheckpointError: `QP-ST-MISSING`, or `QP-ST-SHAPE` with the parameters that the shapes would fit.
        """
        for suffix in sorted(self.required_suffixes - stored.keys()):
            raise CheckpointError(
                "QP-ST-MISSING", f"{where}.{suffix}", "is not there", expected=f"every tensor of {self.describe()}"
            )
        for suffix, size in stored.items():
            if len(size) != 2:
                raise CheckpointError(
                    "QP-ST-SHAPE", f"{where}.{suffix}", f"shape {list(size)}", expected="two dimensions"
                )
        rows, columns = stored["qweight"]
        shape = LinearShape(8 * columns, rows) if self.version == GEMM else LinearShape(rows, 8 * columns)
        fault = unfit(self.version, self.group_size, shape.out_features, shape.in_features)
        wrong = [] if fault else [spec for spec in self.params(shape) if stored[spec.suffix] != spec.shape]
        if fault or wrong:
            raise CheckpointError(
                "QP-ST-SHAPE",
                f"{where}.{wrong[0].suffix if wrong else 'qweight'}",
                fault or f"shape {list(stored[wrong[0].suffix])}",
                expected=f"{list(wrong[0].shape) if wrong else 'a size that fits'} for {self.describe()}",
                fix=_fitting(stored),
            )
        return shape

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """
        Turn stored tensors into canonical form; from GEMM's layout, codes are the transposed view of a `[K, N]` buffer.

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-DTYPE`, `QP-ST-SHAPE`, `QP-ST-SCALE`, `QP-ST-ZEROS`,
                `QP-ST-PADDING`.
        """
        import torch

        from quantplug.weight import Weight
        from quantplug_awq import checks
        from quantplug_awq.layout import unpack_columns, unpack_rows

        check_stored(self.params(shape), tensors, where)
        groups, middle = self._groups(shape.in_features), 0 if self.zero_point else _MIDDLE
        if self.version == GEMM:
            codes = unpack_columns(tensors["qweight"], subtract=middle).t()
            zeros, scales = unpack_columns(tensors["qzeros"]).t(), tensors["scales"].t()
        else:
            codes = unpack_rows(tensors["qweight"], subtract=middle)
            zeros, scales = unpack_rows(tensors["qzeros"]), tensors["scales"]
            for name, values in (("qzeros", zeros), ("scales", scales)):
                checks.check_unused(values[:, groups:], groups, f"{where}.{name}")
            zeros, scales = zeros[:, :groups], scales[:, :groups]
        checks.check_scales(tensors["scales"], f"{where}.scales")
        if not self.zero_point:
            checks.check_symmetric(zeros, f"{where}.qzeros")
        return Weight(
            codes=codes if self.zero_point else codes.view(torch.int8),
            scales=scales,
            spec=replace(self.weight_spec(), scale_dtype=str(scales.dtype).removeprefix("torch.")),
            zeros=zeros if self.zero_point else None,
        )

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """
        Turn canonical form into the three stored tensors.

        Raises:
            ConvertError: `QP-CONV-SPEC` when the weight does not obey this scheme's contract.
        """
        import torch
        from torch.nn.functional import pad

        from quantplug_awq.layout import GEMM_ORDER, PLAIN_ORDER, pack

        self._check_contract(weight)
        n, k = weight.codes.shape
        # Adding in uint8 is modulo 256, which turns two's complement into the unsigned code.
        codes = weight.codes if self.zero_point else weight.codes.view(torch.uint8) + _MIDDLE
        zeros = weight.zeros
        if zeros is None:
            zeros = torch.full((n, self._groups(k)), _MIDDLE, dtype=torch.uint8)
        for values, name in ((codes, "code"), (zeros, "zero point")):
            if values.numel() and int(values.max()) >> 4:
                raise self._broken(f"the {name} {int(values.max())}", "4 bits")
        if self.version == GEMM:
            packed = {"qweight": pack(codes.t(), GEMM_ORDER), "qzeros": pack(zeros.t(), GEMM_ORDER)}
            return {**packed, "scales": weight.scales.t().contiguous()}
        missing = 8 * gemv_words(self._groups(k), self._size(k)) - self._groups(k)
        packed = {"qweight": pack(codes, PLAIN_ORDER), "qzeros": pack(pad(zeros, (0, missing)), PLAIN_ORDER)}
        return {**packed, "scales": pad(weight.scales, (0, missing))}

    def _size(self, inputs: int) -> int:
        """Return the inputs of one group, never 0."""
        return max(1, inputs) if self.group_size == -1 else self.group_size

    def _groups(self, inputs: int) -> int:
        return 1 if self.group_size == -1 else inputs // self.group_size

    def _check_contract(self, weight: Weight) -> None:
        want = replace(self.weight_spec(), scale_dtype=weight.spec.scale_dtype)
        if weight.spec != want or weight.g_idx is not None:
            order = " in another order" if weight.g_idx is not None else ""
            raise self._broken(f"a weight of {weight.spec.describe()}{order}", want.describe())
        n, k = weight.codes.shape
        fault = unfit(self.version, self.group_size, n, k)
        if fault:
            raise self._broken(f"a layer whose {fault}", "a layer that fits its layout")
        if tuple(weight.scales.shape) != (n, self._groups(k)):
            raise self._broken(f"scales {list(weight.scales.shape)}", f"{[n, self._groups(k)]}")

    def _broken(self, what: str, expected: str) -> ConvertError:
        return ConvertError("QP-CONV-SPEC", self.describe(), f"cannot store {what}", expected=expected)


def _fitting(stored: Mapping[str, tuple[int, ...]]) -> str:
    """Say which parameters the shapes of a layer would fit, for an error that refuses those of the configuration."""
    (rows, columns), (groups, zero_words), scales = stored["qweight"], stored["qzeros"], stored["scales"]
    if groups and zero_words == columns and scales == (groups, 8 * columns) and rows % groups == 0:
        size = -1 if groups == 1 else rows // groups
        return f"The shapes fit version 'gemm' and group_size {size}; correct the configuration if it is wrong."
    if scales == (rows, 8 * zero_words) and groups == rows:
        return "The shapes fit version 'gemv'; correct the configuration if it is wrong."
    if scales[1] == columns and zero_words == -(-columns // 8):
        return "The shapes are those of GPTQ's layout; correct quant_method if it is wrong."
    return "The shapes fit no AWQ layer that is read; the file is damaged or of another format."
