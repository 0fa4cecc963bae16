"""
FP8 as a number format: what a file stores for one layer, and the way to canonical form and back (SPEC.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from quantplug.errors import CheckpointError, ConfigError, ConvertError
from quantplug.scheme import LinearScheme
from quantplug.spec import LinearShape, ParamSpec, PerBlock, PerChannel, PerGroup, PerTensor, WeightSpec, scale_shape
from quantplug.stored import check_stored
from quantplug_fp8 import parameters
from quantplug_fp8.parameters import EITHER, INPUT_NAMES, SCALE_NAMES
from quantplug_fp8.shapes import fitting

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, ElementType, Granularity
    from quantplug.weight import ActivationParams, Weight

_WEIGHT = "weight"
_DTYPES = ("float32", "bfloat16", "float16")
_POWERS_OF_TWO = "float8_e8m0fnu"
_BY_TOKEN, _BY_BLOCK = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/group128/dynamic"


@dataclass(frozen=True, slots=True)
class FP8Scheme(LinearScheme):
    """
    One set of FP8 parameters.

    Attributes:
        element: type of the codes.
        granularity: how scales are shared.
        scale_name: suffix of the scales, or "either": the file has one of the two spellings, and the activation scale
            in one of two, too.
        activation: permission to quantize x; a static one is stored.
        inverse: whether the stored scales divide.
    """

    name: ClassVar[str] = "fp8"
    suffixes: ClassVar[frozenset[str]] = frozenset({_WEIGHT, *SCALE_NAMES, *INPUT_NAMES})

    element: ElementType
    granularity: Granularity
    scale_name: str = SCALE_NAMES[0]
    activation: ActivationSpec | None = None
    inverse: bool = False

    @property
    def required_suffixes(self) -> frozenset[str]:
        """The weight, and the scales wherever their names are certain."""
        certain = [names[0] for names in self._stored_names() if len(names) == 1]
        return frozenset({_WEIGHT, *certain})

    @property
    def divisors(self) -> frozenset[str]:
        """The scales, where they are stored as reciprocals."""
        return frozenset(self._stored_names()[0]) if self.inverse else frozenset()

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Read the parameters; all have defaults but `group_size`.

        Raises:
            ConfigError: `QP-CFG-FIELD`, `QP-CFG-UNKNOWN`.
        """
        unknown = sorted(params.keys() - set(parameters.KEYS))
        if unknown:
            raise ConfigError(
                "QP-CFG-UNKNOWN",
                f"{where}: {unknown[0]}",
                "is no parameter of fp8",
                expected=" or ".join(parameters.KEYS),
            )
        return cls(
            parameters.read_element(params, where),
            parameters.read_granularity(params, where),
            parameters.read_scale_name(params, where),
            parameters.read_permission(params, where),
            parameters.read_inverse(params, where),
        )

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, Json]]:
        """Offer one scale per row, per tensor, or per 128 x 128 block, each with dynamic activations."""
        return {
            "fp8": {"strategy": "channel", "activation": _BY_TOKEN},
            "fp8-tensor": {"strategy": "tensor", "activation": _BY_TOKEN},
            "fp8-block": {"strategy": "block", "block_n": 128, "block_k": 128, "activation": _BY_BLOCK},
        }

    def describe(self) -> str:
        """Return "fp8 e4m3fn block 128x128, x float8_e4m3fn group 128, dynamic", for instance."""
        kind = self.element.removeprefix("float8_")
        shared = self.weight_spec().describe().removeprefix(f"{self.element} ")
        shared += ", scales divide" if self.inverse else ""
        return f"fp8 {kind} {shared}" + (f", x {self.activation.describe()}" if self.activation else "")

    @property
    def scale_suffixes(self) -> frozenset[str]:
        """Scales keep the dtype of the file, but divisors become reciprocals."""
        return frozenset() if self.inverse else frozenset(self._stored_names()[0])

    def weight_spec(self) -> WeightSpec:
        """Return the codes as stored; scales are float32 unless a file has narrower ones."""
        return WeightSpec(self.element, self.granularity, _DTYPES[0])

    def activation_spec(self) -> ActivationSpec | None:
        """Return the permission."""
        return self.activation

    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """Declare the weight, its scales, and for static activations their scale; alternatives are optional each."""
        n, k = shape.out_features, shape.in_features
        specs = [ParamSpec(_WEIGHT, (n, k), (self.element.value,), output_axis=0, input_axis=1)]
        scales, inputs = self._stored_names()
        size, others = self._scale_shapes(n, k)
        fine = isinstance(self.granularity, PerGroup | PerBlock)
        output_axis = None if isinstance(self.granularity, PerTensor) else 0
        for name in scales:
            dtypes = _DTYPES[:1] if self.inverse else (*_DTYPES, _POWERS_OF_TWO) if fine else _DTYPES
            specs.append(
                ParamSpec(
                    name, size, dtypes, len(scales) == 1, output_axis=output_axis, input_axis=1 if fine else None,
                    other_shapes=others,
                )
            )  # fmt: skip
        specs += [ParamSpec(name, (1,), _DTYPES, len(inputs) == 1, other_shapes=((),)) for name in inputs]
        return tuple(specs)

    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """
        Return the size of the weight, whose layout is that of a dense one.

        Raises:
            CheckpointError: `QP-ST-MISSING`; `QP-ST-EXTRA` for a scale in two spellings; `QP-ST-SHAPE` with what the
                shapes would fit.
        """
        for names in ((_WEIGHT,), *filter(None, self._stored_names())):
            self._only(names, stored, where)
        size = stored[_WEIGHT]
        if len(size) != 2:
            raise CheckpointError(
                "QP-ST-SHAPE", f"{where}.{_WEIGHT}", f"shape {list(size)}", expected="two dimensions, [N, K]"
            )
        shape = LinearShape(*size)
        for spec in self.params(shape):
            allowed = (spec.shape, *spec.other_shapes)
            if spec.suffix in stored and stored[spec.suffix] not in allowed:
                raise CheckpointError(
                    "QP-ST-SHAPE",
                    f"{where}.{spec.suffix}",
                    f"shape {list(stored[spec.suffix])}",
                    expected=f"{' or '.join(str(list(one)) for one in allowed)} for {self.describe()} and a weight "
                    f"{list(size)}",
                    fix=fitting(stored[spec.suffix], shape) if spec.suffix in SCALE_NAMES else "",
                )
        return shape

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """
        Hand the stored weight over as it is, with its scales in canonical shape and their own dtype.

        Scales that divide become their reciprocals in float64, from which the stored numbers come back (SPEC.md).

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-EXTRA`, `QP-ST-DTYPE`, `QP-ST-SHAPE`, `QP-ST-CODE`, `QP-ST-SCALE`.
        """
        import torch

        from quantplug.weight import Weight
        from quantplug_fp8 import checks
        from quantplug_fp8.tiles import tile_of

        check_stored(self.params(shape), tensors, where)
        name = self._only(self._stored_names()[0], tensors, where)
        n, k = shape.out_features, shape.in_features
        codes, scales = tensors[_WEIGHT], tensors[name].reshape(scale_shape(self.granularity, n, k))
        checks.check_codes(codes, self.element, f"{where}.{_WEIGHT}")
        if self.inverse:
            checks.check_divisors(scales, f"{where}.{name}")
            return Weight(codes, scales.to(torch.float64).reciprocal(), self.weight_spec())
        checks.check_scales(scales, codes, tile_of(self.granularity, n, k), f"{where}.{name}")
        dtype = str(scales.dtype).removeprefix("torch.")
        return Weight(codes, scales, replace(self.weight_spec(), scale_dtype=dtype))

    def decode_activation(self, tensors: Mapping[str, torch.Tensor], where: str) -> ActivationParams | None:
        """
        Return the stored scale of x, None where scales are dynamic.

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-EXTRA`, `QP-ST-SCALE`.
        """
        import torch

        from quantplug.weight import ActivationParams
        from quantplug_fp8 import checks

        names = self._stored_names()[1]
        if not names:
            return None
        name = self._only(names, tensors, where)
        checks.check_input_scale(tensors[name], f"{where}.{name}")
        return ActivationParams(scale=tensors[name].to(torch.float32).reshape(()))

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """
        Turn canonical form into stored tensors; with scale_name "either", a scale is given in both spellings, one of
        which the file had.

        Raises:
            ConvertError: `QP-CONV-SPEC` when the weight does not obey this scheme's contract.
        """
        import torch

        self._check_contract(weight)
        n, k = weight.codes.shape
        scales, inputs = self._stored_names()
        numbers = weight.scales.reciprocal().to(torch.float32) if self.inverse else weight.scales
        stored = dict.fromkeys(scales, numbers.reshape(self._scale_shapes(n, k)[0]).contiguous())
        if inputs:
            if activation is None or activation.scale is None:
                raise self._broken("a layer without a scale of x", "the scale that static activations need")
            # Writers give both scales one dtype; float32 is what a scale of x is held in.
            narrow = activation.scale.to(weight.scales.dtype)
            exact = bool(narrow.to(torch.float32) == activation.scale)
            stored |= dict.fromkeys(inputs, (narrow if exact else activation.scale).reshape(1))
        return {_WEIGHT: weight.codes.contiguous(), **stored}

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """
        Round to nearest with the least scales that cover each tile; a Hessian changes nothing.

        Raises:
            ConvertError: `QP-CONV-SCHEME` for parameters that only describe files: static activations, whose scale
                weights do not tell, a scale name that is not certain, and scales that divide.
        """
        import torch

        from quantplug.weight import Weight
        from quantplug_fp8.tiles import round_to_nearest

        what = ""
        if self.scale_name == EITHER:
            what = "does not say which name scales get"
        elif self._stored_names()[1]:
            what = "needs calibrated activations"
        elif self.inverse:
            what = "stores scales as reciprocals, which are read only"
        if what:
            raise ConvertError(
                "QP-CONV-SCHEME",
                self.describe(),
                what,
                expected=f"scale_name {' or '.join(SCALE_NAMES)}, dynamic activations or none, scales that multiply",
            )
        codes, scales = round_to_nearest(dense, self.granularity, getattr(torch, self.element))
        return Weight(codes, scales, self.weight_spec())

    def _stored_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names that the weight's scales may have, and the scale of x; () for one that is not stored."""
        uncertain = self.scale_name == EITHER
        inputs = INPUT_NAMES if uncertain else INPUT_NAMES[:1]
        static = self.activation is not None and not self.activation.dynamic
        return SCALE_NAMES if uncertain else (self.scale_name,), inputs if static else ()

    def _scale_shapes(self, n: int, k: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Return the shape of scales that is written, and those that are read besides."""
        size = scale_shape(self.granularity, n, k)
        match self.granularity:
            case PerTensor():
                return (1,), ((), (1, 1))
            case PerChannel():
                return size, ((n,),)
            case PerGroup():
                return size, ()
            case PerBlock():
                return size, ((size[0], 1, size[1], 1),)

    def _only(self, names: tuple[str, ...], stored: Iterable[str], where: str) -> str:
        """Return the one of several spellings that is stored."""
        found = [name for name in names if name in stored]
        if len(found) == 1:
            return found[0]
        raise CheckpointError(
            "QP-ST-EXTRA" if found else "QP-ST-MISSING",
            where,
            f"stores both {' and '.join(found)}" if found else f"has no {' or '.join(names)}",
            expected=f"one of them: every tensor of {self.describe()}, once",
            fix="The file is incomplete or was written wrongly; download it again or ask its maker.",
        )

    def _check_contract(self, weight: Weight) -> None:
        want = replace(self.weight_spec(), scale_dtype=weight.spec.scale_dtype)
        if weight.spec != want or weight.zeros is not None or weight.g_idx is not None:
            raise self._broken(f"a weight of {weight.spec.describe()}", want.describe())
        n, k = weight.codes.shape
        shape = scale_shape(self.granularity, n, k)
        if tuple(weight.scales.shape) != shape:
            raise self._broken(f"scales {list(weight.scales.shape)}", f"{list(shape)}")
        if self.inverse and str(weight.scales.dtype) != "torch.float64":
            raise self._broken(f"scales in {weight.scales.dtype}", "reciprocals in float64, which tell what was stored")

    def _broken(self, what: str, expected: str) -> ConvertError:
        return ConvertError("QP-CONV-SPEC", self.describe(), f"cannot store {what}", expected=expected)
