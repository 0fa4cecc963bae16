"""
What the three formats share: codes in groups along K, and what a file stores of one layer (SPEC.md).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quantplug.errors import CheckpointError, ConfigError, ConvertError
from quantplug.scheme import LinearScheme
from quantplug.spec import ElementType, LinearShape, ParamSpec, PerGroup, WeightSpec
from quantplug_mx.parameters import EITHER, INPUT_SCALE, SCALE_NAMES
from quantplug_mx.shapes import check_shapes, check_suffixes, matrix

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch

    from quantplug.spec import ActivationSpec
    from quantplug.weight import ActivationParams, Weight


@dataclass(frozen=True)
class GroupedScheme(LinearScheme):
    """
    A format whose codes share a scale with their neighbours along K.

    Attributes:
        weight_name: suffix of the codes.
        scale_name: suffix of the scales, or "either" of the two that are in use.
        activation: the permission to quantize x.
    """

    element: ClassVar[ElementType]
    group: ClassVar[int]
    """Inputs per scale."""
    codes_per_byte: ClassVar[int]
    weight_dtype: ClassVar[str]
    """What codes are stored as, and held as in canonical form."""
    scale_dtypes: ClassVar[tuple[str, ...]]
    """What scales are stored as, the one that is written first."""
    scale_dtype: ClassVar[str]
    """What scales are held as in canonical form."""
    has_global_scale: ClassVar[bool] = False

    weight_name: str
    scale_name: str
    activation: ActivationSpec | None

    @property
    def required_suffixes(self) -> frozenset[str]:
        """All that `params` declares; where the scales have either of two names, neither of those."""
        return frozenset(spec.suffix for spec in self.params(LinearShape(2, 2)) if spec.required)

    def describe(self) -> str:
        """Return "mxfp8, x float8_e4m3fn group 32, dynamic", for instance."""
        return self.name + (f", x {self.activation.describe()}" if self.activation else "")

    def weight_spec(self) -> WeightSpec:
        """Return the element, groups along K, and whether a factor multiplies all scales."""
        return WeightSpec(self.element, PerGroup(self.group), self.scale_dtype, global_scale=self.has_global_scale)

    def activation_spec(self) -> ActivationSpec | None:
        """Return the permission as it was spelled."""
        return self.activation

    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """
        Declare codes, scales, and what the format has besides.

        Raises:
            ConfigError: `QP-CFG-FIELD` when codes share bytes and K is odd.
        """
        n, k = shape.out_features, shape.in_features
        if k % self.codes_per_byte:
            raise ConfigError(
                "QP-CFG-FIELD",
                f"{self.describe()}: in_features",
                f"is {k}",
                expected=f"a multiple of {self.codes_per_byte}: so many codes share a byte",
            )
        packed = (self.codes_per_byte, 1)
        names = SCALE_NAMES if self.scale_name == EITHER else (self.scale_name,)
        scales = tuple(
            ParamSpec(name, (n, -(-k // self.group)), self.scale_dtypes, len(names) == 1, output_axis=0, input_axis=1)
            for name in names
        )
        return (
            ParamSpec(
                self.weight_name, (n, k // self.codes_per_byte), (self.weight_dtype,),
                packed_axis=None if self.codes_per_byte == 1 else 1, packed_factor=packed, output_axis=0, input_axis=1,
            ),
            *scales,
            *self._single_params(),
        )  # fmt: skip

    def written(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """Declare what is stored, scales under the one name that they are written under."""
        name = self._written_scale_name
        return tuple(spec for spec in self.params(shape) if spec.required or spec.suffix == name)

    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """
        Return N and K from the codes.

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-EXTRA`, or `QP-ST-SHAPE` with what a shape looks like.
        """
        check_suffixes(stored, self.params(LinearShape(2, 2)), where, self.describe())
        self._stored_scale_name(stored, where)
        n, bytes_per_row = matrix(stored, self.weight_name, where)
        shape = LinearShape(n, bytes_per_row * self.codes_per_byte)
        check_shapes(stored, self.params(shape), where, f"{self.describe()} of {n} x {shape.in_features}")
        return shape

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """
        Turn stored tensors into canonical form; whatever is not packed is shared, not copied.

        Raises:
            CheckpointError: `QP-ST-MISSING`, `QP-ST-EXTRA`, `QP-ST-DTYPE`, `QP-ST-SHAPE`, `QP-ST-CODE`, `QP-ST-SCALE`.
        """
        from quantplug_mx.checks import check_dtypes

        specs = self.params(shape)
        check_suffixes(tensors, specs, where, self.describe())
        scale_name = self._stored_scale_name(tensors, where)
        check_dtypes(tensors, specs, where)
        check_shapes(
            {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}, specs, where,
            f"{self.describe()} of {shape.out_features} x {shape.in_features}",
        )  # fmt: skip
        return self._decode(tensors, scale_name, where)

    def decode_activation(self, tensors: Mapping[str, torch.Tensor], where: str) -> ActivationParams | None:
        """Return the one stored scale of x, where scales of x are static; raises `CheckpointError` (`QP-ST-SCALE`)."""
        from quantplug.weight import ActivationParams
        from quantplug_mx.checks import check_single

        if self.activation is None or self.activation.dynamic:
            return None
        scale = tensors[INPUT_SCALE].reshape(())
        check_single(scale, f"{where}.{INPUT_SCALE}")
        return ActivationParams(scale=scale)

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """
        Turn canonical form into stored tensors.

        Raises:
            ConvertError: `QP-CONV-SPEC` when the weight, or what is known about x, does not obey the contract.
        """
        self._check_contract(weight)
        stored = self._encode(weight)
        if self.activation is not None and not self.activation.dynamic:
            if activation is None or activation.scale is None:
                raise self._broken("an unknown scale of x", "one that was measured")
            stored[INPUT_SCALE] = activation.scale.reshape(())
        return stored

    @abstractmethod
    def _decode(self, tensors: Mapping[str, torch.Tensor], scale_name: str, where: str) -> Weight:
        """Return the weight that tensors of the right names, dtypes and shapes stand for; check their values."""

    @abstractmethod
    def _encode(self, weight: Weight) -> dict[str, torch.Tensor]:
        """Return the stored tensors of a weight that obeys the contract."""

    def _single_params(self) -> tuple[ParamSpec, ...]:
        """Declare what is one number per layer."""
        if self.activation is None or self.activation.dynamic:
            return ()
        return (ParamSpec(INPUT_SCALE, (), ("float32",), other_shapes=((1,),)),)

    def _stored_scale_name(self, stored: Collection[str], where: str) -> str:
        """Return the suffix that the scales have in a layer."""
        if self.scale_name != EITHER:
            return self.scale_name
        found = [name for name in SCALE_NAMES if name in stored]
        if len(found) == 1:
            return found[0]
        both = " or ".join(SCALE_NAMES)
        if not found:
            raise CheckpointError(
                "QP-ST-MISSING", f"{where}: its scales", "are not there", expected=f"{both}, for {self.describe()}"
            )
        raise CheckpointError(
            "QP-ST-EXTRA",
            f"{where}: its scales",
            "are stored twice",
            expected=f"{both}, not both",
            fix="The file was merged from two; ask its maker which of them belong to the codes.",
        )

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return bytes of two codes each."""
        from quantplug_mx.layout import pack_nibbles

        if codes.numel() and int(codes.max()) >> self.element.bits:
            raise self._broken(f"the code {int(codes.max())}", f"{self.element.bits} bits")
        return pack_nibbles(codes)

    @property
    def _written_scale_name(self) -> str:
        return SCALE_NAMES[1] if self.scale_name == EITHER else self.scale_name

    def _check_contract(self, weight: Weight) -> None:
        import torch

        n, k = weight.codes.shape
        want = self.weight_spec()
        if weight.spec != want:
            raise self._broken(f"a weight of {weight.spec.describe()}, scales {weight.spec.scale_dtype}",
                               f"{want.describe()}, scales {want.scale_dtype}")  # fmt: skip
        if k % self.codes_per_byte:
            raise self._broken(f"{k} inputs", f"a multiple of {self.codes_per_byte}")
        if tuple(weight.scales.shape) != (n, -(-k // self.group)):
            raise self._broken(f"scales {list(weight.scales.shape)}", f"{[n, -(-k // self.group)]}")
        for name, tensor, dtype in (("codes", weight.codes, self.weight_dtype),
                                    ("scales", weight.scales, self.scale_dtype)):  # fmt: skip
            if tensor.dtype != getattr(torch, dtype):
                raise self._broken(f"{name} in {tensor.dtype}", dtype)
        if (weight.global_scale is not None) != self.has_global_scale or weight.g_idx is not None:
            raise self._broken("other tensors than its own", "a global scale" if self.has_global_scale else "no others")

    def _broken(self, what: str, expected: str) -> ConvertError:
        return ConvertError("QP-CONV-SPEC", self.describe(), f"cannot store {what}", expected=expected)
