"""
The plan of one module: its ruling, what its stored tensors say, the problem, and the kernels.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError, ConfigError
from quantplug.evidence import BIAS_SUFFIX, DENSE_DTYPES, DENSE_SUFFIX, check_whole
from quantplug.kernel import Accepted
from quantplug.matcher import disagreement
from quantplug.plan import LayerPlan, Segment
from quantplug.schemes import SchemeCache
from quantplug.select import select
from quantplug.spec import LinearProblem, LinearShape, SegmentSpec, scale_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantplug.checkpoint import TensorHeader
    from quantplug.config import QuantConfig
    from quantplug.evidence import StoredModules
    from quantplug.inventory import ModuleInfo
    from quantplug.kernel import Rejected
    from quantplug.matcher import Matcher
    from quantplug.plan import Decision
    from quantplug.platform import Platform
    from quantplug.policy import Policy
    from quantplug.registry import Registry
    from quantplug.scheme import LinearScheme
    from quantplug.skip import Ruling, SchemeRef
    from quantplug.spec import ParamSpec

_SCALE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e8m0fnu": 1, "float8_e4m3fn": 1}


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
        strict: bool,
    ) -> None:
        self.dtype = dtype
        self.schemes = SchemeCache(registry)
        self._config = config
        self._matcher = matcher
        self._stored = stored
        self._platform = platform
        self._policy = policy
        self._registry = registry
        self._probes = probes
        self._strict = strict
        self._decided: dict[object, int] = {}
        self._decisions: list[Decision] = []
        self._warnings: dict[str, None] = {}

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The distinct decisions so far."""
        return tuple(self._decisions)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What came up so far, once each."""
        return tuple(self._warnings)

    def plan(self, module: ModuleInfo) -> LayerPlan:
        """
        Return the plan of one module.

        Raises:
            ConfigError, CheckpointError, PlanError: when rules, tensors and kernels do not come together.
        """
        # Every module is put to the matcher, so that an entry that names an embedding or a norm counts as used.
        ruling = self._matcher.decide(module, self._stored.paths, split=True)
        self._warnings.update(dict.fromkeys(ruling.warnings))
        names = [name for name in module.shards or (module.name,) if name in self._stored.paths]
        if module.tied_to and not names:
            return self._tied(module)
        if module.kind != "linear":
            return self._dense(module, "not a linear layer" if module.kind == "other" else "embeddings stay whole")
        if not names:
            raise self._missing(module)
        settled = {name: self._settle(module, name, ruling.of(name)) for name in names}
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
        rule = self._words(ruling)
        notes = [note for _, note in settled.values() if note]
        if None in uses:
            return self._tied(module) if module.tied_to else self._dense(module, rule, *notes)
        return self._quantized(module, [(name, use) for name, (use, _) in settled.items() if use], rule, notes)

    def _settle(self, module: ModuleInfo, name: str, ruling: Ruling) -> tuple[SchemeRef | None, str]:
        """Let the stored tensors confirm the ruling for one shard, or overrule it where they are unambiguous."""
        if self._config.on_load:
            if ruling.use is not None and DENSE_SUFFIX not in self._stored.tensors(name):
                raise self._missing(module)
            return ruling.use, ""
        asked = ruling.use or self._matcher.otherwise(module, name)
        if asked is None:
            return None, ""
        scheme = self.schemes.get(asked, self._config.dialect)
        described = self._stored.metadata(name)
        if described:
            scheme.check_metadata(described, {s: h.shape for s, h in self._stored.tensors(name).items()}, name)
        evidence = self._stored.judge(name, scheme.suffixes, scheme.required_suffixes)
        if evidence == "both":
            raise ConfigError(
                "QP-SKIP-AMBIGUOUS",
                name,
                "stores both a dense weight and "
                + ", ".join(sorted((scheme.suffixes - {DENSE_SUFFIX}) & self._stored.tensors(name).keys())),
                expected="one of the two",
                fix="The file was written wrongly; ask its maker, or delete one of the two.",
            )
        if evidence == "partial":
            lacking = sorted(scheme.required_suffixes - self._stored.tensors(name).keys())
            raise CheckpointError(
                "QP-ST-MISSING",
                name,
                f"lacks {', '.join(lacking)}",
                expected=f"every tensor of {scheme.describe()}",
                fix="The file is incomplete; download or convert it again.",
            )
        if evidence == "absent" and ruling.use is not None:
            raise self._missing(module)
        stored_as = asked if evidence == "quantized" else None
        if (stored_as is None) == (ruling.use is None):
            return ruling.use, ""
        said = "keeps it whole" if ruling.use is None else f"assigns {scheme.describe()}"
        note = f"evidence: {self._words(ruling)} {said}, but {name} is stored {'quantized' if stored_as else 'dense'}"
        if self._strict:
            raise ConfigError(
                "QP-SKIP-EVIDENCE",
                name,
                note.removeprefix("evidence: "),
                expected="rules and tensors to agree (strict)",
                fix="Plan without strict to let the tensors decide.",
            )
        self._warnings[note] = None
        return stored_as, note

    def _quantized(
        self, module: ModuleInfo, shards: list[tuple[str, SchemeRef]], rule: str, notes: list[str]
    ) -> LayerPlan:
        segments, specs, schemes = [], [], []
        for name, ref in shards:
            scheme = self.schemes.get(ref, self._config.dialect)
            segment = self._segment(name, ref, scheme, module.shape)
            segments.append(segment)
            specs.append(SegmentSpec(segment.shape.out_features, scheme.weight_spec()))
            schemes.append(scheme)
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
        problem = LinearProblem(shape.in_features, tuple(specs), self.dtype, bool(biases), activation)
        index = self._decide(problem, module)
        headers = [self._stored.tensors(s.name)[suffix] for s in segments for suffix, _ in s.tensors]
        headers += [self._stored.tensors(s.name)[BIAS_SUFFIX] for s in segments if biases]
        return LayerPlan(
            path=module.path,
            kind=module.kind,
            segments=tuple(segments),
            problem=problem,
            decision=index,
            rule=rule,
            scheme=" + ".join(dict.fromkeys(scheme.describe() for scheme in schemes)),
            tensors=biases,
            file_bytes=sum(header.nbytes for header in headers),
            memory_bytes=self._memory(problem, self._decisions[index]),
            notes=tuple(notes),
        )

    def _segment(self, name: str, ref: SchemeRef, scheme: LinearScheme, known: LinearShape | None) -> Segment:
        stored = self._stored.tensors(name)
        if self._config.on_load:
            return self._dense_segment(name, ref, scheme, stored[DENSE_SUFFIX])
        shapes = {suffix: header.shape for suffix, header in stored.items() if suffix in scheme.suffixes}
        shape = scheme.shape_of(shapes, name)
        if known is not None and known.in_features != shape.in_features:
            # Packed rows whose last word is not full fit more than one width; of those, the model's own counts.
            same = LinearShape(shape.out_features, known.in_features)
            shape = same if _all_fit(scheme.params(same), shapes) else shape
        tensors = []
        for param in scheme.params(shape):
            header = stored.get(param.suffix)
            if header is None:
                continue
            if header.shape != param.shape and header.shape not in param.other_shapes:
                raise CheckpointError(
                    "QP-ST-SHAPE",
                    f"{header.file}: {header.name}",
                    f"shape {list(header.shape)}",
                    expected=f"{list(param.shape)} for a {shape.out_features} x {shape.in_features} layer in "
                    f"{scheme.describe()}",
                    fix="Check bits and group_size in the configuration.",
                )
            if header.dtype not in param.dtypes:
                raise CheckpointError(
                    "QP-ST-DTYPE",
                    f"{header.file}: {header.name}",
                    f"dtype {header.dtype}",
                    expected=" or ".join(param.dtypes),
                )
            tensors.append((param.suffix, header.name))
        return Segment(name, ref, shape, tuple(tensors))

    def _dense_segment(self, name: str, ref: SchemeRef, scheme: LinearScheme, header: TensorHeader) -> Segment:
        """Return a segment that is stored dense and quantized while loading."""
        where = f"{header.file}: {header.name}"
        if len(header.shape) != 2:
            raise CheckpointError("QP-ST-SHAPE", where, f"shape {list(header.shape)}", expected="two dimensions")
        if header.dtype not in DENSE_DTYPES:
            raise CheckpointError("QP-ST-DTYPE", where, f"dtype {header.dtype}", expected=" or ".join(DENSE_DTYPES))
        shape = LinearShape(*header.shape)
        try:
            scheme.params(shape)
        except ConfigError as error:
            raise ConfigError(
                error.code, name, error.what, expected=error.expected, fix=error.fix or f"Skip it: skip=[{name!r}]."
            ) from error
        return Segment(name, ref, shape, ((DENSE_SUFFIX, header.name),), quantize=True)

    def _decide(self, problem: LinearProblem, module: ModuleInfo) -> int:
        wishes = tuple(rule for rule in self._policy.rules if rule.concerns(module))
        key = (problem, wishes)
        if key not in self._decided:
            decision = select(problem, module, self._platform, self._registry, self._policy, self._probes)
            self._decided[key] = len(self._decisions)
            self._decisions.append(decision)
            self._warn_fallback(module, decision)
        return self._decided[key]

    def _warn_fallback(self, module: ModuleInfo, decision: Decision) -> None:
        if self._registry.kernels[decision.kernel].item.traits.fallback:
            others = "; ".join(
                f"{c.kernel}: {c.verdict.reason}" for c in decision.candidates if not isinstance(c.verdict, Accepted)
            )
            self._warnings[
                f"{module.path} and layers like it run on the slow {decision.kernel} kernel"
                + (f" ({others})" if others else " (no other kernel is installed)")
            ] = None

    def _memory(self, problem: LinearProblem, decision: Decision) -> int:
        bits = sum(
            segment.out_features * problem.in_features * segment.weight.element.bits for segment in problem.segments
        )
        verdict = next(c.verdict for c in decision.candidates if c.kernel == decision.kernel)
        extra = verdict.extra_bytes if isinstance(verdict, Accepted) else 0
        shared = sum(
            prod(scale_shape(segment.weight.granularity, segment.out_features, problem.in_features))
            * (_SCALE_BYTES[segment.weight.scale_dtype] + segment.weight.zero_points)
            for segment in problem.segments
        )
        return bits // 8 + shared + extra

    def _tied(self, module: ModuleInfo) -> LayerPlan:
        """Plan a module whose weight is another's; a dense copy of it in the file is left as stale."""
        return LayerPlan(module.path, module.kind, rule=f"tied to {module.tied_to}: stored once, not quantized")

    def _dense(self, module: ModuleInfo, rule: str, *notes: str) -> LayerPlan:
        headers = [header for name in module.shards or (module.name,) for header in self._stored.tensors(name).values()]
        if module.kind == "linear":
            if not any(header.name.endswith(f".{DENSE_SUFFIX}") for header in headers):
                raise self._missing(module)
            extra = [h.name for h in headers if h.name.rpartition(".")[2] not in (DENSE_SUFFIX, BIAS_SUFFIX)]
            headers = [h for h in headers if h.name not in extra]
        check_whole(module, headers)
        size = sum(header.nbytes for header in headers)
        return LayerPlan(
            module.path, module.kind, rule=rule, tensors=tuple(header.name for header in headers), file_bytes=size,
            memory_bytes=size, notes=notes,
        )  # fmt: skip

    def _words(self, ruling: Ruling) -> str:
        if ruling.rule is not None:
            return f"{ruling.rule.entry.text} ({ruling.rule.entry.origin})"
        if ruling.shards:
            return "; ".join(f"{shard}: {text}" for shard, text in ruling.shards)
        if self._config.on_load:
            return "quantized on load, as the caller wishes"
        return f"default of {self._config.dialect}" if self._config.dialect else "the checkpoint is dense"

    def _missing(self, module: ModuleInfo) -> CheckpointError:
        return CheckpointError(
            "QP-ST-MISSING",
            module.path,
            "the checkpoint has no tensors for it",
            expected="a dense weight or the tensors of a quantized layer under "
            + " or ".join(module.shards or (module.name,)),
            fix="The checkpoint belongs to another model, or is incomplete.",
        )


def _all_fit(params: Iterable[ParamSpec], stored: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether every stored tensor has a shape that is declared for it."""
    return all(stored.get(p.suffix, p.shape) in (p.shape, *p.other_shapes) for p in params)
