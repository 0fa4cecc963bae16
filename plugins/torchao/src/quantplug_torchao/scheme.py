"""
The tensors that torchao takes a weight apart into: one layer of them, and the way to canonical form and back (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.errors import CheckpointError, ConfigError, ConvertError
from quantplug.scheme import LinearScheme
from quantplug.spec import (
    ElementType,
    LinearShape,
    ParamSpec,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    WeightSpec,
    scale_shape,
)
from quantplug.stored import check_stored
from quantplug_torchao import metadata, parameters
from quantplug_torchao.parameters import CANONICAL_BITS, FLOATS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, Granularity
    from quantplug.weight import ActivationParams, Weight

QDATA, SCALE, ZERO_POINT = "_weight_qdata", "_weight_scale", "_weight_zero_point"
_SCALES = ("float32", "bfloat16", "float16")
_CHANNEL = PerChannel()


@dataclass(frozen=True, slots=True)
class TorchaoScheme(LinearScheme):
    """
    One set of parameters.

    Attributes:
        element: torch's name of the type of a code, "int1" to "int8" (one per byte) or an 8-bit float.
        granularity: which weights share a scale.
        symmetric: whether all zero points are 0; those of integers are stored all the same, but by old versions.
        activation: the permission to quantize x, always dynamic.
    """

    name: ClassVar[str] = "torchao"
    suffixes: ClassVar[frozenset[str]] = frozenset({QDATA, SCALE, ZERO_POINT})

    element: str = "int8"
    granularity: Granularity = _CHANNEL
    symmetric: bool = True
    activation: ActivationSpec | None = None

    @property
    def required_suffixes(self) -> frozenset[str]:
        """Codes and scales, and zero points where they may differ from 0."""
        return frozenset({QDATA, SCALE} if self.symmetric else {QDATA, SCALE, ZERO_POINT})

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; the defaults are int8, per channel, symmetric, weight only.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`.
        """
        unknown = sorted(params.keys() - set(parameters.KEYS))
        if unknown:
            raise ConfigError(
                "QP-CFG-UNKNOWN",
                f"{where}: {unknown[0]}",
                "is no parameter of torchao",
                expected=" or ".join(parameters.KEYS),
            )
        element = parameters.read_element(params, where)
        return cls(
            element,
            parameters.read_granularity(params, element, where),
            parameters.read_symmetric(params, element, where),
            parameters.read_permission(params, where),
        )

    @property
    def bits(self) -> int:
        """Width of a stored integer; 8 for floats."""
        return 8 if self.element in FLOATS else int(self.element.removeprefix("int"))

    def describe(self) -> str:
        """Return "torchao int4 group 32 sym, x uint8 per token, dynamic", for instance."""
        spec = self.weight_spec()
        kind = "" if self.element in FLOATS else " sym" if self.symmetric else " asym"
        return f"torchao {self.element}{spec.describe().removeprefix(spec.element)}{kind}" + (
            f", x {self.activation.describe()}" if self.activation else ""
        )

    def weight_spec(self) -> WeightSpec:
        """Return signed codes or floats as stored, unsigned codes with zero points for asymmetric files."""
        if self.element in FLOATS:
            element = ElementType(self.element)
        else:
            element = ElementType.integer(CANONICAL_BITS[self.element], signed=self.symmetric)
        return WeightSpec(element, self.granularity, _SCALES[0])

    def activation_spec(self) -> ActivationSpec | None:
        """Return the permission."""
        return self.activation

    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """
        Declare codes, scales and, for integers, zero points.

        Raises:
            ConfigError: `QP-CFG-FIELD` when groups or blocks do not tile the layer; torchao has no ragged ones.
        """
        self._check_tiles(shape)
        n, k = shape.out_features, shape.in_features
        size = scale_shape(self.granularity, n, k)
        others = ((1,), ()) if isinstance(self.granularity, PerTensor) else ()
        rows = None if isinstance(self.granularity, PerTensor) else 0
        inputs = 1 if isinstance(self.granularity, PerGroup | PerBlock) else None
        floats = self.element in FLOATS
        codes = (self.element if floats else "int8",)
        specs = (
            ParamSpec(QDATA, (n, k), codes, output_axis=0, input_axis=1),
            ParamSpec(SCALE, size, _SCALES, output_axis=rows, input_axis=inputs, other_shapes=others),
        )
        if floats:
            return specs
        zeros = ParamSpec(
            ZERO_POINT, size, ("int8",), not self.symmetric, output_axis=rows, input_axis=inputs, other_shapes=others
        )
        return (*specs, zeros)

    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """
        Return the size of the codes.

        Raises:
            CheckpointError: `QP-ST-MISSING`; `QP-ST-EXTRA` for zero points of floats; `QP-ST-SHAPE`.
            ConfigError: `QP-CFG-FIELD` as `params`.
        """
        for suffix in sorted(self.required_suffixes - stored.keys()):
            raise CheckpointError(
                "QP-ST-MISSING", f"{where}.{suffix}", "is not there", expected=f"every tensor of {self.describe()}"
            )
        size = stored[QDATA]
        if len(size) != 2:
            raise CheckpointError(
                "QP-ST-SHAPE", f"{where}.{QDATA}", f"shape {list(size)}", expected="two dimensions, [N, K]"
            )
        shape = LinearShape(*size)
        specs = {spec.suffix: spec for spec in self.params(shape)}
        for suffix in sorted(stored.keys() & self.suffixes - specs.keys()):
            raise CheckpointError(
                "QP-ST-EXTRA", f"{where}.{suffix}", f"is stored beside {self.element}", expected=" and ".join(specs)
            )
        for suffix, spec in specs.items():
            found, allowed = stored.get(suffix, spec.shape), (spec.shape, *spec.other_shapes)
            if found not in allowed:
                raise CheckpointError(
                    "QP-ST-SHAPE",
                    f"{where}.{suffix}",
                    f"shape {list(found)}",
                    expected=f"{' or '.join(str(list(one)) for one in allowed)} for {self.describe()} and codes "
                    f"{list(size)}",
                    fix="The granularity in the configuration is another one than that of the tensors.",
                )
        return shape

    def check_metadata(self, described: Mapping[str, str], stored: Mapping[str, tuple[int, ...]], where: str) -> None:
        """
        Hold what torchao wrote about a layer's weight into the safetensors header against this scheme.

        Raises:
            ConfigError: `QP-CFG-REFUSED` for a class that is not read, `QP-CFG-CONTRADICTION`, `QP-CFG-FIELD`, and for
                text that is no JSON `QP-CFG-JSON` and the like.
        """
        metadata.check(self, described, stored, where)

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """
        Hand codes of floats and symmetric integers over as they are; raise the others, and their zeros, to unsigned.

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-DTYPE`, `QP-ST-SHAPE`, `QP-ST-CODE`, `QP-ST-PADDING`,
                `QP-ST-SCALE`, `QP-ST-ZEROS`.
        """
        from quantplug.weight import Weight
        from quantplug_torchao import checks

        check_stored(self.params(shape), tensors, where)
        size = scale_shape(self.granularity, shape.out_features, shape.in_features)
        codes, scales = tensors[QDATA], tensors[SCALE].reshape(size)
        checks.check_scales(scales, f"{where}.{SCALE}")
        spec = replace(self.weight_spec(), scale_dtype=str(scales.dtype).removeprefix("torch."))
        if self.element in FLOATS:
            checks.check_floats(codes, f"{where}.{QDATA}")
            return Weight(codes, scales, spec)
        checks.check_range(codes, self.bits, "QP-ST-PADDING", f"{where}.{QDATA}")
        zeros = tensors.get(ZERO_POINT)
        if zeros is None or self.symmetric:
            if zeros is not None:
                checks.check_zero(zeros, f"{where}.{ZERO_POINT}")
            return Weight(codes, scales, spec)
        checks.check_range(zeros, self.bits, "QP-ST-ZEROS", f"{where}.{ZERO_POINT}")
        half = self._half
        return Weight(_raised(codes, half), scales, spec, _raised(zeros.reshape(size), half))

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """
        Turn canonical form into stored tensors; symmetric integers get the zero points of 0 that torchao stores.

        Raises:
            ConvertError: `QP-CONV-SPEC` when the weight does not obey this scheme's contract.
        """
        import torch

        self._check_contract(weight)
        stored = {QDATA: weight.codes.contiguous(), SCALE: weight.scales.contiguous()}
        if weight.zeros is not None:
            stored[QDATA] = _lowered(weight.codes, self._half).contiguous()
            stored[ZERO_POINT] = _lowered(weight.zeros, self._half).contiguous()
        elif self.element not in FLOATS:
            stored[ZERO_POINT] = torch.zeros(weight.scales.shape, dtype=torch.int8, device=weight.scales.device)
        return stored

    @property
    def _half(self) -> int:
        """Half the range of a canonical code, by which stored ones of asymmetric files are raised."""
        return 1 << (CANONICAL_BITS[self.element] - 1)

    def _check_tiles(self, shape: LinearShape) -> None:
        match self.granularity:
            case PerGroup(size=size):
                n, k = 1, size
            case PerBlock(n=n, k=k):
                pass
            case _:
                return
        if shape.out_features % n or shape.in_features % k:
            raise ConfigError(
                "QP-CFG-FIELD",
                self.describe(),
                f"a layer of {shape.out_features} x {shape.in_features} cannot be tiled with {n} x {k}",
                expected="whole groups and blocks: torchao has no others",
            )

    def _check_contract(self, weight: Weight) -> None:
        want = replace(self.weight_spec(), scale_dtype=weight.spec.scale_dtype)
        if weight.spec != want or weight.spec.scale_dtype not in _SCALES or weight.g_idx is not None:
            raise self._broken(f"a weight of {weight.spec.describe()}", want.describe())
        size = scale_shape(self.granularity, weight.out_features, weight.in_features)
        for name, tensor in (("scales", weight.scales), ("zero points", weight.zeros)):
            if tensor is not None and tuple(tensor.shape) != size:
                raise self._broken(f"{name} {list(tensor.shape)}", f"{list(size)}")
        if self.element in FLOATS:
            return
        middle = 0 if self.symmetric else self._half
        lowest, highest = middle - (1 << (self.bits - 1)), middle + (1 << (self.bits - 1)) - 1
        for name, tensor in (("code", weight.codes), ("zero point", weight.zeros)):
            if tensor is not None and tensor.numel():
                low, high = (int(value) for value in tensor.aminmax())
                if low < lowest or high > highest:
                    raise self._broken(f"the {name} {low if low < lowest else high}", f"{lowest} to {highest}")

    def _broken(self, what: str, expected: str) -> ConvertError:
        return ConvertError("QP-CONV-SPEC", self.describe(), f"cannot store {what}", expected=expected)


def _raised(values: torch.Tensor, half: int) -> torch.Tensor:
    """Raise int8 values to uint8; a sum of bytes is modulo 256, so it is exact."""
    import torch

    return values.view(torch.uint8) + half


def _lowered(values: torch.Tensor, half: int) -> torch.Tensor:
    """Take the half again: the inverse of `_raised`."""
    import torch

    return (values - half).view(torch.int8)
