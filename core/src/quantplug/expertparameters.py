"""
The stored tensors of experts as parameters that a framework's own loader fills: one for all experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.errors import LoadError
from quantplug.evidence import BIAS_SUFFIX, DENSE_DTYPES, DENSE_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from quantplug.moe import MoEProblem
    from quantplug.plan import LayerPlan, Segment
    from quantplug.scheme import LinearScheme


@dataclass(frozen=True, slots=True)
class OneExpert:
    """
    What one expert has of a stacked parameter.

    Attributes:
        shape: its share of the parameter.
        dtypes: torch names of the dtypes that it may have.
        other_shapes: in which its tensor may come, too.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    other_shapes: tuple[tuple[int, ...], ...] = ()


def stacked_parameters(layer: LayerPlan, schemes: Sequence[LinearScheme], problem: MoEProblem) -> dict[str, OneExpert]:
    """
    Return the parameters of a layer of experts by name ("gate_proj_qweight").

    Args:
        layer: its plan.
        schemes: that of each of its segments.
        problem: what it runs.

    Raises:
        LoadError: `QP-LOAD-PREPARE` when experts are stored in different shapes, so that they cannot be stacked.
    """
    projections = layer.experts.files.projections if layer.experts is not None else ()
    result: dict[str, OneExpert] = {}
    for place, projection in enumerate(projections):
        count = len(projections)
        found = [
            _tensors(segment, scheme, problem)
            for segment, scheme in zip(layer.segments[place::count], schemes[place::count], strict=True)
        ]
        if any(one != found[0] for one in found):
            raise LoadError(
                "QP-LOAD-PREPARE", layer.path, f"its experts store {projection} in different shapes",
                expected="experts that can be stacked", fix="Load them with quantplug.load_layers.",
            )  # fmt: skip
        result |= {f"{projection}_{suffix}": one for suffix, one in found[0].items()}
    return result


def load_expert(
    load: Callable[..., None], one: OneExpert, parameter: torch.nn.Parameter, tensor: torch.Tensor, expert: int
) -> None:
    """Load one expert's tensor into its place in a stacked parameter, with the loader of the whole of it."""
    if tuple(tensor.shape) in one.other_shapes:
        tensor = tensor.reshape(one.shape)
    load(parameter, tensor.unsqueeze(0), (expert, *(0 for _ in one.shape)))


def _tensors(segment: Segment, scheme: LinearScheme, problem: MoEProblem) -> Mapping[str, OneExpert]:
    stored, dense = dict(segment.tensors), (problem.dtype, *DENSE_DTYPES)
    found: dict[str, OneExpert] = {}
    if segment.quantize:
        found[DENSE_SUFFIX] = OneExpert((segment.shape.out_features, segment.shape.in_features), dense)
    for spec in () if segment.quantize else scheme.params(segment.shape):
        if spec.suffix in stored:
            found[spec.suffix] = OneExpert(spec.shape, spec.dtypes, spec.other_shapes)
    if problem.bias:
        found[BIAS_SUFFIX] = OneExpert((segment.shape.out_features,), dense)
    return found
