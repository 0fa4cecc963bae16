"""
The only code that looks at the machine.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from quantplug.errors import PlanError, PluginError
from quantplug.isolation import Fault, isolated
from quantplug.platform import Platform
from quantplug.registry import PluginFailure

if TYPE_CHECKING:
    from quantplug.registry import Registry

_X86_FEATURES = (
    *("f16c", "fma", "avx", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
)
_ARM_FEATURES = ("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2")
_CPU_FEATURES = frozenset(_X86_FEATURES + _ARM_FEATURES)
_ARCHES = {"amd64": "x86_64", "arm64": "aarch64"}
_CUDA_SIGNS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")


class PlatformProvider(ABC):
    """Recognises one kind of machine; a plugin's `quantplug_platforms` returns instances."""

    kind: ClassVar[str]
    """The `Platform.kind` it recognises, unique among installed plugins."""

    @abstractmethod
    def detect(self) -> Platform | None:
        """
        Return the platform at hand, or None when this machine is not of that kind.

        Called once per `survey`. Imports torch or a vendor package only when something cheap (a device file) says that
        the machine may be of that kind. What it raises is kept as a failure, and other kinds are still tried.
        """


class CpuProvider(PlatformProvider):
    """The processor: architecture, vector extensions and memory, as the operating system reports them."""

    kind = "cpu"

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def detect(self) -> Platform:
        """Return the processor's platform; every machine has one."""
        import platform

        machine = platform.machine().lower()
        words = self._value("cpuinfo", "flags") or self._value("cpuinfo", "Features")
        kilobytes = self._value("meminfo", "MemTotal").split()
        return Platform(
            self.kind,
            _ARCHES.get(machine, machine),
            features=_CPU_FEATURES.intersection(words.split()),
            memory=int(kilobytes[0]) * 1024 if kilobytes else None,
            versions=_torch_version(),
            device=f"{self._value('cpuinfo', 'model name') or machine}, {_workers()}",
        )

    def _value(self, file: str, key: str) -> str:
        """Return the first value of `key`, "" where the operating system has no such file or line."""
        try:
            lines = (self._proc / file).read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return ""
        pairs = (line.partition(":") for line in lines)
        return next((value.strip() for name, _, value in pairs if name.strip() == key), "")


class CudaProvider(PlatformProvider):
    """The first GPU that torch's CUDA backend sees; torch is imported only where a driver is installed."""

    kind = "cuda"

    def __init__(self, signs: tuple[str, ...] = _CUDA_SIGNS) -> None:
        self._signs = signs

    def detect(self) -> Platform | None:
        """Return the GPU's platform, None without a driver, a GPU, or a torch that was built for one."""
        if not any(Path(sign).exists() for sign in self._signs):
            return None
        import torch

        if not torch.cuda.is_available():
            return None
        device = torch.cuda.get_device_properties(0)
        return Platform(
            self.kind,
            f"{device.major}.{device.minor}",
            memory=device.total_memory,
            versions=(("cuda", str(torch.version.cuda)), *_torch_version()),
            device=device.name,
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """
    What the providers found.

    Attributes:
        platforms: the platforms at hand, accelerators first, each group by kind.
        failures: providers that raised or answered wrongly.

    """

    platforms: tuple[Platform, ...]
    failures: tuple[PluginFailure, ...]


def survey(registry: Registry, kind: str | None = None) -> Survey:
    """Ask the providers of all kinds, or of one, whether this machine is theirs."""
    platforms: list[Platform] = []
    failures: list[PluginFailure] = []
    for name, provided in registry.platforms.items():
        if kind not in (None, name):
            continue
        found = isolated(provided.item.detect)
        if isinstance(found, Platform) and found.kind == name:
            platforms.append(found)
        elif found is not None:
            fault = found if isinstance(found, Fault) else Fault(_wrong(found, name))
            what = f"platform {name!r}: {fault.error}"
            failures.append(PluginFailure(provided.plugin, "", "", "call", what, fault.detail))
    platforms.sort(key=lambda platform: (platform.kind == CpuProvider.kind, platform.kind))
    return Survey(tuple(platforms), tuple(failures))


def detect(registry: Registry | None = None, kind: str | None = None) -> Platform:
    """
    Return the machine at hand: its accelerator if it has one, else its processor.

    Args:
        registry: whose providers to ask, None for the installed ones.
        kind: ask for one kind ("cpu", "cuda") only.

    Raises:
        PlanError: `QP-PLAN-PLATFORM` when this machine is not of that kind.
        PluginError: `QP-PLUG-CONFLICT` when two plugins claim to recognise that kind.

    """
    if registry is None:
        from quantplug.plugins import registry as installed

        registry = installed()
    for conflict in registry.conflicts:
        if (conflict.kind, conflict.name) == ("platform", kind):
            raise conflict.error()
    result = survey(registry, kind)
    if result.platforms:
        return result.platforms[0]
    known = kind in registry.platforms
    raise PlanError(
        "QP-PLAN-PLATFORM",
        f"platform {kind!r}",
        "this machine has none" if known else "no installed plugin recognises it",
        expected=f"one of: {', '.join(registry.platforms)}",
        fix="To plan for another machine, name its architecture, too, as in cuda:9.0"
        + "".join(f"; note that {failure}" for failure in (*result.failures, *registry.failures)),
    )


def _wrong(found: object, kind: str) -> str:
    shown = f"a platform of kind {found.kind!r}" if isinstance(found, Platform) else f"type {type(found).__qualname__}"
    return str(
        PluginError("QP-PLUG-CALL", "detect()", f"returned {shown}", expected=f"a Platform of kind {kind!r}, or None")
    )


def _workers() -> str:
    """Return how many threads torch was told to use, or else how many processors it can use, without importing it."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    if wish.isdecimal() and int(wish) > 0:
        return f"{int(wish)} thread{'s' if int(wish) > 1 else ''}"
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return f"{count} processor{'s' if count > 1 else ''}"


def _torch_version() -> tuple[tuple[str, str], ...]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return (("torch", version("torch")),)
    except PackageNotFoundError:
        return ()
