"""
NVIDIA's run-time compiler, by whichever door is installed: `cuda.bindings`, which torch itself brings, or CuPy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class CompileError(Exception):
    """A source was refused; the message is the compiler's log."""


class Compiler(Protocol):
    """What compiles."""

    version: str
    """Its name and version; part of what names a compiled kernel on disk."""

    def compile(self, source: str, options: Sequence[str]) -> bytes:
        """Return the machine code for a source in CUDA C++; raises `CompileError`."""


class _Bindings:
    """The compiler through `cuda.bindings.nvrtc`."""

    def __init__(self) -> None:
        from cuda.bindings import nvrtc

        self._nvrtc = nvrtc
        error, major, minor = nvrtc.nvrtcVersion()
        self._check(error, "nvrtcVersion")
        self.version = f"nvrtc {major}.{minor}"

    def compile(self, source: str, options: Sequence[str]) -> bytes:
        nvrtc = self._nvrtc
        error, program = nvrtc.nvrtcCreateProgram(source.encode(), b"quantplug_marlin.cu", 0, [], [])
        self._check(error, "nvrtcCreateProgram")
        try:
            (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
            if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                raise CompileError(self._read(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace"))
            return self._read(program, "nvrtcGetCUBIN")
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    def _read(self, program: object, what: str) -> bytes:
        error, size = getattr(self._nvrtc, f"{what}Size")(program)
        self._check(error, what)
        data = bytes(size)
        (error,) = getattr(self._nvrtc, what)(program, data)
        self._check(error, what)
        return data

    def _check(self, error: object, what: str) -> None:
        if error != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{what}: {error}")


class _CuPy:
    """The compiler through CuPy."""

    def __init__(self) -> None:
        from cupy.cuda import nvrtc

        self._nvrtc = nvrtc
        self.version = "nvrtc {}.{}".format(*nvrtc.getVersion())

    def compile(self, source: str, options: Sequence[str]) -> bytes:
        nvrtc = self._nvrtc
        program = nvrtc.createProgram(source, "quantplug_marlin.cu", (), ())
        try:
            nvrtc.compileProgram(program, tuple(options))
            return bytes(nvrtc.getCUBIN(program))
        except nvrtc.NVRTCError as error:
            raise CompileError(f"{error}: {nvrtc.getProgramLog(program)}") from error
        finally:
            nvrtc.destroyProgram(program)


@cache
def compiler() -> Compiler:
    """
    Return the compiler of this machine.

    Raises:
        ImportError: there is none; the message says of each door why it stays shut.
    """
    refusals = []
    for name, door in (("cuda.bindings", _Bindings), ("cupy", _CuPy)):
        try:
            found: Compiler = door()
        except (ImportError, CompileError, RuntimeError, OSError) as error:  # RuntimeError: the library is not there
            refusals.append(f"{name}: {error}")
        else:
            return found
    raise ImportError("no run-time compiler for CUDA C++: " + "; ".join(refusals))
