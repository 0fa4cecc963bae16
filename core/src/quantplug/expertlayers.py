"""
The plan of one layer's experts: every projection of every expert asked, one contract for all, one decision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantplug.errors import CheckpointError, ConfigError, list_names
from quantplug.evidence import BIAS_SUFFIX, DENSE_SUFFIX, check_whole
from quantplug.moe import MoEProblem
from quantplug.moescheme import MoEScheme
from quantplug.plan import LayerPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.deciding import Decider
    from quantplug.evidence import StoredModules
    from quantplug.expertrules import ExpertFiles, ExpertLayer
    from quantplug.inventory import ModuleInfo
    from quantplug.plan import Segment
    from quantplug.settle import Settler
    from quantplug.skip import Ruling, SchemeRef
    from quantplug.spec import WeightSpec

_WHY_ALL = "A layer's experts run as one: quantize all of them, or none."


class ExpertPlanner:
    """Plans layers of experts with what the planner of linear layers settles and decides by."""

    def __init__(self, settler: Settler, decider: Decider, stored: StoredModules, dtype: str) -> None:
        self._settler = settler
        self._decider = decider
        self._stored = stored
        self._dtype = dtype

    def plan(self, module: ModuleInfo, layer: ExpertLayer, ruling: Ruling) -> LayerPlan:
        """
        Return the plan of one layer's experts.

        Raises:
            ConfigError: `QP-SKIP-SHARDS` when rules and tensors keep some experts whole and not others, naming them.
            CheckpointError: `QP-ST-MISSING`, `QP-ST-SHAPE`, `QP-ST-DTYPE` about a projection.
            PlanError: `QP-PLAN-EXPERTS` when experts differ by more than repeated scales; as `select`.
        """
        lacking = [shard for shard in module.shards if not self._stored.tensors(shard)]
        if lacking:
            raise self._settler.missing(module, lacking)
        rulings = dict(ruling.split)
        settled = {shard: self._settler.settle(module, shard, rulings.get(shard, ruling)) for shard in module.shards}
        whole = [shard for shard, (use, _) in settled.items() if use is None]
        notes = _merged([note for _, note in settled.values() if note])
        rule = self._settler.words(ruling) if not ruling.split else "by expert, see the configuration"
        if len(whole) == len(settled):
            return self._dense(module, rule, notes)
        if whole:
            rest = [shard for shard, (use, _) in settled.items() if use is not None]
            raise ConfigError(
                "QP-SKIP-SHARDS",
                module.path,
                f"{len(whole)} of its {len(settled)} projections stay whole ({list_names(whole)}), and {len(rest)} are "
                f"quantized ({list_names(rest)})",
                expected="every projection of every expert quantized, or none",
                fix=_WHY_ALL,
            )
        return self._quantized(module, layer, {name: use for name, (use, _) in settled.items() if use}, rule, notes)

    def _quantized(
        self,
        module: ModuleInfo,
        layer: ExpertLayer,
        uses: Mapping[str, SchemeRef],
        rule: str,
        notes: tuple[str, ...],
    ) -> LayerPlan:
        files = layer.files
        count = len(files.projections)
        known = (layer.hidden,) * (count - 1) + (layer.intermediate,)
        segments = tuple(
            self._settler.segment(name, ref, known[place % count]) for place, (name, ref) in enumerate(uses.items())
        )
        hidden, intermediate = _sizes(module, layer, segments)
        schemes = [self._settler.schemes.get(ref, name) for name, ref in uses.items()]
        contracts = [self._contract(segment) for segment in segments]
        scheme = MoEScheme.of(files, contracts, intermediate, module.path)
        permitted = {each.activation_spec() for each in dict.fromkeys(schemes)}
        biases = self._biases(module)
        problem = MoEProblem(
            layer.count, layer.top_k, hidden, intermediate, scheme.w13, scheme.w2, layer.function, self._dtype,
            bool(biases), permitted.pop() if len(permitted) == 1 else None, layer.router_weight_on_input,
        )  # fmt: skip
        index = self._decider.decide(problem, module)
        stored = [self._stored.tensors(s.name)[suffix] for s in segments for suffix, _ in s.tensors]
        stored += [self._stored.tensors(shard)[BIAS_SUFFIX] for shard in module.shards if biases]
        words = dict.fromkeys(each.describe() for each in dict.fromkeys(schemes))
        return LayerPlan(
            path=module.path,
            kind=module.kind,
            segments=segments,
            problem=problem,
            decision=index,
            rule=rule,
            scheme=" + ".join(words),
            tensors=biases,
            file_bytes=sum(header.nbytes for header in stored),
            memory_bytes=self._decider.memory(problem, index),
            notes=(*notes, *_normalised(files, contracts)),
            experts=layer,
        )

    def _contract(self, segment: Segment) -> WeightSpec:
        """Return the contract of a projection; one that is quantized on load may come to need float32 scales."""
        spec = self._settler.contract(segment)
        narrow = segment.quantize and spec.scale_dtype in ("float16", "bfloat16")
        return replace(spec, scale_dtype="float32") if narrow else spec

    def _biases(self, module: ModuleInfo) -> tuple[str, ...]:
        """Return the stored biases in the order of the projections: one for each, or none at all."""
        found = [self._stored.tensors(shard).get(BIAS_SUFFIX) for shard in module.shards]
        lacking = [shard for shard, header in zip(module.shards, found, strict=True) if header is None]
        if lacking and len(lacking) != len(found):
            raise CheckpointError(
                "QP-ST-MISSING", module.path, f"{list_names(lacking)} have no bias, and other projections have",
                expected="a bias for every projection of every expert, or none",
            )  # fmt: skip
        return tuple(header.name for header in found if header is not None)

    def _dense(self, module: ModuleInfo, rule: str, notes: tuple[str, ...]) -> LayerPlan:
        headers = []
        for shard in module.shards:
            tensors = self._stored.tensors(shard)
            if DENSE_SUFFIX not in tensors:
                raise self._settler.missing(module, [shard])
            headers += [tensors[suffix] for suffix in (DENSE_SUFFIX, BIAS_SUFFIX) if suffix in tensors]
        check_whole(module, headers)
        size = sum(header.nbytes for header in headers)
        return LayerPlan(
            module.path, module.kind, rule=rule, tensors=tuple(header.name for header in headers), file_bytes=size,
            memory_bytes=size, notes=notes, experts=module.experts,
        )  # fmt: skip


def _sizes(module: ModuleInfo, layer: ExpertLayer, segments: Sequence[Segment]) -> tuple[int, int]:
    """Return H and I, which every projection of every expert must agree about."""
    files, count = layer.files, len(layer.files.projections)
    hidden = layer.hidden or segments[0].shape.in_features
    intermediate = layer.intermediate or segments[count - 1].shape.in_features
    wanted = dict.fromkeys(files.projections, (intermediate, hidden))
    wanted[files.joined] = (2 * intermediate, hidden)
    wanted[files.down] = (hidden, intermediate)
    for place, segment in enumerate(segments):
        shape = (segment.shape.out_features, segment.shape.in_features)
        expected = wanted[files.projections[place % count]]
        if shape != expected:
            raise CheckpointError(
                "QP-ST-SHAPE",
                segment.name,
                f"the stored tensors describe {shape[0]} x {shape[1]}",
                expected=f"{expected[0]} x {expected[1]}, as the other projections of {module.path} have it",
                fix="Check bits and group_size in the configuration, and that the files belong to this model.",
            )
    return hidden, intermediate


def _normalised(files: ExpertFiles, stored: Sequence[WeightSpec]) -> tuple[str, ...]:
    """Return a remark where experts are stored in different ways and brought to one."""
    count = len(files.projections)
    ways = {name: list(dict.fromkeys(stored[place::count])) for place, name in enumerate(files.projections)}
    return tuple(
        f"the {name} of its experts is stored as {' and '.join(spec.describe() for spec in specs)}, and runs as one: "
        "scales are repeated"
        for name, specs in ways.items()
        if len(specs) > 1
    )


def _merged(notes: Sequence[str]) -> tuple[str, ...]:
    """Return one remark for many experts about which the same would be said."""
    if len(notes) <= 1:
        return tuple(notes)
    return (f"{notes[0]}; likewise {len(notes) - 1} more of its projections",)
