"""
The plan: every decision about a checkpoint as an immutable value that can be read before a weight is.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from quantplug.config import Field
from quantplug.errors import PlanError
from quantplug.expertrules import ExpertLayer
from quantplug.kernel import Verdict
from quantplug.moe import MoEProblem
from quantplug.platform import Platform
from quantplug.skip import EntryUse, SchemeRef
from quantplug.spec import ActivationSpec, LinearProblem, LinearShape

PLAN_VERSION = 4
"""Version of the JSON form; another version is refused."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """
    One kernel that was asked.

    Attributes:
        kernel: its name.
        plugin: the distribution it came from, "quantplug-core" for the reference kernel.
        verdict: its answer.
        policy: what a policy did to it ("preferred by …", "denied by …", "pinned by …"), or "".
        measured: (rows M, microseconds) that were measured on this very machine, by rising rows; () when none were.
    """

    kernel: str
    plugin: str
    verdict: Verdict
    policy: str = ""
    measured: tuple[tuple[int, float], ...] = ()

    @property
    def preferred(self) -> bool:
        """Whether a policy puts it before all others."""
        return self.policy.startswith(("pin", "prefer"))


@dataclass(frozen=True, slots=True)
class Choice:
    """
    A kernel for a range of rows M: `min_rows <= M`, and `M <= max_rows` unless that is None.

    Attributes:
        kernel: its name.
        layout_id: the layout that it reads.
        min_rows: the least rows.
        max_rows: the most.
    """

    kernel: str
    layout_id: str
    min_rows: int = 0
    max_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """
    The kernels of one layer.

    Attributes:
        choices: by rising rows, without gaps.
        candidates: everyone who was asked, best first, with the answers.
        basis: "measured" when measured times decided, else "estimated".
        extra_bytes: that two layouts take in each layer beyond the best one alone; 0 where all choices read one layout.
    """

    choices: tuple[Choice, ...]
    candidates: tuple[Candidate, ...]
    basis: Literal["estimated", "measured"] = "estimated"
    extra_bytes: int = 0

    @property
    def kernel(self) -> str:
        """The kernel that serves a single row."""
        return self.choices[0].kernel

    def at(self, rows: int) -> str:
        """Return the kernel that serves M = `rows`."""
        return next(c.kernel for c in self.choices if c.max_rows is None or rows <= c.max_rows)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that weights are kept in, that of a single row first: one, or two within a budget."""
        return tuple(dict.fromkeys(choice.layout_id for choice in self.choices))


@dataclass(frozen=True, slots=True)
class Segment:
    """
    One stored shard of a quantized layer.

    Attributes:
        name: its checkpoint path.
        scheme: scheme reference it is decoded by.
        shape: logical size.
        tensors: (suffix, tensor name) of each stored tensor it consumes.
        quantize: whether it is stored dense and quantized while loading.
    """

    name: str
    scheme: SchemeRef
    shape: LinearShape
    tensors: tuple[tuple[str, str], ...]
    quantize: bool = False


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """
    What happens to one module.

    Attributes:
        path: module path in the engine.
        kind: "linear", "experts", "embedding" or "other".
        segments: stored shards, () when the module stays dense. For experts every projection of every expert, expert by
            expert; where they are stacked, every projection, with the shape of one expert's share.
        problem: what the kernel runs, None when dense.
        decision: index into `Plan.decisions`, None when dense.
        rule: the deciding entry in words ("-:.*lm_head (config.json: …)", "default", "evidence: …").
        scheme: short human form ("gptq 4-bit group 64 sym"), "" when dense.
        tensors: tensors that a dense module consumes; a quantized one has them in `segments`, only its bias here.
        file_bytes: bytes of those tensors in the files.
        memory_bytes: estimated bytes once prepared.
        notes: what a reader should know.
        experts: for that kind of module, what experts it has and how they are stored.
    """

    path: str
    kind: str
    segments: tuple[Segment, ...] = ()
    problem: LinearProblem | MoEProblem | None = None
    decision: int | None = None
    rule: str = ""
    scheme: str = ""
    tensors: tuple[str, ...] = ()
    file_bytes: int = 0
    memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    experts: ExpertLayer | None = None

    @property
    def quantized(self) -> bool:
        """Whether a scheme decodes it."""
        return bool(self.segments)


