"""
The hook a format implements: what a file stores for one linear layer, and what those bytes mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from quantplug.jsonio import Json
    from quantplug.spec import ActivationSpec, LinearShape, ParamSpec, WeightSpec
    from quantplug.weight import ActivationParams, Weight


class LinearScheme(ABC):
    """
    One number format as stored in files, for one set of parameters (bits, group size, …).

    A plugin author writes two files: `plugin.py`, whose `quantplug_schemes` returns this class, and the module that
    holds the class. Both import without torch: planning asks for `params` and `weight_spec` on machines that have none.
    Instances are immutable and shared by all layers with the same parameters.
    """

    name: ClassVar[str]
    """The scheme's name in configurations and plans ("gptq"); `[a-z0-9_.-]{1,64}`, unique among installed plugins."""

    suffixes: ClassVar[frozenset[str]]
    """
    Names after the module path of every tensor the format may store ("qweight", …), but not "bias".

    A format that stores its codes as "weight" lists that, too; a `weight` in float16, bfloat16 or float32 still is what
    a layer that stayed whole has.
    """

    @property
    @abstractmethod
    def required_suffixes(self) -> frozenset[str]:
        """Those without which a layer of this format is incomplete."""

    @property
    def divisors(self) -> frozenset[str]:
        """Those of the stored scales of a weight that its values are divided by; all others multiply."""
        return frozenset()

    @classmethod
    @abstractmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """
        Return the scheme for one set of parameters, as a dialect or a caller spelled them.

        Called once per distinct set while planning.

        Args:
            params: plain JSON values.
            where: where they come from, for messages ("config.json: quantization_config").

        Raises:
            ConfigError: `QP-CFG-FIELD` or `QP-CFG-UNKNOWN`; a bool is not an int here, and "4" is not 4.
        """

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, Json]]:
        """
        Return the names under which dense weights can be quantized to this format, with the parameters of each.

        `{"int4-g32": {"bits": 4, "group_size": 32}}` makes `quantplug.load(…, quantize="int4-g32")` and
        `quantplug convert --quantize int4-g32` possible. Names are unique among installed plugins.
        """
        return {}

    @abstractmethod
    def describe(self) -> str:
        """Return a short human form for tables ("gptq 4-bit group 64 sym")."""

    @abstractmethod
    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """
        Return the logical size of a layer from the shapes of its stored tensors (`{suffix: shape}`).

        Called once per layer while planning from a bare checkpoint; reads no data.

        Raises:
            CheckpointError: `QP-ST-SHAPE` when the shapes do not describe a layer of this format.
        """

    def check_metadata(  # noqa: B027  # most writers describe nothing there
        self, described: Mapping[str, str], stored: Mapping[str, tuple[int, ...]], where: str
    ) -> None:
        """
        Hold what a file's `__metadata__` says about one layer against this scheme and the stored tensors.

        For formats whose writers describe each tensor there. Called once per layer while planning, before anything else
        about it is looked at, also where a dense weight is stored; never called for a layer that no file describes.

        Args:
            described: `{suffix: text}`, for every key of `__metadata__` that is the layer's path, a dot and a suffix.
            stored: `{suffix: shape}` of all tensors of the layer, those of other formats included.
            where: path of the layer.

        Raises:
            ConfigError: `QP-CFG-CONTRADICTION`, or `QP-CFG-REFUSED` for what is known and not read.
        """

    @abstractmethod
    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """
        Declare what a checkpoint holds for one layer of that size; allocates nothing.

        Raises:
            ConfigError: `QP-CFG-FIELD` when the format cannot describe a layer of that size.
        """

    def written(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """
        Declare what `encode` writes for a layer of that size that `quantize` made, in the first of the dtypes.

        A conversion announces these before it has read a weight. Unless a scheme says otherwise they are the tensors
        that a checkpoint cannot do without.
        """
        return tuple(spec for spec in self.params(shape) if spec.required)

    @abstractmethod
    def weight_spec(self) -> WeightSpec:
        """Return the numeric contract that `decode` yields, with the scale dtype that is usual; see `stored_spec`."""

    @property
    def scale_suffixes(self) -> frozenset[str]:
        """Of the tensors it stores, the scales that `decode` hands over in whatever dtype they are stored."""
        return frozenset()

    def stored_spec(self, dtypes: Mapping[str, str]) -> WeightSpec:
        """Return the contract that `decode` yields for tensors stored in these torch dtypes (`{suffix: name}`)."""
        kept = [dtypes[suffix] for suffix in sorted(self.scale_suffixes) if suffix in dtypes]
        return replace(self.weight_spec(), scale_dtype=kept[0]) if kept else self.weight_spec()

    def activation_spec(self) -> ActivationSpec | None:
        """Return the file's permission to quantize activations; None for weight-only formats."""
        return None

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """
        Turn one layer's stored tensors (`{suffix: tensor}`, as `params` declares them) into canonical form.

        Called once per layer while loading, on the CPU. The tensors stay the caller's and are not modified; the result
        is fresh, or shares storage where a stored tensor already is canonical.

        Raises:
            CheckpointError: `QP-ST-…` naming `where` and the element, when values are not what the format allows.
        """

    def decode_activation(self, tensors: Mapping[str, torch.Tensor], where: str) -> ActivationParams | None:
        """
        Return what the stored tensors say about activations, None for a format that stores nothing of the kind.

        Called once per layer while loading, with the same tensors as `decode`.

        Raises:
            CheckpointError: `QP-ST-…` as `decode`.
        """
        return None

    @abstractmethod
    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """
        Turn canonical form into stored tensors: the exact inverse of `decode` and `decode_activation`, up to
        normalisations that the format's SPEC.md declares.
        """

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """
        Turn a dense weight into canonical form, or raise `NotImplementedError` (a format that only reads).

        Args:
            dense: `[N, K]`, any float dtype, finite.
            hessian: float32 `[K, K]`, the sum of x^T x over a calibration text, or None for data-free quantization.
        """
        raise NotImplementedError(f"scheme {self.name} only reads")
