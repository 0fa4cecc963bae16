"""
Making a plan: configuration, rules, stored tensors and kernels brought together, from headers alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.asking import probe as probe_kernel
from quantplug.checkpoint import open_checkpoint
from quantplug.config import read_model_config, resolve_config
from quantplug.detect import detect
from quantplug.errors import PlanError
from quantplug.evidence import StoredModules
from quantplug.inventory import inventory_of
from quantplug.kernel import Accepted
from quantplug.layers import LayerPlanner
from quantplug.matcher import Matcher
from quantplug.onload import OnLoad
from quantplug.plan import KVCachePlan, Plan
from quantplug.platform import Platform
from quantplug.plugins import registry as installed
from quantplug.policy import Policy
from quantplug.source import resolve_source
from quantplug.timings import Timings
from quantplug.timingstore import read_timings, store_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from quantplug.inventory import Inventory
    from quantplug.jsonio import Json
    from quantplug.kernel import Rejected
    from quantplug.moekernel import Kernel
    from quantplug.plan import Decision
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
        strict: whether a rule that the stored tensors contradict is an error rather than a note.
        timings: measured times of kernels; None reads those that `quantplug tune` left for this user. They play a part
            in plans for the machine at hand only.
        registry: plugins to ask; None asks the installed ones.

    Raises:
        ConfigError, CheckpointError, PlanError, PluginError: with their stable codes.
    """
    registry = installed() if registry is None else registry
    directory = resolve_source(source)
    checkpoint = open_checkpoint(directory)
    model_config = read_model_config(directory)
    if isinstance(quantize, str):
        quantize = OnLoad(quantize)
    config = resolve_config(directory, registry, override=override, quantize=quantize)
    if inventory is None:
        inventory = inventory_of(checkpoint, model_config, registry, config)
    probes: Mapping[str, Rejected | None] = {}
    probe = platform is None if probe is None else probe
    if platform is None:
        platform = detect(registry)
    elif isinstance(platform, str):
        platform = Platform.parse(platform)
    if probe:
        probes = probe_kernels(registry, platform)
    if timings is None:
        timings = read_timings(store_path()) if platform.device else Timings()
    stored = StoredModules(checkpoint)
    stored.unstack(inventory)
    matcher = Matcher(config.rules, config.default)
    layers = LayerPlanner(
        config=config,
        matcher=matcher,
        stored=stored,
        platform=platform,
        dtype=activation_dtype(dtype, model_config),
        policy=Policy.from_environment() if policy is None else policy,
        registry=registry,
        probes=probes,
        timings=timings,
        strict=strict,
    )
    planned = tuple(layers.plan(module) for module in inventory)
    left = stored.account(planned, inventory)
    report = matcher.report()
    return Plan(
        platform=platform,
        dtype=layers.dtype,
        dialect=config.dialect,
        fields=config.fields,
        layers=planned,
        decisions=layers.decisions,
        left=left,
        kv_cache=_kv_cache(config.kv_cache, stored.kv_scales),
        entries=report.uses,
        warnings=(
            *checkpoint.warnings,
            *config.notes,
            *layers.warnings,
            *report.warnings,
            *([timings.warning] if timings.warning else []),
            *_unmeasured(layers.decisions, registry),
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
