"""
Making a plan: configuration, rules, stored tensors and kernels brought together, from headers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantplug.asking import probe as probe_kernel
from quantplug.checkpoint import open_checkpoint
from quantplug.config import DENSE, read_model_config, resolve_config
from quantplug.detect import detect
from quantplug.draft import (
    DENSE_WISH,
    NEXT_N,
    Draft,
    next_n_modules,
    refuse_lost_codes,
    renamed,
    shared_with_target,
    tensors_of,
)
from quantplug.errors import PlanError
from quantplug.evidence import StoredModules
from quantplug.inventory import architecture_of, inventory_of
from quantplug.kernel import Accepted
from quantplug.layers import LayerPlanner
from quantplug.matcher import Matcher
from quantplug.onload import OnLoad
from quantplug.plan import KVCachePlan, Plan
from quantplug.platform import Platform
from quantplug.plugins import registry as installed
from quantplug.policy import Policy
from quantplug.secondlayout import spend
from quantplug.skip import RuleReport
from quantplug.source import resolve_source
from quantplug.timings import Timings
from quantplug.timingstore import read_timings, store_path

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from quantplug.checkpoint import Checkpoint
    from quantplug.config import QuantConfig
    from quantplug.inventory import Inventory
    from quantplug.jsonio import Json
    from quantplug.kernel import Rejected
    from quantplug.moekernel import Kernel
    from quantplug.plan import Decision, LayerPlan
    from quantplug.registry import Provided, Registry
    from quantplug.spec import ActivationSpec

DTYPES = ("bfloat16", "float16", "float32")


def plan(
    source: str | Path,
    *,
    platform: Platform | str | None = None,
    probe: bool | None = None,
    dtype: str | None = None,
    policy: Policy | None = None,
    override: Mapping[str, Json] | None = None,
    quantize: OnLoad | str | None = None,
    inventory: Inventory | None = None,
    draft: Draft | str | Path | None = None,
    strict: bool = False,
    timings: Timings | None = None,
    registry: Registry | None = None,
) -> Plan:
    """
    Decide how every layer of a checkpoint runs, reading headers and configuration only.

    Args:
        source: checkpoint directory, or a Hugging Face repository id.
        platform: what to plan for ("cuda:9.0"); None is the machine at hand.
        probe: whether kernels try themselves out on this very machine; None does so when `platform` is None.
        dtype: torch name of the activation dtype; None takes the one config.json names, else bfloat16.
        policy: wishes about kernels; None reads the file that `QUANTPLUG_POLICY` names, if any.
        override: quantization fields the caller states; they may add to the file, never contradict it.
        quantize: the wish to quantize dense weights while they are loaded, or just the name of the recipe.
        inventory: the modules of the model that will run; None takes them from the tensor names.
        draft: the model that drafts tokens for it: a directory, or "next-n" for the layers that lie in its own files;
            a `Draft` says more. Its own files decide about it; its plan is `Plan.draft`.
        strict: whether a rule that the stored tensors contradict is an error rather than a note.
        timings: measured times of kernels; None reads those that `quantplug tune` left for this user. They play a part
            in plans for the machine at hand only.
        registry: plugins to ask; None asks the installed ones.

    Raises:
        ConfigError, CheckpointError, PlanError, PluginError: with their stable codes.
    """
    registry = installed() if registry is None else registry
    directory = resolve_source(source)
    around = _surroundings(platform, probe, policy, timings, registry, strict=strict)
    files = _open(directory, registry, override, quantize, dtype)
    inventory = files.inventory() if inventory is None else inventory
    if draft is None:
        return _plan(files, inventory, around)
    draft = draft if isinstance(draft, Draft) else Draft(None if draft == NEXT_N else draft)
    if draft.source is not None:
        made = _plan(files, inventory, around)
        return replace(made, draft=_plan_apart(draft, draft.source, _after(around, made)))
    of_draft = _described(
        files.checkpoint, files.model_config, registry, draft.override, draft.recipe, draft.dtype or dtype
    )
    _, layers = next_n_modules(of_draft.inventory(), files.model_config, architecture_of(files.model_config, registry))
    own = tensors_of(files.checkpoint, layers)
    names = {module.name for module in layers}
    rest = replace(inventory, modules=tuple(module for module in inventory if module.name not in names))
    target = _plan(files, rest, around, elsewhere=own)
    theirs = frozenset(files.checkpoint.tensors) - own
    drafting = _plan_draft(of_draft, draft, layers, _after(around, target), elsewhere=theirs)
    # One configuration speaks of both: an entry that matched in one of them has done its work.
    return replace(_without(target, drafting), draft=_without(drafting, target))


def _without(made: Plan, other: Plan) -> Plan:
    """Return a plan without remarks on entries that match nothing in it, but in another."""
    matched = {use.entry for use in other.entries if use.matched}
    settled = RuleReport(tuple(use for use in made.entries if not use.matched and use.entry in matched))
    return replace(made, warnings=tuple(text for text in made.warnings if text not in settled.warnings))


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a plan depends on besides the files, the same for a model and its draft."""

    platform: Platform
    probes: Mapping[str, Rejected | None]
    policy: Policy
    timings: Timings
    registry: Registry
    strict: bool


