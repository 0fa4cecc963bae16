"""
Integers stored one per byte: what a file holds for one layer, and the way to canonical form and back (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.errors import CheckpointError, ConfigError, ConvertError
from quantplug.jsonio import get_int, get_str
from quantplug.scheme import LinearScheme
from quantplug.spec import (
    ElementType,
    LinearShape,
    ParamSpec,
    PerChannel,
    PerTensor,
    WeightSpec,
    scale_shape,
)
from quantplug.stored import check_stored
from quantplug_int8.parameters import BITS, KEYS, SCALE_NAMES, read_activations, read_granularity, read_symmetric

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, Granularity
    from quantplug.weight import ActivationParams, Weight

_SCALES = ("bfloat16", "float16", "float32")
_CHANNEL = PerChannel()
_ONE = ((), (1, 1))
"""Shapes of a single number besides `[1]`."""


@dataclass(frozen=True, slots=True)
class Int8Scheme(LinearScheme):
    """
    One set of parameters.

    Attributes:
        bits: width of a code: 8, or 4 in a byte.
        granularity: which weights share a scale.
        symmetric: whether codes are signed and have no zero points.
        scale_name: suffix of the scales, which multiply under either name.
        activation: the permission to quantize x; static ones have a stored `input_scale`.
    """

    name: ClassVar[str] = "int8"
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {"weight", *SCALE_NAMES, "weight_zero_point", "input_scale", "input_zero_point"}
    )

    bits: int = 8
    granularity: Granularity = _CHANNEL
    symmetric: bool = True
    scale_name: str = "weight_scale"
    activation: ActivationSpec | None = None

    @property
    def required_suffixes(self) -> frozenset[str]:
        """All that `params` declares."""
        return frozenset(spec.suffix for spec in self.params(LinearShape(1, 1)))

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, Json]]:
        """Offer 8 bits per channel, with x left alone ("int8") or quantized per token ("w8a8")."""
        return {"int8": {}, "w8a8": {"activation": "int8/token/dynamic"}}

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; the defaults are 8 bits, per channel, symmetric, `weight_scale`, weight only.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`.
        """
        unknown = sorted(params.keys() - set(KEYS))
        if unknown:
            raise ConfigError(
                "QP-CFG-UNKNOWN", f"{where}: {unknown[0]}", "is no parameter of int8", expected=" or ".join(KEYS)
            )
        granularity = read_granularity(params, where)
        return cls(
            bits=get_int(params, "bits", f"{where}: bits", default=8, choices=BITS),
            granularity=granularity,
            symmetric=read_symmetric(params, granularity, where),
            scale_name=get_str(
                params, "scale_name", f"{where}: scale_name", default=SCALE_NAMES[0], choices=SCALE_NAMES
            ),
            activation=read_activations(params, where),
        )

    def describe(self) -> str:
        """Return "int8 per channel sym, x int8 per token, dynamic", for instance."""
        spec = replace(self.weight_spec(), element=ElementType.integer(self.bits, signed=True))
        return (
            spec.describe()
            + (" sym" if self.symmetric else " asym")
            + (f", x {self.activation.describe()}" if self.activation else "")
        )

    @property
    def scale_suffixes(self) -> frozenset[str]:
        """Scales keep the dtype of the file."""
        return frozenset({self.scale_name})

    def weight_spec(self) -> WeightSpec:
        """Return signed codes without zero points for symmetric files, unsigned codes with them otherwise."""
        return WeightSpec(ElementType.integer(self.bits, signed=self.symmetric), self.granularity, _SCALES[0])

    def activation_spec(self) -> ActivationSpec | None:
        """Return the permission as it was spelled."""
        return self.activation

    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """Declare codes and scales, zero points of asymmetric ones, and what a static activation stores about x."""
        size, others = self._scale_shapes(shape)
        rows = 0 if size[0] > 1 else None
        inputs = 1 if len(size) > 1 and not isinstance(self.granularity, PerChannel) else None
        specs = [
            ParamSpec("weight", (shape.out_features, shape.in_features), ("int8",), output_axis=0, input_axis=1),
            ParamSpec(self.scale_name, size, _SCALES, True, None, (1, 1), rows, inputs, others),
        ]
        if not self.symmetric:
            specs.append(ParamSpec("weight_zero_point", size, ("int8",), True, None, (1, 1), rows, inputs, others))
        if self.activation is not None and not self.activation.dynamic:
            specs.append(ParamSpec("input_scale", (1,), _SCALES, other_shapes=_ONE))
            if not self.activation.element.signed:
                specs.append(ParamSpec("input_zero_point", (1,), ("int8", "uint8"), other_shapes=_ONE))
        return tuple(specs)

    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """
        Return the size of the codes.

        Raises:
            CheckpointError: `QP-ST-MISSING`, or `QP-ST-SHAPE` with what the shapes would fit.
        """
        for suffix in sorted(self.required_suffixes - stored.keys()):
            raise CheckpointError(
                "QP-ST-MISSING", f"{where}.{suffix}", "is not there", expected=f"every tensor of {self.describe()}"
            )
        if len(stored["weight"]) != 2:
            raise CheckpointError(
                "QP-ST-SHAPE", f"{where}.weight", f"shape {list(stored['weight'])}", expected="two dimensions, [N, K]"
            )
        shape = LinearShape(*stored["weight"])
        for spec in self.params(shape):
            found = stored.get(spec.suffix, spec.shape)
            if found not in (spec.shape, *spec.other_shapes):
                raise CheckpointError(
                    "QP-ST-SHAPE",
                    f"{where}.{spec.suffix}",
                    f"shape {list(found)}",
                    expected=f"{list(spec.shape)} for {self.describe()} and {shape.out_features} x {shape.in_features}",
                    fix=_fitting(found, shape) if spec.suffix == self.scale_name else "",
                )
        return shape

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """
        Turn stored tensors into canonical form; symmetric codes and scales are shared, not copied.

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-DTYPE`, `QP-ST-SHAPE`, `QP-ST-SCALE`, `QP-ST-ZEROS`, and
                `QP-ST-PADDING` for a byte that holds more than its bits.
        """
        from quantplug.weight import Weight
        from quantplug_int8 import checks

        check_stored(self.params(shape), tensors, where)
        codes, scales, zeros = tensors["weight"], tensors[self.scale_name], None
        checks.check_range(codes, self.bits, "QP-ST-PADDING", f"{where}.weight")
        checks.check_scales(scales, f"{where}.{self.scale_name}")
        if not self.symmetric:
            checks.check_range(tensors["weight_zero_point"], self.bits, "QP-ST-ZEROS", f"{where}.weight_zero_point")
            codes, zeros = (_unsigned(stored, self.bits) for stored in (codes, tensors["weight_zero_point"]))
        size = scale_shape(self.granularity, shape.out_features, shape.in_features)
        return Weight(
            codes=codes,
            scales=scales.reshape(size),
            spec=replace(self.weight_spec(), scale_dtype=str(scales.dtype).removeprefix("torch.")),
            zeros=None if zeros is None else zeros.reshape(size),
        )

    def decode_activation(self, tensors: Mapping[str, torch.Tensor], where: str) -> ActivationParams | None:
        """
        Return the stored scale of x, and its zero point for unsigned codes: an int8 one is raised by half the range.

        Raises:
            CheckpointError: `QP-ST-SCALE`, `QP-ST-ZEROS`.
        """
        import torch

        from quantplug.weight import ActivationParams
        from quantplug_int8 import checks

        if self.activation is None or self.activation.dynamic:
            return None
        checks.check_input_scale(tensors["input_scale"], f"{where}.input_scale")
        scale = tensors["input_scale"].to(torch.float32).reshape(())
        if self.activation.element.signed:
            return ActivationParams(scale)
        zero, bits, name = tensors["input_zero_point"], self.activation.element.bits, f"{where}.input_zero_point"
        if zero.dtype == torch.int8:
            checks.check_range(zero, bits, "QP-ST-ZEROS", name)
            zero = _unsigned(zero, bits)
        elif int(zero) >> bits:
            raise CheckpointError("QP-ST-ZEROS", name, f"is {int(zero)}", expected=f"0 to {(1 << bits) - 1}")
        return ActivationParams(scale, zero.reshape(()))

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """
        Turn canonical form into stored tensors, single numbers as `[1]`, zero points as int8.

        Raises:
            ConvertError: `QP-CONV-SPEC` when the weight or what is known about x does not obey this scheme's contract.
        """
        self._check_contract(weight)
        size, _ = self._scale_shapes(LinearShape(*weight.codes.shape))
        codes = weight.codes if self.symmetric else _signed(weight.codes, self.bits)
        stored = {"weight": codes.contiguous(), self.scale_name: weight.scales.reshape(size).contiguous()}
        if weight.zeros is not None:
            stored["weight_zero_point"] = _signed(weight.zeros, self.bits).reshape(size).contiguous()
        if self.activation is not None and not self.activation.dynamic:
            stored |= self._encode_activation(activation, weight.scales.dtype)
        return stored

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """
        Round to nearest on scales that span each range, bfloat16. A Hessian changes nothing.

        Raises:
            ConvertError: `QP-CONV-SPEC` for stored scales of x, which only a calibration could find.
        """
        from quantplug.weight import Weight
        from quantplug_int8.rounding import round_to_nearest

        if self.activation is not None and not self.activation.dynamic:
            raise self._broken("scales of x, which were never measured", "a dynamic activation")
        rounded = round_to_nearest(dense.detach(), self.granularity, self.bits, symmetric=self.symmetric)
        return Weight(rounded.codes, rounded.scales, self.weight_spec(), rounded.zeros)

    def _scale_shapes(self, shape: LinearShape) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Return the shape that scales are stored in, and others that writers use."""
        match self.granularity:
            case PerTensor():
                return (1,), _ONE
            case PerChannel():
                return (shape.out_features, 1), ((shape.out_features,),)
            case _:
                return scale_shape(self.granularity, shape.out_features, shape.in_features), ()

    def _encode_activation(self, activation: ActivationParams | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return `input_scale`, in the dtype of the weight's scales where that holds it, and `input_zero_point`."""
        import torch

        unsigned = self.activation is not None and not self.activation.element.signed
        if activation is None or activation.scale is None or (activation.zero is not None) != unsigned:
            raise self._broken("what is not known about x", "its scale" + (" and zero point" if unsigned else ""))
        scale = activation.scale.to(dtype)
        if not torch.equal(scale.to(torch.float32), activation.scale):
            scale = activation.scale
        stored = {"input_scale": scale.reshape(1)}
        if self.activation is not None and activation.zero is not None:
            stored["input_zero_point"] = _signed(activation.zero, self.activation.element.bits).reshape(1)
        return stored

    def _check_contract(self, weight: Weight) -> None:
        want = replace(self.weight_spec(), scale_dtype=weight.spec.scale_dtype)
        if weight.spec != want or weight.spec.scale_dtype not in _SCALES:
            raise self._broken(f"a weight of {weight.spec.describe()}", want.describe())
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


def _unsigned(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Raise int8 values by half their range, to uint8; a sum of bytes is modulo 256, so it is exact."""
    import torch

    return values.view(torch.uint8) + (1 << (bits - 1))


def _signed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Take the half again: the inverse of `_unsigned`."""
    import torch

    return (values - (1 << (bits - 1))).view(torch.int8)


def _fitting(scales: tuple[int, ...], shape: LinearShape) -> str:
    """Say which strategy the shape of the scales would fit, for an error that refuses that of the configuration."""
    n, k = shape.out_features, shape.in_features
    for strategy, fits in (("tensor", ((1,), *_ONE)), ("channel", ((n, 1), (n,)))):
        if scales in fits:
            return f"That fits strategy {strategy!r}; correct the configuration if it is wrong."
    if len(scales) == 2 and scales[0] == n and 1 < scales[1] <= k:
        return f"That fits strategy 'group' with group_size {-(-k // scales[1])}; correct the configuration if so."
    return "That fits no strategy of this format but blocks of another size, if any."
