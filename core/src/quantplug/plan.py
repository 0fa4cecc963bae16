"""
The plan: every decision about a checkpoint as an immutable value that can be read before a weight is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from quantplug.config import Field
from quantplug.kernel import Verdict
from quantplug.platform import Platform
from quantplug.skip import EntryUse, SchemeRef
from quantplug.spec import LinearProblem, LinearShape

PLAN_VERSION = 1
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
    """

    kernel: str
    plugin: str
    verdict: Verdict
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel for a range of rows M: `min_rows <= M`, and `M <= max_rows` unless that is None."""

    kernel: str
    min_rows: int = 0
    max_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """
    The kernels of one layer.

    Attributes:
        choices: by rising rows, without gaps.
        layout_id: the layout its weights are kept in.
        candidates: everyone who was asked, best first, with the answers.
        basis: "estimated" or "measured".
    """

    choices: tuple[Choice, ...]
    layout_id: str
    candidates: tuple[Candidate, ...]
    basis: Literal["estimated", "measured"] = "estimated"

    @property
    def kernel(self) -> str:
        """The kernel that serves a single row."""
        return self.choices[0].kernel


@dataclass(frozen=True, slots=True)
class Segment:
    """
    One stored shard of a quantized layer.

    Attributes:
        name: its checkpoint path.
        scheme: scheme reference it is decoded by.
        shape: logical size.
        tensors: (suffix, tensor name) of each stored tensor it consumes.
    """

    name: str
    scheme: SchemeRef
    shape: LinearShape
    tensors: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """
    What happens to one module.

    Attributes:
        path: module path in the engine.
        kind: "linear", "embedding" or "other".
        segments: stored shards, () when the module stays dense.
        problem: what the kernel runs, None when dense.
        decision: index into `Plan.decisions`, None when dense.
        rule: the deciding entry in words ("-:.*lm_head (config.json: …)", "default", "evidence: …").
        scheme: short human form ("gptq 4-bit group 64 sym"), "" when dense.
        tensors: tensors that a dense module consumes; a quantized one has them in `segments`, only its bias here.
        file_bytes: bytes of those tensors in the files.
        memory_bytes: estimated bytes once prepared.
        notes: what a reader should know.
    """

    path: str
    kind: str
    segments: tuple[Segment, ...] = ()
    problem: LinearProblem | None = None
    decision: int | None = None
    rule: str = ""
    scheme: str = ""
    tensors: tuple[str, ...] = ()
    file_bytes: int = 0
    memory_bytes: int = 0
    notes: tuple[str, ...] = ()

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
        entries: what every rule of the configuration did.
        warnings: what a reader should know about the whole.
        plugins: (distribution, version) that took part, sorted.
    """

    platform: Platform
    dtype: str
    dialect: str
    fields: tuple[Field, ...]
    layers: tuple[LayerPlan, ...]
    decisions: tuple[Decision, ...]
    left: tuple[LeftTensors, ...] = ()
    entries: tuple[EntryUse, ...] = ()
    warnings: tuple[str, ...] = ()
    plugins: tuple[tuple[str, str], ...] = field(default=())
