"""
The four calls of NVIDIA's driver that loading and launching a kernel takes.

Its library is there wherever torch sees a GPU. A launch through it costs less than through any package on top of it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

_INVALID_CONTEXT = 201
_MOST_SHARED_MEMORY = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_OVERLAP = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class DriverError(RuntimeError):
    """A call of the driver failed."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("kind", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


_ALLOW_OVERLAP = (_Attribute * 1)(_Attribute(kind=_OVERLAP, value=1))


class Function(NamedTuple):
    """A kernel of a loaded module; the module stays loaded until the process ends."""

    handle: int
    device: int


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.cuFuncSetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.cuModuleGetFunction.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p]
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    return library


def load(code: bytes, name: str, shared_bytes: int, device: int) -> Function:
    """
    Load machine code onto a device and return its kernel of that name.

    Args:
        code: what the compiler made.
        name: of the kernel.
        shared_bytes: the most shared memory that a launch will ask for.
        device: its index, whose context torch has made.
    """
    library, module, function = _library(), ctypes.c_void_p(), ctypes.c_void_p()
    _use_context(device)
    _check(library.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    _check(library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    _check(library.cuFuncSetAttribute(function, _MOST_SHARED_MEMORY, shared_bytes), "cuFuncSetAttribute")
    return Function(function.value or 0, device)


class Launch:
    """
    One way of launching a kernel: its grid and block, on one stream. Immutable, so that threads share it.

    Args:
        function: the kernel.
        grid: blocks in x, y and z.
        threads: per block.
        shared_bytes: of shared memory per block.
        stream: as the driver knows it.
        overlap: whether the kernel may start before the one ahead of it in the stream has finished; it then waits for
            that one itself.
    """

    __slots__ = ("_config", "_function", "_launch")

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        *,
        overlap: bool,
    ) -> None:
        self._function = function
        self._launch = _library().cuLaunchKernelEx
        self._config = _Config(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1), shared_bytes, stream, None, 0
        )
        if overlap:
            self._config.attributes = ctypes.cast(_ALLOW_OVERLAP, ctypes.POINTER(_Attribute))
            self._config.attribute_count = 1

    def __call__(self, arguments: bytes) -> None:
        """Launch with the one argument that every kernel here takes: a structure, packed."""
        parameters = (ctypes.c_char_p * 1)(arguments)
        error = self._launch(self._config, self._function.handle, parameters, None)
        if error == _INVALID_CONTEXT:
            # A thread that has not used the device yet; torch makes its context current only when it calls the runtime.
            _use_context(self._function.device)
            error = self._launch(self._config, self._function.handle, parameters, None)
        _check(error, "cuLaunchKernelEx")


def _use_context(device: int) -> None:
    library, context = _library(), ctypes.c_void_p()
    _check(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    _check(library.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def _check(error: int, what: str) -> None:
    if error:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(error, ctypes.byref(text))
        raise DriverError(f"{what}: {(text.value or b'unknown error').decode()} ({error})")