@dataclass(frozen=True, slots=True)
class LeftTensors:
    """Checkpoint tensors that nobody consumes, on purpose: why ("tied to …", "derived buffer") and their names."""

    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """
    What a checkpoint says about the cache of keys and values; handed over, because the framework owns the cache.

    Attributes:
        spec: type and scales as the configuration states them; None when only scales are stored.
        scales: names of the stored scales; `LoadedLayers.kv_scales` has their values.
    """

    spec: ActivationSpec | None
    scales: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """
    Every decision about one checkpoint on one platform. Immutable; JSON round trip; the same on every rank.

    Attributes:
        platform: what it is for.
        dtype: torch name of the activation dtype.
        dialect: who read the configuration, "" for a dense checkpoint.
        fields: the configuration with provenance.
        layers: in model order.
        decisions: distinct kernel decisions, shared by layers.
        left: tensors left on purpose, by class.
        kv_cache: how the file wants the cache of keys and values to be quantized, and the scales it stores for that.
        entries: what every rule of the configuration did.
        warnings: what a reader should know about the whole.
        plugins: (distribution, version) that took part, sorted.
        draft: the plan of the model that drafts tokens for this one.
    """

    platform: Platform
    dtype: str
    dialect: str
    fields: tuple[Field, ...]
    layers: tuple[LayerPlan, ...]
    decisions: tuple[Decision, ...]
    left: tuple[LeftTensors, ...] = ()
    kv_cache: KVCachePlan | None = None
    entries: tuple[EntryUse, ...] = ()
    warnings: tuple[str, ...] = ()
    plugins: tuple[tuple[str, str], ...] = ()
    draft: Plan | None = None
    version: int = PLAN_VERSION

    def layer(self, path: str) -> LayerPlan:
        """
        Return the plan of one module by its path, or by that of one of its stored shards (a projection of an expert).

        Raises:
            PlanError: `QP-PLAN-MODEL` with the nearest paths when there is none.
        """
        for layer in self.layers:
            if layer.path == path:
                return layer
        for layer in self.layers:
            if any(segment.name == path for segment in layer.segments):
                return layer
        near = difflib.get_close_matches(path, [layer.path for layer in self.layers], n=3, cutoff=0.4)
        raise PlanError(
            "QP-PLAN-MODEL",
            path,
            "the plan has no such module",
            expected=f"one of {len(self.layers)} paths",
            fix=f"Nearest: {', '.join(near)}." if near else "",
        )

    def decision_of(self, layer: LayerPlan) -> Decision | None:
        """Return the kernel decision of a layer, None when it stays dense."""
        return None if layer.decision is None else self.decisions[layer.decision]

    @property
    def hash(self) -> str:
        """
        Return a hex digest over the choices: what is stored where, which scheme, which kernels.

        Memory sizes, versions, estimates and words are left out, so that ranks that chose the same have the same.
        """
        choices = [
            PLAN_VERSION,
            self.platform.kind,
            self.platform.arch,
            self.dtype,
            [[layer.path, *_choice_of(layer, self.decision_of(layer))] for layer in self.layers],
            [[left.reason, list(left.names)] for left in self.left],
            list(self.kv_cache.scales) if self.kv_cache else [],
            self.draft.hash if self.draft is not None else "",
        ]
        return hashlib.sha256(json.dumps(choices, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the plan as JSON text; `Plan.from_json` gives an equal plan."""
        from quantplug.serial import to_json

        return json.dumps(to_json(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """
        Return the plan that `to_json` wrote.

        Raises:
            ConfigError: `QP-CFG-…` when the text is not acceptable JSON.
            PlanError: `QP-PLAN-JSON` when it is not a plan of this version.
        """
        from quantplug.jsonio import parse_json
        from quantplug.serial import from_json

        return from_json(parse_json(text.encode(), where), where)


def _choice_of(layer: LayerPlan, decision: Decision | None) -> list[object]:
    segments = [
        [s.name, s.scheme.name, s.scheme.params, s.shape.out_features, s.shape.in_features, s.quantize]
        for s in layer.segments
    ]
    kernels = [[c.kernel, c.min_rows, c.max_rows] for c in decision.choices] if decision is not None else []
    experts = [] if layer.experts is None else [layer.experts.count, layer.experts.top_k, layer.experts.files.stacked]
    return [list(layer.tensors), segments, kernels, experts]
