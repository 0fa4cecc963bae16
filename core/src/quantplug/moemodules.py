"""
The module that runs the routed experts of one layer.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from quantplug.dispatch import kernel_for
from quantplug.errors import LoadError, RunError
from quantplug.evidence import BIAS_SUFFIX, DENSE_SUFFIX
from quantplug.expertinputs import check_inputs
from quantplug.expertparameters import load_expert, stacked_parameters
from quantplug.moe import MoEProblem
from quantplug.moescheme import MoEScheme
from quantplug.preparedmodule import PreparedModule, named_tensors
from quantplug.schemes import quantize_dense
from quantplug.seen import carries_tangent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from quantplug.expertrules import ExpertFiles, ExpertLayer
    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.ledger import Ledger
    from quantplug.moekernel import MoEKernel
    from quantplug.plan import LayerPlan, Plan, Segment
    from quantplug.preparedmodule import SourceTensor
    from quantplug.registry import Registry
    from quantplug.schemes import SchemeCache
    from quantplug.spec import WeightSpec
    from quantplug.weight import ActivationParams, Weight


class QuantizedExperts(PreparedModule):
    """
    The experts of one layer by the kernels that a plan chose.

    A loader calls `install` with one expert's weights after the other. Once prepared, the module keeps only what its
    kernel needs.
    """

    def __init__(self, layer: LayerPlan, plan: Plan, registry: Registry, schemes: SchemeCache) -> None:
        super().__init__(layer)
        decision = plan.decision_of(layer)
        if decision is None or not isinstance(layer.problem, MoEProblem) or layer.experts is None:
            raise LoadError("QP-LOAD-PREPARE", layer.path, "the plan has no quantized experts here")
        self.problem = layer.problem
        self._experts: ExpertLayer = layer.experts
        self._schemes = tuple(schemes.get(segment.scheme, segment.name) for segment in layer.segments)
        self._scheme = MoEScheme(layer.experts.files, layer.problem.w13, layer.problem.w2)
        self._choices: tuple[tuple[int | None, MoEKernel], ...] = tuple(
            (choice.max_rows, registry.moe_kernel(choice.kernel).item) for choice in decision.choices
        )
        """The kernels by rising rows, each with the most that it serves."""
        self._kernels: dict[str, MoEKernel] = {}
        """The kernel that brings experts into each layout, that of a single row first."""
        for _, kernel in self._choices:
            self._kernels.setdefault(kernel.layout_id, kernel)
        self._held: dict[str, PreparedExperts] = {}
        """The experts in each layout."""
        self._activation: dict[int, tuple[ActivationParams | None, ...]] = {}
        self._specs: dict[int, tuple[WeightSpec, ...]] = {}
        """The contracts under which each expert is stored; several threads decode, each its own experts."""

    @property
    def parameter_count(self) -> int:
        """Number of weights and biases, as dense experts of this size would have them."""
        problem, parts = self.problem, len(self.problem.w13)
        one = (parts + 1) * problem.hidden * problem.intermediate
        one += parts * problem.intermediate + problem.hidden if problem.bias else 0
        return problem.experts * one

    @property
    def files(self) -> ExpertFiles:
        """How the experts are spelled in files."""
        return self._experts.files

    @property
    def container(self) -> str:
        """Path of the experts in the files: what the names of all their tensors begin with."""
        parent = self._layer.segments[0].name.rpartition(".")[0]
        return parent if self.files.stacked else parent.rpartition(".")[0]

    @property
    def codes_per_expert(self) -> int:
        """Codes of one expert, which is as many bytes in canonical form."""
        return (len(self.problem.w13) + 1) * self.problem.hidden * self.problem.intermediate

    def segments_of(self, expert: int) -> tuple[Segment, ...]:
        """Return the stored projections of one expert."""
        return self._layer.segments[self._places(expert)]

    def _places(self, expert: int) -> slice:
        """Where an expert's projections are among the segments: all of them, where they are stacked."""
        count = len(self._experts.files.projections)
        first = 0 if self._experts.files.stacked else expert * count
        return slice(first, first + count)

    # -- for frameworks with a loader of their own

    def create_weights(self, ledger: Ledger) -> None:
        """
        Allocate the stored tensors as parameters, poisoned, for a framework's own loader to fill.

        There is one for each projection and suffix, `[E, …]`, called `<projection>_<suffix>` ("gate_proj_qweight"). Its
        `weight_loader(parameter, tensor, expert)` takes one expert's tensor and keeps the account.

        Raises:
            LoadError: `QP-LOAD-PREPARE` when experts are stored in different shapes, so that they cannot be stacked.
        """
        self._ledger = ledger
        for name, one in stacked_parameters(self._layer, self._schemes, self.problem).items():
            self._allocate(name, (self.problem.experts, *one.shape), tuple(getattr(torch, each) for each in one.dtypes))
            parameter = self.get_parameter(name)
            # Engines look for this attribute on the parameter; _allocate has set it for the whole of it.
            whole = getattr(parameter, "weight_loader")  # noqa: B009
            setattr(parameter, "weight_loader", partial(load_expert, whole, one))  # noqa: B010

    def _install_parameters(self, device: torch.device) -> None:
        def experts() -> Iterator[ExpertWeights]:
            return (self.decode(expert, self._filled(expert)) for expert in range(self.problem.experts))

        if self.prepared:
            for _ in experts():
                pass  # all of them are right before one is overwritten
        self.install(experts, device=device)

    def _filled(self, expert: int) -> list[dict[str, torch.Tensor]]:
        """Return one expert's stored tensors out of the parameters."""
        names = [dict.fromkeys(suffix for suffix, _ in segment.tensors) for segment in self.segments_of(expert)]
        bias = (BIAS_SUFFIX,) if self.problem.bias else ()
        return [
            {suffix: self.get_parameter(f"{projection}_{suffix}").data[expert] for suffix in (*suffixes, *bias)}
            for projection, suffixes in zip(self.files.projections, names, strict=True)
        ]

    # -- loading -----------------------------------------------------------------------------------------------------

    def decode(self, expert: int, stored: Sequence[Mapping[str, torch.Tensor]]) -> ExpertWeights:
        """
        Return one expert in canonical form.

        Args:
            expert: its number.
            stored: the stored tensors of each projection by suffix, the bias among them.

        Raises:
            CheckpointError: `QP-ST-…` naming the projection, when values are not what the format allows.
        """
        weights: list[Weight] = []
        activation: list[ActivationParams | None] = []
        for scheme, tensors, segment in zip(
            self._schemes[self._places(expert)], stored, self.segments_of(expert), strict=True
        ):
            where = f"{segment.name} of expert {expert}" if self._experts.files.stacked else segment.name
            if segment.quantize:
                weights.append(quantize_dense(scheme, tensors[DENSE_SUFFIX], where))
                activation.append(None)
            else:
                own = {suffix: tensor for suffix, tensor in tensors.items() if suffix != BIAS_SUFFIX}
                weights.append(scheme.decode(own, segment.shape, where))
                activation.append(scheme.decode_activation(own, where))
        self._activation[expert] = tuple(activation)
        self._specs[expert] = tuple(weight.spec for weight in weights)
        biases = [tensors[BIAS_SUFFIX] for tensors in stored] if self.problem.bias else []
        return self._scheme.expert(weights, activation, biases)

    def install(
        self,
        experts: Callable[[], Iterable[ExpertWeights]],
        *,
        device: torch.device | str = "cpu",
        sources: tuple[SourceTensor, ...] = (),
    ) -> None:
        """
        Prepare the experts for the chosen kernel.

        A second call writes into the same memory, so that captured graphs stay valid.

        Args:
            experts: yields all of them in the order of their numbers, from `decode`, each when it is asked for; called
                once for each layout that they are kept in.
            device: where the layer will run.
            sources: where the tensors came from.

        Raises:
            LoadError: `QP-LOAD-PREPARE` when the kernel fails.
        """
        held: dict[str, PreparedExperts] = {}
        for layout, kernel in self._kernels.items():
            with self._preparing(kernel):
                held[layout] = kernel.prepare(self.problem, experts(), torch.device(device), self._held.get(layout))
        for number, prepared in enumerate(held.values()):
            named = prepared.named_tensors()
            for name, tensor in named.items():
                self._keep(f"{number}.{name}", tensor)
            # Asked for as "cuda", a tensor lies on "cuda:0"; what x is compared with is where the tensors lie.
            self._device = next(iter(named.values())).device
        self._held = held
        self.sources = sources

    @property
    def prepared(self) -> bool:
        """Whether there are weights, which a second `install` overwrites."""
        return bool(self._held)

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Return y `[..., H]` for x `[..., H]` of the planned dtype on the layer's device.

        Args:
            x: rows; the leading axes are those of the router's answers.
            topk_weights: `[..., T]`, the router's weights, used as they are.
            topk_ids: integer `[..., T]`; an id outside 0 … E-1 belongs to no expert here and adds nothing.
            expert_map: integer `[E_global]`, the local number of every expert or -1; ids are global then.

        Raises:
            RunError: `QP-RUN-STATE`, `QP-RUN-SHAPE`, `QP-RUN-DTYPE`, `QP-RUN-DEVICE`, `QP-RUN-GRAD`.
        """
        if not self._held:
            raise RunError("QP-RUN-STATE", self.path, "its weights are not prepared", fix="Load the layer first.")
        check_inputs(self.path, self.problem, self._device, x, topk_weights, topk_ids, expert_map)
        rows, chosen = x.reshape(-1, self.problem.hidden), topk_ids.reshape(-1, self.problem.top_k)
        kernel = kernel_for(self._choices, len(rows))
        self._refuse_derivatives(kernel, x, topk_weights)
        prepared = self._held[kernel.layout_id]
        weights = topk_weights.reshape(-1, self.problem.top_k).to(torch.float32)
        if not kernel.traits.graph_safe and torch.compiler.is_compiling():
            y: torch.Tensor = _uncompiled(kernel, rows, weights, chosen, prepared, expert_map)
        else:
            y = kernel.apply(rows, weights, chosen, prepared, expert_map)
        return y.view(x.shape)

    def _refuse_derivatives(self, kernel: MoEKernel, x: torch.Tensor, topk_weights: torch.Tensor) -> None:
        if not kernel.traits.tangents and carries_tangent(x, topk_weights):
            raise RunError(
                "QP-RUN-GRAD", self.path, f"x or the router's weights carry a tangent, and {kernel.name} gives none",
                fix="Pin loop.reference.",
            )  # fmt: skip
        wanted = (x.requires_grad or topk_weights.requires_grad) and torch.is_grad_enabled()
        if wanted and not kernel.traits.differentiable:
            raise RunError(
                "QP-RUN-GRAD", self.path, f"x or the router's weights want a gradient, and {kernel.name} gives none",
                fix="Run under torch.no_grad(), or pin loop.reference.",
            )  # fmt: skip

    # -- the way back ------------------------------------------------------------------------------------------------

    def dequantize(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the float32 values that one expert multiplies with, `[I or 2I, H]` (gate, then up) and `[H, I]`."""
        if not self._held:
            raise RunError("QP-RUN-STATE", self.path, "its weights are not prepared", fix="Load the layer first.")
        kernel = self._choices[0][1]
        return kernel.dequantize(self._held[kernel.layout_id], expert)

    def encode(self) -> Iterator[tuple[str, torch.Tensor]]:
        """
        Yield the stored tensors by name, from what the kernel holds.

        Raises:
            LoadError: `QP-LOAD-SOURCE` when the kernel has no way back, or what it holds is not what was stored:
                projections that were joined, scales that were repeated, biases in another dtype.
        """
        files, kernel = self._experts.files, self._choices[0][1]
        prepared = self._held.get(kernel.layout_id)
        as_stored = set(self._specs.values()) == {(*self.problem.w13, self.problem.w2)}
        if prepared is None or files.joined or files.stacked or self.problem.bias or not as_stored:
            raise self._no_way_back("these experts are kept in another form than they are stored in")
        for expert in range(self.problem.experts):
            try:
                held = kernel.unprepare(prepared, expert)
            except NotImplementedError as error:
                raise self._no_way_back(str(error)) from error
            weights = (*held.w13, held.w2)
            schemes = self._schemes[self._places(expert)]
            for segment, scheme, weight, activation in zip(
                self.segments_of(expert), schemes, weights, self._activation[expert], strict=True
            ):
                yield from named_tensors(segment, scheme.encode(weight, activation)).items()

    def in_checkpoint_form(self, read: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what was read from the source as a quantized checkpoint holds it; what is dense is quantized anew."""
        if self.files.stacked and self._layer.segments[0].quantize:
            raise self._no_way_back("these experts are stacked where they are dense, and written apart when quantized")
        dense = {
            segment.tensors[0][1]: (segment, scheme)
            for segment, scheme in zip(self._layer.segments, self._schemes, strict=True)
            if segment.quantize
        }
        for name, tensor in read.items():
            if name not in dense:
                yield name, tensor
                continue
            segment, scheme = dense[name]
            weight = quantize_dense(scheme, tensor, segment.name)
            yield from ((f"{segment.name}.{suffix}", stored) for suffix, stored in scheme.encode(weight).items())

    def extra_repr(self) -> str:
        """Describe the layer in a model's printout."""
        kernels = ", ".join(dict.fromkeys(kernel.name for _, kernel in self._choices))
        return f"{self._layer.scheme}, {self.problem.describe()}, kernel={kernels}"


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no type
def _uncompiled(
    kernel: MoEKernel,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    prepared: PreparedExperts,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """Run a kernel whose calls depend on the router's answer outside of a compiled graph."""
    return kernel.apply(x, topk_weights, topk_ids, prepared, expert_map)
