"""Compiled kernels on disk: found again, replaced when damaged, shared by processes; and no compiler at all."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest

from quantplug.kernel import Rejected
from quantplug_marlin import compiler as compilers
from quantplug_marlin.compiler import CompileError
from quantplug_marlin.cubins import cubin, directory
from quantplug_marlin.probe import probe

OPTIONS = ("--gpu-architecture=sm_80",)


class Counting:
    """A compiler that counts."""

    def __init__(self, version="one"):
        self.version = version
        self.calls = 0

    def compile(self, source, options):
        self.calls += 1
        if "error" in source:
            raise CompileError("line 1: error")
        return f"{self.version} {source} {options}".encode()


def test_a_source_is_compiled_once(tmp_path):
    compiler = Counting()
    first = cubin(compiler, "a", OPTIONS, tmp_path)
    assert cubin(Counting(), "a", OPTIONS, tmp_path) == first
    assert compiler.calls == 1
    assert [file.suffix for file in tmp_path.iterdir()] == [".cubin"]


def test_source_options_and_version_each_name_another_file(tmp_path):
    cubin(Counting(), "a", OPTIONS, tmp_path)
    for compiler, source, options in (
        (Counting(), "b", OPTIONS),
        (Counting(), "a", ("--gpu-architecture=sm_90a",)),
        (Counting("two"), "a", OPTIONS),
    ):
        cubin(compiler, source, options, tmp_path)
        assert compiler.calls == 1
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:40] + b"?" + b[41:], lambda b: b"", lambda b: b[:32]]
)
def test_a_damaged_file_is_compiled_again_and_replaced(tmp_path, damage):
    first = cubin(Counting(), "a" * 20, OPTIONS, tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    compiler = Counting()
    assert cubin(compiler, "a" * 20, OPTIONS, tmp_path) == first
    assert compiler.calls == 1
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    compiler = Counting()
    for _ in range(2):
        assert cubin(compiler, "a", OPTIONS, tmp_path / "file" / "below")
    assert compiler.calls == 2


def test_many_writers_leave_one_whole_file(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: cubin(Counting(), "a", OPTIONS, tmp_path), range(40)))
    assert len(found) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_what_the_compiler_refuses_is_not_kept(tmp_path):
    with pytest.raises(CompileError, match="line 1"):
        cubin(Counting(), "error", OPTIONS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_directory_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTPLUG_CACHE", str(tmp_path))
    assert directory() == tmp_path / "marlin"
    monkeypatch.delenv("QUANTPLUG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert directory() == tmp_path / "xdg" / "quantplug" / "marlin"


def test_without_a_compiler_the_probe_refuses_by_name(monkeypatch):
    for module in ("cuda.bindings", "cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, module, None)
    compilers.compiler.cache_clear()
    probe.cache_clear()
    try:
        refusal = probe()
        assert isinstance(refusal, Rejected)
        assert refusal.code == "dependency"
        assert "cuda.bindings" in refusal.reason
        assert "cupy" in refusal.reason
    finally:
        compilers.compiler.cache_clear()
        probe.cache_clear()


class CuPysError(Exception):
    """What CuPy raises when a source is refused."""


def cupy_with(log: str) -> dict[str, ModuleType]:
    """Return stand-ins for CuPy's modules; sources with the word error are refused with a log."""
    nvrtc, cuda, cupy = ModuleType("cupy.cuda.nvrtc"), ModuleType("cupy.cuda"), ModuleType("cupy")
    programs = []

    def compile_program(program, options):
        assert isinstance(options, tuple)
        if "error" in programs[program]:
            raise CuPysError("NVRTC_ERROR_COMPILATION (6)")

    nvrtc.NVRTCError = CuPysError
    nvrtc.getVersion = lambda: (13, 0)
    nvrtc.createProgram = lambda source, name, headers, names: programs.append(source) or len(programs) - 1
    nvrtc.compileProgram = compile_program
    nvrtc.getCUBIN = lambda program: f"cubin of {programs[program]}".encode()
    nvrtc.getProgramLog = lambda program: log
    nvrtc.destroyProgram = lambda program: programs.__setitem__(program, None)
    cuda.nvrtc, cupy.cuda = nvrtc, cuda
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nvrtc": nvrtc}


def test_cupy_is_the_other_door(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    for name, module in cupy_with("line 7: expected a ;").items():
        monkeypatch.setitem(sys.modules, name, module)
    compilers.compiler.cache_clear()
    try:
        compiler = compilers.compiler()
        assert compiler.version == "nvrtc 13.0"
        assert compiler.compile("a", OPTIONS) == b"cubin of a"
        with pytest.raises(CompileError, match="expected a ;"):
            compiler.compile("an error", OPTIONS)
    finally:
        compilers.compiler.cache_clear()
