"""
One GPU: what it is, and the kernels that are loaded onto it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from quantplug_marlin.compiler import compiler
from quantplug_marlin.cubins import cubin
from quantplug_marlin.driver import Function, load
from quantplug_marlin.source import source_of

if TYPE_CHECKING:
    from collections.abc import Mapping


class Target(NamedTuple):
    """
    What a kernel is cut for.

    Attributes:
        version: compute capability, such as (9, 0).
        processors: multiprocessors.
        shared_bytes: shared memory that one block may have.
    """

    version: tuple[int, int]
    processors: int
    shared_bytes: int

    @property
    def warpgroups(self) -> bool:
        """Whether four warps can multiply together (wgmma): compute capability 9.0 and no other."""
        return self.version == (9, 0)

    @property
    def clusters(self) -> bool:
        """Whether blocks can share their memory, and kernels overlap."""
        return self.version >= (9, 0)

    @property
    def architecture(self) -> str:
        """What the compiler is told."""
        major, minor = self.version
        return f"sm_{major}{minor}{'a' if self.warpgroups else ''}"


@cache
def target_of(device: int) -> Target:
    """Return what a device is."""
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the last of these
    return Target((found.major, found.minor), found.multi_processor_count, found.shared_memory_per_block_optin)


def options_for(architecture: str) -> tuple[str, ...]:
    """Return the compiler's options."""
    return f"--gpu-architecture={architecture}", "-std=c++17", "-default-device"


_loaded: dict[tuple[object, ...], Function] = {}
_lock = Lock()


def function(file: str, name: str, definitions: Mapping[str, int], shared_bytes: int, device: int) -> Function:
    """
    Return a kernel on a device, compiled and loaded when it is asked for the first time.

    Args:
        file: of `cuda/`.
        name: of the kernel in it.
        definitions: what it is compiled for.
        shared_bytes: the most shared memory that a launch will ask for.
        device: its index.
    """
    key = (file, tuple(definitions.items()), device)
    found = _loaded.get(key)
    if found is None:
        code = cubin(compiler(), source_of(file, definitions), options_for(target_of(device).architecture))
        with _lock:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = load(code, name, shared_bytes, device)
    return found


def build_all(wanted: Mapping[tuple[str, tuple[tuple[str, int], ...]], tuple[str, int]], device: int) -> None:
    """
    Have kernels compiled and loaded, several at a time, and wait until the device has nothing left to do.

    Kernels read weights before those ahead of them in the stream have finished. What is prepared is therefore complete
    before any of them can be launched.

    Args:
        wanted: file and definitions of each, with the kernel's name and the most shared memory that a launch asks for.
        device: its index.
    """
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(function, file, name, dict(definitions), shared, device)
            for (file, definitions), (name, shared) in wanted.items()
        ]
        for job in jobs:
            job.result()
    torch.cuda.synchronize(device)
