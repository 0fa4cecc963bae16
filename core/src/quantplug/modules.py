"""
The module that runs one quantized linear layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug import dispatch
from quantplug.asking import split
from quantplug.dense import DenseProduct, dequantizes
from quantplug.errors import LoadError, RunError
from quantplug.evidence import DENSE_DTYPES, DENSE_SUFFIX
from quantplug.preparedmodule import PreparedModule, named_tensors
from quantplug.schemes import quantize_dense
from quantplug.seen import carries_tangent
from quantplug.spec import LinearProblem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.kernel import LinearKernel
    from quantplug.ledger import Ledger
    from quantplug.plan import LayerPlan, Plan
    from quantplug.preparedmodule import SourceTensor
    from quantplug.registry import Registry
    from quantplug.schemes import SchemeCache
    from quantplug.weight import ActivationParams, Prepared, Weight


class QuantizedLinear(PreparedModule):
    """
    `y = x W^T + b` by the kernels that a plan chose.

    A loader calls `install` with the stored tensors. A framework that allocates parameters and fills them with its own
    loader calls `create_weights`, then `process_weights_after_loading`, both repeatable, and then the module itself
    (`apply`, the field's third method, already means something else on a torch module). Once prepared, the layer keeps
    only what its kernel needs.
    """

    def __init__(self, layer: LayerPlan, plan: Plan, registry: Registry, schemes: SchemeCache) -> None:
        super().__init__(layer)
        decision = plan.decision_of(layer)
        if decision is None or not isinstance(layer.problem, LinearProblem):
            raise LoadError("QP-LOAD-PREPARE", layer.path, "the plan has no quantized linear layer here")
        self.in_features = layer.problem.in_features
        self.out_features = layer.problem.out_features
        self.activation: tuple[ActivationParams | None, ...] = ()
        """What the file stores about x, per segment; kept for saving, whether or not the kernel makes use of it."""
        self._problem: LinearProblem = layer.problem
        self._schemes = tuple(schemes.get(segment.scheme, segment.name) for segment in layer.segments)
        self._choices: tuple[tuple[int | None, LinearKernel], ...] = tuple(
            (choice.max_rows, registry.kernel(choice.kernel).item) for choice in decision.choices
        )
        """The kernels by rising rows, each with the most that it serves."""
        self._kernels: dict[str, LinearKernel] = {}
        """The kernel that brings weights into each layout, that of a single row first."""
        for _, kernel in self._choices:
            self._kernels.setdefault(kernel.layout_id, kernel)
        self._differentiable = all(kernel.traits.differentiable for _, kernel in self._choices)
        self._tangents = all(kernel.traits.tangents for _, kernel in self._choices)
        self._held: dict[str, tuple[Prepared, ...]] = {}
        """The weights in each layout, part by part."""
        self._part_biases: tuple[torch.Tensor | None, ...] = ()
        self._only: tuple[LinearKernel, Prepared, torch.Tensor | None] | None = None
        self._calls: tuple[tuple[torch.Tensor | None, list[torch.Tensor], int], ...] = ()

    @property
    def parameter_count(self) -> int:
        """Number of weights and biases, as a dense layer of its size would have them."""
        return self.out_features * self.in_features + (self.out_features if self._problem.bias else 0)

    # -- for frameworks with a loader of their own

    def create_weights(self, ledger: Ledger) -> None:
        """
        Allocate the stored tensors as parameters, poisoned, for a framework's own loader to fill.

        They are called as in the checkpoint ("qweight"), with the segment's number behind when there are several
        ("qweight_1"), and each has a `weight_loader(parameter, tensor, start=None)` that copies and keeps the account.
        What a format stores in one of several dtypes takes that of the first tensor that its loader is given.
        """
        self._ledger = ledger
        dense = (self._dtype, *(getattr(torch, dtype) for dtype in DENSE_DTYPES))
        for number, (segment, scheme) in enumerate(zip(self._layer.segments, self._schemes, strict=True)):
            stored = dict(segment.tensors)
            if segment.quantize:
                shape = (segment.shape.out_features, segment.shape.in_features)
                self._allocate(self._attribute(DENSE_SUFFIX, number), shape, dense)
            for spec in () if segment.quantize else scheme.params(segment.shape):
                if spec.suffix in stored:
                    dtypes = tuple(getattr(torch, dtype) for dtype in spec.dtypes)
                    self._allocate(self._attribute(spec.suffix, number), spec.shape, dtypes, spec.other_shapes)
            if self._problem.bias:
                self._allocate(self._attribute("bias", number), (segment.shape.out_features,), dense)

    def _install_parameters(self, device: torch.device) -> None:
        stored: list[dict[str, torch.Tensor]] = []
        biases: list[torch.Tensor] = []
        for number, segment in enumerate(self._layer.segments):
            stored.append({s: self._parameters_named(s, number) for s, _ in segment.tensors})
            if self._problem.bias:
                biases.append(self._parameters_named("bias", number))
        self.install(stored, biases, device=device)

    # -- loading -----------------------------------------------------------------------------------------------------

    def install(
        self,
        stored: Sequence[Mapping[str, torch.Tensor]],
        biases: Sequence[torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        sources: tuple[SourceTensor, ...] = (),
    ) -> None:
        """
        Decode the stored tensors and prepare them for the chosen kernel; all or nothing.

        A second call writes into the same memory, so that captured graphs stay valid.

        Args:
            stored: `{suffix: tensor}` per segment, as the file holds them.
            biases: one `[N]` per segment, or none.
            device: where the layer will run.
            sources: where the tensors came from, for `checkpoint_tensors`.
        """
        device = torch.device(device)
        weights: list[Weight] = []
        activation: list[ActivationParams | None] = []
        for scheme, tensors, segment in zip(self._schemes, stored, self._layer.segments, strict=True):
            if segment.quantize:
                weights.append(quantize_dense(scheme, tensors[DENSE_SUFFIX], segment.name))
                activation.append(None)
            else:
                weights.append(scheme.decode(tensors, segment.shape, segment.name))
                activation.append(scheme.decode_activation(tensors, segment.name))
        self._commit(self._prepare(weights, activation, device), self._fit_biases(biases, device))
        self.activation = tuple(activation)
        self.sources = sources

    def _prepare(
        self, weights: list[Weight], activation: list[ActivationParams | None], device: torch.device
    ) -> dict[str, tuple[Prepared, ...]]:
        parts = self._problem_parts()
        made: dict[str, tuple[Prepared, ...]] = {}
        for layout, kernel in self._kernels.items():
            old = self._held.get(layout) or (None,) * len(parts)
            with self._preparing(kernel):
                if len(parts) == 1:
                    made[layout] = (kernel.prepare(self._problem, weights, activation, device, out=old[0]),)
                    continue
                made[layout] = tuple(
                    kernel.prepare(part, [weight], [stored], device, out=out)
                    for part, weight, stored, out in zip(parts, weights, activation, old, strict=True)
                )
        return made

    def _problem_parts(self) -> tuple[LinearProblem, ...]:
        """Return the problem whole, or segment by segment where its kernels, all alike in that, want it so."""
        whole = self._problem.uniform or not self._choices[0][1].traits.uniform_segments
        return (self._problem,) if whole else split(self._problem)

    def _fit_biases(self, biases: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor | None, ...]:
        parts = len(self._problem_parts())
        if not biases:
            return (None,) * parts
        moved = [bias.to(device=device, dtype=self._dtype) for bias in biases]
        return tuple(moved) if parts > 1 else (torch.cat(moved) if len(moved) > 1 else moved[0],)

    def _commit(self, held: dict[str, tuple[Prepared, ...]], biases: tuple[torch.Tensor | None, ...]) -> None:
        for number, part in enumerate(part for parts in held.values() for part in parts):
            for name, tensor in part.tensors.items():
                self._keep(f"{number}.{name}", tensor)
        for number, bias in enumerate(biases):
            if bias is not None:
                self._keep(f"{number}.bias", bias)
        self._held, self._part_biases = held, biases
        kernel = self._choices[0][1]
        parts = held[kernel.layout_id]
        # Asked for as "cuda", a tensor lies on "cuda:0"; what x is compared with is where the tensors lie.
        self._device = next(iter(parts[0].tensors.values())).device
        if len(parts) == len(self._choices) == 1 and not isinstance(kernel, DenseProduct):
            self._only = (kernel, parts[0], biases[0])
        self._calls = tuple(self._call(bias, [parts[n] for parts in held.values()]) for n, bias in enumerate(biases))

    def _call(
        self, bias: torch.Tensor | None, held: list[Prepared]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor], int]:
        """Return what `dispatch.run` takes for one part, which is held in each layout."""
        tensors = [tensor for one in held for tensor in one.tensors.values()]
        return bias, tensors, dispatch.number_of(self._choices, held)

    def _attribute(self, suffix: str, number: int) -> str:
        return suffix if len(self._layer.segments) == 1 else f"{suffix}_{number}"

    def _parameters_named(self, suffix: str, number: int) -> torch.Tensor:
        return self.get_parameter(self._attribute(suffix, number)).data

    # -- running -----------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., N]` for x `[..., K]` of the planned dtype on the layer's device."""
        # A decoding step calls this hundreds of times; every attribute looked up here shows in tokens per second.
        if x.shape[-1] != self._inputs_of(x.dtype, x.device):
            self._refuse(x)
        if not self._tangents and carries_tangent(x):
            raise self._no_tangent()
        if x.requires_grad and not self._differentiable and torch.is_grad_enabled():
            return self._with_gradient(x)
        if self._only is not None:
            kernel, part, bias = self._only
            return kernel.apply(x, part, bias)
        rows = x.numel() // self.in_features
        choose = dispatch.known_kernel if torch.compiler.is_compiling() else dispatch.kernel_for
        chosen = choose(self._choices, rows)
        if chosen is None:
            if carries_tangent(x):
                raise self._no_tangent()
            results = [dispatch.run(x, bias, tensors, call) for bias, tensors, call in self._calls]
        else:
            parts = self._held[chosen.layout_id]
            results = [chosen.apply(x, part, bias) for part, bias in zip(parts, self._part_biases, strict=True)]
        return self._join(results)

    def _with_gradient(self, x: torch.Tensor) -> torch.Tensor:
        if not any(dequantizes(kernel) for _, kernel in self._choices):
            fix = "Run under torch.no_grad(), or pin a kernel that dequantizes, such as reference."
            raise self._no_derivative("wants a gradient", fix)
        return self._join([dispatch.run(x, bias, tensors, call) for bias, tensors, call in self._calls])

    def _no_tangent(self) -> RunError:
        fix = "Differentiate in reverse, or pin a kernel that passes tangents on, such as reference."
        return self._no_derivative("carries a tangent", fix)

    def _no_derivative(self, wish: str, fix: str) -> RunError:
        names = " and ".join(dict.fromkeys(kernel.name for _, kernel in self._choices))
        return RunError("QP-RUN-GRAD", self.path, f"x {wish}, and {names} gives none", fix=fix)

    @staticmethod
    def _join(results: list[torch.Tensor]) -> torch.Tensor:
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)

    # torch gives the decorator no type.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _inputs_of(self, dtype: torch.dtype, device: torch.device) -> int:
        """
        Return how many inputs x must have; for an x of another dtype or on another device none will do.

        A prepared layer never changes what it takes, so that a compiled model need not look here at every call.
        """
        return self.in_features if dtype == self._dtype and device == self._device else -1

    def _refuse(self, x: torch.Tensor) -> None:
        if not self._held:
            raise RunError("QP-RUN-STATE", self.path, "its weights are not prepared", fix="Load the layer first.")
        if x.shape[-1] != self.in_features:
            raise RunError("QP-RUN-SHAPE", self.path, f"x is {list(x.shape)}", expected=f"[..., {self.in_features}]")
        if x.dtype != self._dtype:
            raise RunError(
                "QP-RUN-DTYPE", self.path, f"x is {x.dtype}", expected=str(self._dtype),
                fix=f"Cast x, or load with dtype={str(x.dtype).removeprefix('torch.')!r}.",
            )  # fmt: skip
        raise RunError("QP-RUN-DEVICE", self.path, f"x lies on {x.device}", expected=str(self._device))

    # -- the way back ------------------------------------------------------------------------------------------------

    def encode(self) -> dict[str, torch.Tensor]:
        """
        Return the layer in its checkpoint form (`{tensor name: tensor}`) from what the kernel holds.

        Raises:
            LoadError: `QP-LOAD-SOURCE` when the kernel has no way back.
        """
        kernel = self._choices[0][1]
        try:
            weights = [weight for part in self._held[kernel.layout_id] for weight in kernel.unprepare(part)]
        except NotImplementedError as error:
            raise self._no_way_back(str(error)) from error
        result: dict[str, torch.Tensor] = {}
        for scheme, segment, weight, activation in zip(
            self._schemes, self._layer.segments, weights, self.activation, strict=True
        ):
            result |= named_tensors(segment, scheme.encode(weight, activation))
        sizes = [segment.shape.out_features for segment in self._layer.segments]
        whole = [bias for bias in self._part_biases if bias is not None]
        if whole:
            result |= dict(zip(self._layer.tensors, torch.cat(whole).split(sizes), strict=True))
        return result

    def in_checkpoint_form(self, read: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what was read from the source as a quantized checkpoint holds it; what is dense is quantized anew."""
        result = dict(read)
        for scheme, segment in zip(self._schemes, self._layer.segments, strict=True):
            if segment.quantize:
                weight = quantize_dense(scheme, result.pop(segment.tensors[0][1]), segment.name)
                result |= named_tensors(segment, scheme.encode(weight))
        return result

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values `[N, K]` that the layer multiplies with."""
        kernel = self._choices[0][1]
        return torch.cat([kernel.dequantize(part, dtype) for part in self._held[kernel.layout_id]])

    def extra_repr(self) -> str:
        """Describe the layer in a model's printout."""
        kernels = ", ".join(dict.fromkeys(kernel.name for _, kernel in self._choices))
        return f"{self._layer.scheme}, in={self.in_features}, out={self.out_features}, kernel={kernels}"
