"""
Plan, load, run: the short way for someone with a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.entries import path_entries
from quantplug.onload import OnLoad
from quantplug.planner import plan as make_plan
from quantplug.plugins import registry as installed
from quantplug.source import resolve_source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from quantplug.host import RunningModel
    from quantplug.jsonio import Json
    from quantplug.load import Progress
    from quantplug.policy import Policy
    from quantplug.registry import Registry


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    policy: Policy | None = None,
    override: Mapping[str, Json] | None = None,
    quantize: str | None = None,
    skip: Sequence[str] = (),
    strict: bool = False,
    host: str | None = None,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> RunningModel:
    """
    Plan a checkpoint for the machine at hand and load it into a framework, ready to generate.

    Args:
        source: checkpoint directory, or a Hugging Face repository id.
        dtype: torch name of the activation dtype; None takes the one config.json names.
        policy: wishes about kernels.
        override: quantization fields the caller states.
        quantize: name of a grid to quantize dense weights to while they are loaded ("int4-g32", "fp8", "mxfp8", …; see
            `Registry.recipes`).
        skip: layers to leave whole then: paths, globs, or `re:` expressions.
        strict: whether a rule that the stored tensors contradict is an error.
        host: name of the framework; None takes the only one installed.
        progress: told how far loading is.
        registry: plugins to use; None takes the installed ones.

    Raises:
        QuantplugError: with a stable code; nothing is left behind.
    """
    registry = installed() if registry is None else registry
    chosen = registry.host(host).item
    directory = resolve_source(source)
    wish = None if quantize is None else OnLoad(quantize, path_entries(list(skip), "skip"))
    planned = make_plan(
        directory, dtype=dtype, policy=policy, override=override, quantize=wish, strict=strict, registry=registry
    )
    return chosen.load(planned, directory, progress=progress, registry=registry)
