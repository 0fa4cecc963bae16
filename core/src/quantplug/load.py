"""
Checked loading: every tensor claimed once, every element written, all or nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from quantplug.asking import probe
from quantplug.checkpoint import Checkpoint, open_checkpoint
from quantplug.detect import detect
from quantplug.errors import CheckpointError, PlanError
from quantplug.expertload import load_experts
from quantplug.ledger import Ledger
from quantplug.modules import QuantizedLinear
from quantplug.moemodules import QuantizedExperts
from quantplug.plugins import registry as installed
from quantplug.preparedmodule import PreparedModule, SourceTensor
from quantplug.reader import TensorReader, digest
from quantplug.schemes import SchemeCache
from quantplug.source import resolve_source
from quantplug.workers import Workers, worker_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from quantplug.moekernel import Kernel
    from quantplug.plan import LayerPlan, Plan
    from quantplug.registry import Registry


class Progress(Protocol):
    """A callback that is told how far a long operation is; what it raises never disturbs the operation."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """
        Report progress.

        Args:
            stage: what is going on ("load", "convert").
            done: units finished, rising within a stage.
            total: units in all.
        """


@dataclass(frozen=True, slots=True)
class LoadReport:
    """
    What loading the quantized layers took.

    Attributes:
        file_bytes: bytes read.
        read_seconds: reading them.
        install_seconds: digesting, decoding and preparing, summed over threads and mostly while others are read.
        prepared_bytes: bytes the layers hold now.
        kernels: number of layers by kernel, in order of first use.
    """

    file_bytes: int
    read_seconds: float
    install_seconds: float
    prepared_bytes: int
    kernels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LoadedLayers:
    """
    The quantized layers of one checkpoint.

    Attributes:
        modules: linear layers by module path, ready to run.
        experts: layers of experts by module path, ready to run.
        report: what loading them took.
        kv_scales: the stored scales of a cache of keys and values by tensor name, for the framework that owns it.
    """

    modules: Mapping[str, QuantizedLinear]
    experts: Mapping[str, QuantizedExperts]
    report: LoadReport
    kv_scales: Mapping[str, torch.Tensor]


def load_layers(
    plan: Plan,
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    devices: Mapping[str, torch.device | str] | None = None,
    modules: Mapping[str, PreparedModule] | None = None,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> LoadedLayers:
    """
    Load every quantized layer of a plan; either all of them, or an error and nothing.

    Layers are decoded and prepared in other threads while the next ones are read. Peak memory is what the layers hold
    when done, plus the stored and canonical forms of one layer, or of several that are small together; of experts,
    those of one expert or of several small ones.

    Args:
        plan: made from the same checkpoint.
        source: checkpoint directory or repository id.
        device: where the layers will run.
        devices: where single layers will run instead, by module path.
        modules: layers to fill, by module path, made from the same plan and already in their place in a model; None
            makes new ones.
        progress: told the file bytes done.
        registry: the plugins the plan was made with; None takes the installed ones.

    Raises:
        CheckpointError: `QP-ST-…` when the files are not what the plan was made from, or values are not allowed.
        LoadError: `QP-LOAD-…` when a tensor is claimed twice or a kernel fails to prepare.
        PlanError: `QP-PLAN-PLATFORM` when a kernel of the plan refuses the machine at hand.
    """
    registry = installed() if registry is None else registry
    directory = resolve_source(source)
    checkpoint = open_checkpoint(directory)
    refuse_unusable_kernels(plan, registry)
    quantized = [layer for layer in plan.layers if layer.quantized]
    total = sum(layer.file_bytes for layer in quantized)
    places = {layer.path: torch.device((devices or {}).get(layer.path, device)) for layer in quantized}
    on_cpu = all(place.type == "cpu" for place in places.values())
    ledger, schemes = Ledger(), SchemeCache(registry)
    filled: dict[str, QuantizedLinear] = {}
    experts: dict[str, QuantizedExperts] = {}
    kernels: dict[str, int] = {}
    done = 0
    read_seconds = install_seconds = 0.0

    def finish(results: Iterator[_Installed]) -> None:
        nonlocal install_seconds
        for installed_layer in results:
            layer = installed_layer.layer
            filled[layer.path] = installed_layer.module
            install_seconds += installed_layer.seconds
            count(layer)
            advance(layer.file_bytes)

    def count(layer: LayerPlan) -> None:
        kernel = plan.decisions[layer.decision or 0].kernel
        kernels[kernel] = kernels.get(kernel, 0) + 1

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(progress, "load", done, total)

    with TensorReader(checkpoint) as reader, _workers(on_cpu=on_cpu) as workers:
        for layer in quantized:
            module = modules[layer.path] if modules is not None else new_module(layer, plan, registry, schemes)
            if isinstance(module, QuantizedExperts):
                finish(workers.rest())
                started = time.perf_counter()
                load_experts(layer, module, checkpoint, reader, ledger, places[layer.path], advance)
                install_seconds += time.perf_counter() - started
                experts[layer.path] = module
                count(layer)
                continue
            if not isinstance(module, QuantizedLinear):
                raise TypeError(f"{layer.path}: {type(module).__name__} holds no layer of a plan")
            needed = layer.file_bytes + sum(s.shape.out_features * s.shape.in_features for s in layer.segments)
            finish(workers.make_room(needed))
            started = time.perf_counter()
            read = _read(layer, reader, ledger)
            read_seconds += time.perf_counter() - started
            workers.give(needed, partial(_install, layer, module, read, checkpoint, places[layer.path]))
            del read
        finish(workers.rest())
        kv_scales = {name: _handed(name, reader, ledger) for name in (plan.kv_cache.scales if plan.kv_cache else ())}
    prepared = sum(b.nbytes for module in (*filled.values(), *experts.values()) for b in module.buffers())
    return LoadedLayers(filled, experts, LoadReport(total, read_seconds, install_seconds, prepared, kernels), kv_scales)


def new_module(layer: LayerPlan, plan: Plan, registry: Registry, schemes: SchemeCache) -> PreparedModule:
    """Return the module that runs a quantized layer of a plan, without weights."""
    kind = QuantizedLinear if layer.experts is None else QuantizedExperts
    return kind(layer, plan, registry, schemes)


def _workers(*, on_cpu: bool) -> Workers[_Installed]:
    """Return the threads of a load; layers for an accelerator are prepared one by one, in the order they are read."""
    return Workers(worker_count()) if on_cpu else Workers(1, help_out=False)


def refuse_unusable_kernels(plan: Plan, registry: Registry) -> None:
    """
    Check, before anything is allocated, that the kernels of a plan work on the machine at hand.

    Raises:
        PlanError: `QP-PLAN-PLATFORM` naming the kernel and why it refuses.
    """
    here = detect(registry, plan.platform.kind)
    names = dict.fromkeys(choice.kernel for decision in plan.decisions for choice in decision.choices)
    for name in names:
        kernel: Kernel = registry.moe_kernels[name].item if name in registry.moe_kernels else registry.kernel(name).item
        refusal = probe(kernel, here)
        if refusal is not None:
            raise PlanError(
                "QP-PLAN-PLATFORM",
                f"kernel {name} on {here}",
                refusal.reason,
                expected="a machine like the one the plan was made for",
                fix=refusal.fix or "Make the plan again on this machine.",
            )


def tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Call a progress callback; one that raises is told nothing more of this step, and the work goes on."""
    if progress is None:
        return
    try:
        progress(stage, done, total)
    except Exception as error:  # noqa: BLE001  # a display must never cost a load
        import warnings

        warnings.warn(f"progress callback failed: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)


@dataclass(frozen=True, slots=True)
class _Read:
    """The stored tensors of one layer: by suffix for each segment, biases, and all of them by name."""

    segments: list[dict[str, torch.Tensor]]
    biases: list[torch.Tensor]
    named: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Installed:
    layer: LayerPlan
    module: QuantizedLinear
    seconds: float


def _handed(name: str, reader: TensorReader, ledger: Ledger) -> torch.Tensor:
    """Read a scale that is handed over; one that is not a finite positive number would silently spoil a cache."""
    ledger.claim(name, "the cache of keys and values")
    scale = reader.read(name)
    values = scale.to(torch.float32)
    if name.endswith("scale") and not bool((values.isfinite() & (values > 0)).all()):
        raise CheckpointError(
            "QP-ST-SCALE", name, "holds a scale that is not a finite positive number", expected="positive scales"
        )
    return scale


def _read(layer: LayerPlan, reader: TensorReader, ledger: Ledger) -> _Read:
    named: dict[str, torch.Tensor] = {}

    def take(name: str) -> torch.Tensor:
        ledger.claim(name, layer.path)
        named[name] = reader.read(name)
        return named[name]

    segments = [{suffix: take(name) for suffix, name in segment.tensors} for segment in layer.segments]
    return _Read(segments, [take(name) for name in layer.tensors], named)


def _install(
    layer: LayerPlan, module: QuantizedLinear, read: _Read, checkpoint: Checkpoint, device: torch.device
) -> _Installed:
    started = time.perf_counter()
    sources = tuple(
        SourceTensor(str(checkpoint.directory / checkpoint.tensors[name].file), name, digest(tensor))
        for name, tensor in read.named.items()
    )
    module.install(read.segments, read.biases, device=device, sources=sources)
    return _Installed(layer, module, time.perf_counter() - started)
