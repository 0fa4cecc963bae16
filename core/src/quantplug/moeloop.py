"""
Experts through any kernel for linear layers: one expert after the other, each on the rows that chose it.

So that no format and no platform is ever without experts. Which experts have rows must be known before they can be
called, so the host waits for the router at every call: not for graph capture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.asking import ask, split
from quantplug.kernel import Accepted, Cast, Cost, Rejected, Traits, Verdict
from quantplug.moekernel import MoEKernel

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from quantplug.expertweights import ExpertWeights, PreparedExperts
    from quantplug.kernel import LinearKernel
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug.weight import Prepared

PREFIX = "loop."

# Finding an expert's rows, gathering them and adding them back takes about ten calls of torch operators.
_FIXED_US = 60.0


class LoopKernel(MoEKernel):
    """
    The experts of a layer as so many linear layers of one `LinearKernel`.

    Args:
        linear: the kernel that runs the products.
    """

    __slots__ = ("layout_id", "linear", "name", "traits")

    def __init__(self, linear: LinearKernel) -> None:
        self.linear = linear
        self.name = PREFIX + linear.name  # type: ignore[misc]  # of the instance: one class serves all kernels
        self.layout_id = PREFIX + linear.layout_id  # type: ignore[misc]
        self.traits = Traits(  # type: ignore[misc]
            graph_safe=False,
            deterministic=linear.traits.deterministic,
            differentiable=linear.traits.differentiable,
            tangents=linear.traits.tangents,
            fallback=linear.traits.fallback,
            by_request=linear.traits.by_request,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoopKernel) and other.linear == self.linear

    def __hash__(self) -> int:
        return hash((LoopKernel, self.linear))

    def supports(self, problem: MoEProblem, platform: Platform) -> Verdict:
        """Accept what the kernel for linear layers accepts for both products; it quantizes both inputs or neither."""
        for name in ("experts", "top_k", "hidden", "intermediate"):
            if getattr(problem, name) < 1:
                return Rejected("shape", f"{name} is {getattr(problem, name)}", "at least 1")
        if problem.router_weight_on_input and problem.top_k != 1:
            return Rejected("shape", f"top_k {problem.top_k} with the router's weight on the input", "top_k 1")
        first = ask(self.linear, problem.first, platform)
        if isinstance(first, Rejected):
            return first
        second = ask(self.linear, problem.second, platform)
        if isinstance(second, Rejected):
            return second
        if first.quantizes_x != second.quantizes_x:
            alone = "x" if first.quantizes_x else "what lies between"
            spec = problem.activation
            return Rejected(
                "activation",
                f"{self.linear.name} would quantize {alone} alone to {spec.element if spec else 'another type'}",
                "a kernel that quantizes what enters both products, or leaves both as they are",
            )
        spec = problem.activation
        if first.quantizes_x and spec is not None and spec.dynamic and spec.granularity == "tensor":
            return Rejected(
                "activation",
                f"{self.linear.name} would quantize x {spec.describe()}, and nobody says of which rows",
                "a kernel that leaves x as it is",
            )
        fixed, row = (first.cost.at(0) + second.cost.at(0), first.cost.at(1) + second.cost.at(1))
        casts = (*first.casts, *second.casts, Cast("gate_up", problem.dtype), Cast("expert", problem.dtype))
        return Accepted(
            _cost(problem, fixed + _FIXED_US, row - fixed),
            casts=tuple(dict.fromkeys(casts)),
            extra_bytes=problem.experts * (first.extra_bytes + second.extra_bytes),
            notes=("one expert after the other, each once the router is known", *_joined(first, second)),
            quantizes_x=first.quantizes_x or second.quantizes_x,
        )

    def probe(self, platform: Platform) -> Rejected | None:
        """Refuse where the kernel for linear layers does."""
        return self.linear.probe(platform)

    def prepare(
        self,
        problem: MoEProblem,
        experts: Iterable[ExpertWeights],
        device: torch.device,
        out: PreparedExperts | None = None,
    ) -> PreparedExperts:
        """Prepare every expert's products by themselves; biases are kept in the problem's dtype."""
        import torch

        from quantplug.expertweights import PreparedExperts

        dtype: torch.dtype = getattr(torch, problem.dtype)
        firsts, second = self._firsts(problem), problem.second
        parts: list[Prepared] = []
        biases: dict[str, list[torch.Tensor]] = {"b13": [], "b2": []}
        old = iter(() if out is None else out.parts)
        for expert in experts:
            if len(firsts) == 1:
                parts.append(self.linear.prepare(firsts[0], expert.w13, expert.a13, device, next(old, None)))
            else:
                for part, weight, stored in zip(firsts, expert.w13, expert.a13, strict=True):
                    parts.append(self.linear.prepare(part, (weight,), (stored,), device, next(old, None)))
            parts.append(self.linear.prepare(second, (expert.w2,), (expert.a2,), device, next(old, None)))
            if expert.b2 is not None:
                biases["b13"].append(torch.cat(expert.b13).to(device, dtype))
                biases["b2"].append(expert.b2.to(device, dtype))
        tensors = {name: torch.stack(listed) for name, listed in biases.items() if listed}
        if out is None:
            return PreparedExperts(self.layout_id, problem, tensors, parts=tuple(parts))
        for name, tensor in tensors.items():
            out.tensors[name].copy_(tensor)
        return out

    def apply(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        prepared: PreparedExperts,
        expert_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the experts that have rows, in the order of their numbers; y is added up in float32."""
        import torch

        problem = prepared.problem
        if expert_map is not None:
            known = (topk_ids >= 0) & (topk_ids < len(expert_map))
            topk_ids = torch.where(known, expert_map[topk_ids.clamp(0, len(expert_map) - 1).long()], -1)
        chosen = topk_ids.to(torch.int64)
        chosen = torch.where((chosen >= 0) & (chosen < problem.experts), chosen, problem.experts)
        chosen, weights = _each_once(chosen, topk_weights, problem.experts)
        slots = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=problem.experts + 1).tolist()
        y = torch.zeros(len(x), problem.hidden, dtype=torch.float32, device=x.device)
        start = 0
        for expert in range(problem.experts):
            mine = slots[start : start + counts[expert]]
            start += counts[expert]
            if not counts[expert]:
                continue
            rows, factors = mine // problem.top_k, weights[mine].to(torch.float32)[:, None]
            taken = x[rows]
            if problem.router_weight_on_input:
                output = self._expert((taken * factors).to(x.dtype), prepared, expert).to(torch.float32)
            else:
                output = self._expert(taken, prepared, expert) * factors
            y.index_add_(0, rows, output)
        return y.to(x.dtype)

    def dequantize(self, prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's values by the kernel for linear layers."""
        import torch

        *firsts, second = self._parts(prepared, expert)
        values = torch.cat([self.linear.dequantize(part, torch.float32) for part in firsts])
        return values, self.linear.dequantize(second, torch.float32)

    def unprepare(self, prepared: PreparedExperts, expert: int) -> ExpertWeights:
        """Return one expert's canonical weights by the kernel for linear layers."""
        from quantplug.expertweights import ExpertWeights

        *firsts, second = self._parts(prepared, expert)
        w13 = tuple(weight for part in firsts for weight in self.linear.unprepare(part))
        return ExpertWeights(w13, self.linear.unprepare(second)[0])

    def _expert(self, x: torch.Tensor, prepared: PreparedExperts, expert: int) -> torch.Tensor:
        import torch

        from quantplug.expertfunction import between

        *firsts, second = self._parts(prepared, expert)
        b13, b2 = (prepared.tensors[name][expert] if name in prepared.tensors else None for name in ("b13", "b2"))
        if len(firsts) == 1:
            product = self.linear.apply(x, firsts[0], b13)
        else:
            biases = (None,) * len(firsts) if b13 is None else b13.chunk(len(firsts))
            products = [self.linear.apply(x, part, bias) for part, bias in zip(firsts, biases, strict=True)]
            product = torch.cat(products, dim=-1)
        return self.linear.apply(between(product, prepared.problem.function), second, b2)

    def _parts(self, prepared: PreparedExperts, expert: int) -> tuple[Prepared, ...]:
        size = len(prepared.parts) // prepared.problem.experts
        return prepared.parts[expert * size : (expert + 1) * size]

    def _firsts(self, problem: MoEProblem) -> tuple[LinearProblem, ...]:
        whole = problem.first.uniform or not self.linear.traits.uniform_segments
        return (problem.first,) if whole else split(problem.first)


def _each_once(chosen: torch.Tensor, weights: torch.Tensor, nobody: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return slots `[M * T]` in which no row names an expert twice, and their weights.

    A row's weights for one expert are added up in the first slot. So no row occurs twice where an expert's results are
    added to y, which would happen in any order on a GPU.
    """
    import torch

    if chosen.shape[1] > 1:
        same = chosen[:, :, None] == chosen[:, None, :]
        weights = torch.where(same, weights[:, None, :], 0.0).sum(-1)
        chosen = torch.where(same.tril(-1).any(-1), nobody, chosen)
    return chosen.reshape(-1), weights.reshape(-1)


def _joined(first: Accepted, second: Accepted) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first.notes, *second.notes)))


def _cost(problem: MoEProblem, expert_us: float, row_us: float) -> Cost:
    """Return the cost of as many experts as rows choose, one after the other, and of all of them for many rows."""
    every = Cost(problem.experts * expert_us, problem.top_k * row_us)
    return Cost(0.0, problem.top_k * (expert_us + row_us), many=every)