def _after(around: _Surroundings, made: Plan) -> _Surroundings:
    """Return what a draft's plan depends on: of the memory for second layouts it has what the target's plan left."""
    spent = sum(made.decisions[layer.decision].extra_bytes for layer in made.layers if layer.decision is not None)
    return replace(around, policy=replace(around.policy, layout_budget=around.policy.layout_budget - spent))


@dataclass(frozen=True, slots=True)
class _Files:
    """What is read of one directory."""

    checkpoint: Checkpoint
    model_config: Mapping[str, Json]
    config: QuantConfig
    dtype: str
    registry: Registry

    def inventory(self) -> Inventory:
        return inventory_of(self.checkpoint, self.model_config, self.registry, self.config)


def _surroundings(
    platform: Platform | str | None,
    probe: bool | None,
    policy: Policy | None,
    timings: Timings | None,
    registry: Registry,
    *,
    strict: bool,
) -> _Surroundings:
    probe = platform is None if probe is None else probe
    if platform is None:
        platform = detect(registry)
    elif isinstance(platform, str):
        platform = Platform.parse(platform)
    probes = probe_kernels(registry, platform) if probe else {}
    if timings is None:
        timings = read_timings(store_path()) if platform.device else Timings()
    policy = Policy.from_environment() if policy is None else policy
    return _Surroundings(platform, probes, policy, timings, registry, strict)


def _open(
    directory: Path,
    registry: Registry,
    override: Mapping[str, Json] | None,
    quantize: OnLoad | str | None,
    dtype: str | None,
) -> _Files:
    return _described(open_checkpoint(directory), read_model_config(directory), registry, override, quantize, dtype)


def _described(
    checkpoint: Checkpoint,
    model_config: Mapping[str, Json],
    registry: Registry,
    override: Mapping[str, Json] | None,
    quantize: OnLoad | str | None,
    dtype: str | None,
) -> _Files:
    """Return files that are read already with what they and the caller say about quantization."""
    if isinstance(quantize, str):
        quantize = OnLoad(quantize)
    config = resolve_config(checkpoint.directory, registry, override=override, quantize=quantize)
    return _Files(checkpoint, model_config, config, activation_dtype(dtype, model_config), registry)


def _plan_apart(draft: Draft, source: str | Path, around: _Surroundings) -> Plan:
    """Plan a draft that has a directory of its own."""
    files = _open(resolve_source(source), around.registry, draft.override, draft.recipe, draft.dtype)
    inventory = files.inventory() if draft.inventory is None else draft.inventory
    return _plan_draft(files, draft, inventory, around)


def _plan_draft(
    files: _Files, draft: Draft, inventory: Inventory, around: _Surroundings, elsewhere: Collection[str] = ()
) -> Plan:
    modules = renamed(draft.inventory or inventory, draft.names)
    made = _plan(files, modules, around, elsewhere)
    if draft.quantize == DENSE_WISH:
        refuse_lost_codes(made, f"draft in {files.checkpoint.directory}")
        made = _plan(replace(files, config=DENSE), modules, around, elsewhere)
    return replace(made, warnings=(*made.warnings, *shared_with_target(inventory)))


