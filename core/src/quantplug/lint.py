"""
A checkpoint looked over: whatever is wrong or odd about it, all at once, without loading it.

Planning stops at the first error; this collects. It reads headers, the configuration and the stored scales, and on
request every code of the weights. What it finds is a value; nothing is changed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from quantplug.checkpoint import open_checkpoint
from quantplug.config import read_model_config, resolve_config
from quantplug.errors import PluginError, QuantplugError
from quantplug.evidence import StoredModules
from quantplug.findings import SEVERITIES, Finding, LintReport
from quantplug.inventory import inventory_of
from quantplug.layers import LayerPlanner
from quantplug.lintpeers import compare_peers
from quantplug.lintrules import Decided, check_entries, check_evidence, check_shards
from quantplug.matcher import Matcher
from quantplug.planner import activation_dtype
from quantplug.platform import Platform
from quantplug.plugins import registry as installed
from quantplug.policy import Policy
from quantplug.source import resolve_source
from quantplug.timings import Timings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from quantplug.checkpoint import Checkpoint
    from quantplug.config import QuantConfig
    from quantplug.inventory import Inventory
    from quantplug.jsonio import Json
    from quantplug.load import Progress
    from quantplug.registry import Registry
    from quantplug.schemes import SchemeCache

T = TypeVar("T")


def lint(
    source: str | Path,
    *,
    override: Mapping[str, Json] | None = None,
    dtype: str | None = None,
    deep: bool = False,
    peers: bool = True,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> LintReport:
    """
    Look a checkpoint over and return everything that is wrong or odd about it.

    An error that would stop a plan becomes a finding, and the rest is looked at as far as it can be: entries that match
    nothing or too much, rules against stored tensors, shards that disagree, stored scales, and where other engines
    would decide otherwise.

    Args:
        source: checkpoint directory, or a Hugging Face repository id.
        override: quantization fields the caller states.
        dtype: torch name of the activation dtype that values are held against; None takes the one config.json names.
        deep: whether every 8-bit float code of the weights is read, too.
        peers: whether the rules of other engines are compared.
        progress: told how many bytes of how many are read.
        registry: plugins to ask; None asks the installed ones.

    Raises:
        CheckpointError: `QP-ST-FILE` when there is no such directory or repository.
        PluginError: `QP-PLUG-…` when a plugin fails.
    """
    registry = installed() if registry is None else registry
    directory = resolve_source(source)
    found: list[Finding] = []
    checkpoint = _kept(lambda: open_checkpoint(directory), found)
    model = _kept(lambda: read_model_config(directory), found)
    # What config.json is no JSON for is said once.
    config = None if model is None else _kept(lambda: resolve_config(directory, registry, override=override), found)
    dialect = "" if config is None else config.dialect
    if checkpoint is None or model is None or config is None:
        return LintReport(str(directory), dialect, _ordered(found))
    found += [Finding("QP-LINT-NOTE", "note", str(directory), text) for text in (*checkpoint.warnings, *config.notes)]
    # A dtype that the caller names and nobody knows is the caller's error, one in config.json a finding.
    held = activation_dtype(dtype, {}) if dtype else _kept(lambda: activation_dtype(None, model), found)
    inventory = _kept(lambda: inventory_of(checkpoint, model, registry, config), found)
    if inventory is None:
        return LintReport(str(directory), dialect, _ordered(found))
    held = held or activation_dtype(None, {})
    decided, schemes = _decide(checkpoint, config, inventory, held, registry, found)
    found += check_evidence(decided)
    found += check_shards(decided)
    engines: tuple[tuple[str, str], ...] = ()
    if peers:
        compared = compare_peers(decided, config, registry)
        found += compared.findings
        engines = compared.peers
    from quantplug.lintscales import Values, check_values  # needs torch

    look = partial(check_values, checkpoint, decided, schemes, dtype=held, deep=deep, progress=progress)
    read = _kept(look, found) or Values()
    found += read.findings
    return LintReport(str(directory), dialect, _ordered(found), len(inventory), read.scales, read.codes, engines)


def _decide(
    checkpoint: Checkpoint,
    config: QuantConfig,
    inventory: Inventory,
    dtype: str,
    registry: Registry,
    found: list[Finding],
) -> tuple[list[Decided], SchemeCache]:
    """Plan every module, whatever became of the others, and account for every tensor."""
    stored = StoredModules(checkpoint)
    _kept(lambda: stored.unstack(inventory), found)
    matcher = _kept(lambda: Matcher(config.rules, config.default), found) or Matcher((), config.default)
    planner = LayerPlanner(
        config=config, matcher=matcher, stored=stored, platform=Platform.parse("cpu"), dtype=dtype, policy=Policy(),
        registry=registry, probes={}, timings=Timings(), strict=False,
    )  # fmt: skip
    decided = []
    for module in inventory:
        ruling = _kept(partial(matcher.decide, module, stored.paths, split=True), found)
        layer = None if ruling is None else _kept(partial(planner.plan, module), found)
        decided.append(Decided(module, ruling, layer))
    if all(item.layer is not None for item in decided):
        # With a module missing, its tensors would be claimed by nobody, which is no news.
        _kept(lambda: stored.account([item.layer for item in decided if item.layer], inventory), found)
    found += check_entries(matcher.report(), decided)
    return decided, planner.schemes


def _kept(call: Callable[[], T], found: list[Finding]) -> T | None:
    """Return the answer of a call, or keep its error as a finding; a plugin at fault is not the checkpoint's."""
    try:
        return call()
    except PluginError:
        raise
    except QuantplugError as error:
        found.append(Finding.of(error))
        return None


def _ordered(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings once each, worst first, in the order in which they were made."""
    return tuple(sorted(dict.fromkeys(found), key=lambda finding: SEVERITIES.index(finding.severity)))
