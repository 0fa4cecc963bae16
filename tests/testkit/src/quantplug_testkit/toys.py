"""
A toy format, dialect and kernels: the smallest plugins that exercise the whole core without any real format.

The toy format stores `codes` int8 `[N, K]` and `scale` float32 `[N, 1]`; `value = code * scale`. Its configuration says
`{"quant_method": "toy", "keep": [paths]}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from quantplug.config import Dialect, Field, QuantConfig, RawConfig
from quantplug.entries import path_entries
from quantplug.errors import CheckpointError, ConfigError
from quantplug.hooks import hookimpl
from quantplug.kernel import Accepted, Cost, LinearKernel, Rejected, Traits, Verdict
from quantplug.reference import ReferenceKernel
from quantplug.scheme import LinearScheme
from quantplug.skip import Rule, SchemeRef
from quantplug.spec import ElementType, LinearShape, ParamSpec, PerChannel, WeightSpec
from quantplug.weight import ActivationParams, Weight

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from quantplug.jsonio import Json
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem

quantplug_api = ">=1,<2"

SLOW_US = 1e6
"""What the toy kernels claim that dequantizing takes, so that the core's product that does so is never worth it."""


class ToyScheme(LinearScheme):
    """Symmetric int8 with one float32 scale per output row."""

    name = "toy"
    suffixes = frozenset({"codes", "scale"})

    def __init__(self, limit: int) -> None:
        self._limit = limit

    @property
    def required_suffixes(self) -> frozenset[str]:
        """Both."""
        return self.suffixes

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, Json]]:
        """Offer the format for dense weights, too."""
        return {"toy": {}, "toy-7": {"limit": 7}}

    @classmethod
    def build(cls, params: Mapping[str, Json], where: str) -> Self:
        """Accept one optional parameter, `limit`, the largest code."""
        limit = params.get("limit", 127)
        if type(limit) is not int or not 1 <= limit <= 127:
            raise ConfigError("QP-CFG-FIELD", f"{where}.limit", repr(limit), expected="1 … 127")
        return cls(limit)

    def describe(self) -> str:
        """Return the format in words."""
        return f"toy limit {self._limit}"

    def shape_of(self, stored: Mapping[str, tuple[int, ...]], where: str) -> LinearShape:
        """Read the size off the codes."""
        shape = stored["codes"]
        if len(shape) != 2:
            raise CheckpointError("QP-ST-SHAPE", where, f"codes are {list(shape)}", expected="[N, K]")
        return LinearShape(*shape)

    def params(self, shape: LinearShape) -> tuple[ParamSpec, ...]:
        """Declare the two tensors."""
        return (
            ParamSpec("codes", (shape.out_features, shape.in_features), ("int8",)),
            ParamSpec("scale", (shape.out_features, 1), ("float32",)),
        )

    def weight_spec(self) -> WeightSpec:
        """Return the contract."""
        return WeightSpec(ElementType.INT8, PerChannel(), "float32")

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: LinearShape, where: str) -> Weight:
        """Hand the stored tensors over as they are."""
        if bool(torch.isnan(tensors["scale"]).any()):
            raise CheckpointError("QP-ST-SCALE", f"{where}.scale", "is NaN", expected="finite scales")
        return Weight(tensors["codes"], tensors["scale"], self.weight_spec())

    def encode(self, weight: Weight, activation: ActivationParams | None = None) -> dict[str, torch.Tensor]:
        """Hand them back."""
        return {"codes": weight.codes.contiguous(), "scale": weight.scales}

    def quantize(self, dense: torch.Tensor, *, hessian: torch.Tensor | None = None) -> Weight:
        """Round to nearest."""
        scale = (dense.float().abs().amax(1, keepdim=True) / self._limit).clamp_min(1e-8)
        return Weight((dense.float() / scale).round().to(torch.int8), scale, self.weight_spec())


class ToyDialect(Dialect):
    """Reads and writes `{"quant_method": "toy", "keep": […], "limit": …}`."""

    name = "toy"
    methods = ("toy",)
    files = ("toy_config.json",)
    writes = frozenset({"toy"})

    def parse(self, raw: RawConfig) -> QuantConfig:
        """Every key but `keep` is a parameter of the scheme."""
        keep = raw.fields.get("keep", [])
        if not isinstance(keep, list) or not all(isinstance(text, str) for text in keep):
            raise ConfigError("QP-CFG-FIELD", raw.origin("keep"), repr(keep), expected="a list of paths")
        params = {k: v for k, v in raw.fields.items() if k not in ("quant_method", "keep")}
        return QuantConfig(
            self.name,
            SchemeRef("toy", tuple(sorted(params.items()))),
            tuple(Rule(entry) for entry in path_entries([str(text) for text in keep], raw.origin("keep"))),
            tuple(Field(key, value, raw.origin(key)) for key, value in raw.fields.items()),
        )

    def write(self, base: SchemeRef, layers: Mapping[str, SchemeRef], dense: Collection[str]) -> dict[str, Json]:
        """Spell the dense layers out."""
        return {"quant_method": "toy", "keep": list(dense), **dict(base.params)}


class ToyKernel(ReferenceKernel):
    """The reference kernel under another name, cheaper, for the CPU and one segment contract only."""

    name = "toy.fast"
    layout_id = "toy"
    traits = Traits(uniform_segments=True, differentiable=True, tangents=True)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept K that is a multiple of 16 on a CPU."""
        if platform.kind != "cpu":
            return Rejected("platform", f"runs on cpu, not on {platform}")
        if problem.in_features % 16:
            return Rejected("shape", f"in_features {problem.in_features} is not a multiple of 16", "pad K")
        return Accepted(Cost(5.0, 2.0), dequantize_us=SLOW_US)


class ToyManyRows(ToyKernel):
    """Shares the layout of `toy.fast`; dearer for one row, cheaper from about 10 on."""

    name = "toy.many"

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        """Accept what `toy.fast` accepts."""
        verdict = super().supports(problem, platform)
        return Accepted(Cost(20.0, 0.5), dequantize_us=SLOW_US) if isinstance(verdict, Accepted) else verdict


@hookimpl
def quantplug_schemes() -> Sequence[type[LinearScheme]]:
    """Return the toy scheme."""
    return [ToyScheme]


@hookimpl
def quantplug_dialects() -> Sequence[Dialect]:
    """Return the toy dialect."""
    return [ToyDialect()]


@hookimpl
def quantplug_kernels() -> Sequence[LinearKernel]:
    """Return the toy kernels."""
    return [ToyKernel(), ToyManyRows()]