def _plan(files: _Files, inventory: Inventory, around: _Surroundings, elsewhere: Collection[str] = ()) -> Plan:
    config, registry = files.config, around.registry
    stored = StoredModules(files.checkpoint)
    stored.unstack(inventory)
    matcher = Matcher(config.rules, config.default)
    layers = LayerPlanner(
        config=config,
        matcher=matcher,
        stored=stored,
        platform=around.platform,
        dtype=files.dtype,
        policy=around.policy,
        registry=registry,
        probes=around.probes,
        timings=around.timings,
        strict=around.strict,
    )
    planned = tuple(layers.plan(module) for module in inventory)
    left = stored.account(planned, inventory, elsewhere)
    planned, decisions = spend(around.policy, planned, layers.decisions, around.platform, registry)
    report = matcher.report()
    scales = tuple(name for name in stored.kv_scales if name not in elsewhere)
    return Plan(
        platform=around.platform,
        dtype=layers.dtype,
        dialect=config.dialect,
        fields=config.fields,
        layers=planned,
        decisions=decisions,
        left=left,
        kv_cache=_kv_cache(config.kv_cache, scales),
        entries=report.uses,
        warnings=(
            *files.checkpoint.warnings,
            *config.notes,
            *layers.warnings,
            *report.warnings,
            *([around.timings.warning] if around.timings.warning else []),
            *_unmeasured(decisions, registry),
            *_outdated(planned, decisions, around.timings, around.platform),
        ),
        plugins=_taking_part(registry, layers),
    )


def probe_kernels(registry: Registry, platform: Platform) -> dict[str, Rejected | None]:
    """Probe every kernel that could run on the platform at hand; each is probed once per process by its plugin."""
    probes = {name: probe_kernel(provided.item, platform) for name, provided in registry.kernels.items()}
    return probes | {name: probe_kernel(provided.item, platform) for name, provided in registry.moe_kernels.items()}


def activation_dtype(wish: str | None, model_config: Mapping[str, Json]) -> str:
    """Return the activation dtype: the caller's wish, else what config.json names; raises `QP-PLAN-POLICY`."""
    named = wish or model_config.get("dtype") or model_config.get("torch_dtype") or "bfloat16"
    if named not in DTYPES:
        raise PlanError(
            "QP-PLAN-POLICY",
            "dtype" if wish else "config.json: dtype",
            f"{named!r} is not an activation dtype",
            expected=f"one of {', '.join(DTYPES)}",
        )
    return str(named)


def _unmeasured(decisions: Iterable[Decision], registry: Registry) -> list[str]:
    """Return a warning about kernels that would fit where others were measured, and were not."""
    names: set[str] = set()
    for decision in decisions:
        if decision.basis == "measured":
            names |= {c.kernel for c in decision.candidates if isinstance(c.verdict, Accepted) and not c.measured}
    last = {name for kernels in (registry.kernels, registry.moe_kernels) for name, p in kernels.items() if _is_last(p)}
    lacking = sorted(names - last)
    return [f"not measured, hence passed over: {', '.join(lacking)}; run `quantplug tune` again"] if lacking else []


def _outdated(
    layers: Iterable[LayerPlan], decisions: Sequence[Decision], timings: Timings, platform: Platform
) -> list[str]:
    """Return a warning where there are measured times, and all of them are of other versions."""
    asked = {layer.problem: layer.decision for layer in layers if layer.problem is not None}
    for problem, index in asked.items():
        if problem is None or index is None or any(c.measured for c in decisions[index].candidates):
            continue
        if timings.knows(problem, platform):
            return ["the measured times are of other versions, hence ignored; run `quantplug tune` again"]
    return []


def _is_last(provided: Provided[Kernel]) -> bool:
    return provided.item.traits.fallback


def _kv_cache(spec: ActivationSpec | None, scales: tuple[str, ...]) -> KVCachePlan | None:
    return KVCachePlan(spec, scales) if spec is not None or scales else None


def _taking_part(registry: Registry, layers: LayerPlanner) -> tuple[tuple[str, str], ...]:
    names = {
        candidate.plugin
        for decision in layers.decisions
        for candidate in decision.candidates
        if isinstance(candidate.verdict, Accepted)
    } | layers.schemes.plugins
    return tuple((info.distribution, info.version) for info in registry.plugins if info.distribution in names)
