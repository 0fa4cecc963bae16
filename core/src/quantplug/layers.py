"""
The plan of one module: its ruling, what its stored tensors say, the problem, and the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.deciding import Decider
from quantplug.errors import CheckpointError, ConfigError
from quantplug.evidence import BIAS_SUFFIX, DENSE_SUFFIX, check_whole
from quantplug.expertlayers import ExpertPlanner
from quantplug.matcher import disagreement
from quantplug.plan import LayerPlan
from quantplug.settle import Settler
from quantplug.skip import SCHEMED
from quantplug.spec import LinearProblem, LinearShape, SegmentSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.config import QuantConfig
    from quantplug.evidence import StoredModules
    from quantplug.inventory import ModuleInfo
    from quantplug.kernel import Rejected
    from quantplug.matcher import Matcher
    from quantplug.plan import Decision
    from quantplug.platform import Platform
    from quantplug.policy import Policy
    from quantplug.registry import Registry
    from quantplug.schemes import SchemeCache
    from quantplug.skip import SchemeRef
    from quantplug.timings import Timings

_WHOLE = {"embedding": "embeddings stay whole", "other": "not a linear layer"}


class LayerPlanner:
    """Plans modules one by one; equal schemes are built once and equal problems are decided once."""

    def __init__(
        self,
        *,
        config: QuantConfig,
        matcher: Matcher,
        stored: StoredModules,
        platform: Platform,
        dtype: str,
        policy: Policy,
        registry: Registry,
        probes: Mapping[str, Rejected | None],
        timings: Timings,
        strict: bool,
    ) -> None:
        self.dtype = dtype
        self._matcher = matcher
        self._stored = stored
        self._settler = Settler(config, matcher, stored, registry, strict=strict)
        self._decider = Decider(platform, policy, registry, probes, timings)
        self._experts = ExpertPlanner(self._settler, self._decider, stored, dtype)

    @property
    def schemes(self) -> SchemeCache:
        """The schemes that took part so far."""
        return self._settler.schemes

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The distinct decisions so far."""
        return tuple(self._decider.decisions)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What came up so far, once each."""
        return (*self._settler.warnings, *self._decider.warnings)

    def plan(self, module: ModuleInfo) -> LayerPlan:
        """
        Return the plan of one module.

        Raises:
            ConfigError, CheckpointError, PlanError: when rules, tensors and kernels do not come together.
        """
        # Every module is put to the matcher, so that an entry that names an embedding or a norm counts as used.
        ruling = self._matcher.decide(module, self._stored.paths, split=True)
        self._settler.warnings.update(dict.fromkeys(ruling.warnings))
        if module.experts is not None:
            return self._experts.plan(module, module.experts, ruling)
        names = [name for name in module.shards or (module.name,) if name in self._stored.paths]
        if module.tied_to and not names:
            return self._tied(module)
        if module.kind not in SCHEMED:
            return self._dense(module, _WHOLE[module.kind])
        if not names:
            raise self._settler.missing(module)
        settled = {name: self._settler.settle(module, name, ruling.of(name)) for name in names}
        uses = {use for use, _ in settled.values()}
        if ruling.split and len(uses) > 1:
            raise disagreement(module, ruling)  # the tensors do not come to one scheme either
        if None in uses and len(uses) > 1:
            raise ConfigError(
                "QP-SKIP-SHARDS",
                module.path,
                "its shards are partly quantized: "
                + ", ".join(f"{name} {'dense' if use is None else use.name}" for name, (use, _) in settled.items()),
                expected="all shards of a fused module quantized, or none",
            )
        rule = self._settler.words(ruling)
        notes = [note for _, note in settled.values() if note]
        if None in uses:
            return self._tied(module) if module.tied_to else self._dense(module, rule, *notes)
        return self._quantized(module, [(name, use) for name in names if (use := settled[name][0])], rule, notes)

    def _quantized(
        self, module: ModuleInfo, shards: list[tuple[str, SchemeRef]], rule: str, notes: list[str]
    ) -> LayerPlan:
        known = module.shape.in_features if module.shape is not None else 0
        segments = tuple(self._settler.segment(name, ref, known) for name, ref in shards)
        schemes = [self.schemes.get(ref, name) for name, ref in shards]
        specs = tuple(SegmentSpec(each.shape.out_features, self._settler.contract(each)) for each in segments)
        widths = {segment.shape.in_features for segment in segments}
        shape = LinearShape(sum(s.shape.out_features for s in segments), segments[0].shape.in_features)
        if len(widths) > 1 or (module.shape is not None and module.shape != shape):
            wanted = module.shape or segments[0].shape
            raise CheckpointError(
                "QP-ST-SHAPE",
                module.path,
                f"the stored tensors describe {shape.out_features} x {shape.in_features}"
                + (f" (shards disagree about K: {sorted(widths)})" if len(widths) > 1 else ""),
                expected=f"{wanted.out_features} x {wanted.in_features}, as the model has it",
                fix="Check bits and group_size in the configuration, and that the files belong to this model.",
            )
        biases = tuple(f"{s.name}.{BIAS_SUFFIX}" for s in segments if BIAS_SUFFIX in self._stored.tensors(s.name))
        if biases and len(biases) != len(segments):
            raise CheckpointError(
                "QP-ST-MISSING", module.path, f"only {', '.join(biases)} of its shards' biases are stored",
                expected="a bias for every shard, or none",
            )  # fmt: skip
        permitted = {scheme.activation_spec() for scheme in schemes}
        activation = permitted.pop() if len(permitted) == 1 else None
        problem = LinearProblem(shape.in_features, specs, self.dtype, bool(biases), activation)
        index = self._decider.decide(problem, module)
        headers = [self._stored.tensors(s.name)[suffix] for s in segments for suffix, _ in s.tensors]
        headers += [self._stored.tensors(s.name)[BIAS_SUFFIX] for s in segments if biases]
        return LayerPlan(
            path=module.path,
            kind=module.kind,
            segments=segments,
            problem=problem,
            decision=index,
            rule=rule,
            scheme=" + ".join(dict.fromkeys(scheme.describe() for scheme in schemes)),
            tensors=biases,
            file_bytes=sum(header.nbytes for header in headers),
            memory_bytes=self._decider.memory(problem, index),
            notes=tuple(notes),
        )

    def _tied(self, module: ModuleInfo) -> LayerPlan:
        """Plan a module whose weight is another's; a dense copy of it in the file is left as stale."""
        return LayerPlan(module.path, module.kind, rule=f"tied to {module.tied_to}: stored once, not quantized")

    def _dense(self, module: ModuleInfo, rule: str, *notes: str) -> LayerPlan:
        headers = [header for name in module.shards or (module.name,) for header in self._stored.tensors(name).values()]
        if module.kind == "linear":
            if not any(header.name.endswith(f".{DENSE_SUFFIX}") for header in headers):
                raise self._settler.missing(module)
            own = (DENSE_SUFFIX, BIAS_SUFFIX, *module.extras)
            headers = [header for header in headers if header.name.rpartition(".")[2] in own]
        check_whole(module, headers)
        size = sum(header.nbytes for header in headers)
        return LayerPlan(
            module.path, module.kind, rule=rule, tensors=tuple(header.name for header in headers), file_bytes=size,
            memory_bytes=size, notes=notes,
        )  # fmt: skip
