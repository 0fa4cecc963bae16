"""
Looking at the machine: what is read, what is left alone, and what a broken provider may not do.
"""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from quantplug.detect import CpuProvider, CudaProvider, PlatformProvider, detect, survey
from quantplug.errors import PlanError, PluginError
from quantplug.hooks import hookimpl
from quantplug.platform import Platform
from quantplug.plugins import build_registry

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
flags\t\t: fpu sse4_2 avx avx2 fma f16c avx512f avx512_bf16 avx512_vnni amx_tile amx_int8 amx_bf16

processor\t: 1
flags\t\t: fpu never_read
"""

ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm bf16 crc32\n"

MEMORY = "MemTotal:       32768000 kB\nMemFree:         1024 kB\n"


@pytest.fixture
def proc(tmp_path):
    def write(cpuinfo: str, meminfo: str):
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        (tmp_path / "meminfo").write_text(meminfo)
        return CpuProvider(tmp_path)

    return write


def providing(kind: str, answer: object) -> PlatformProvider:
    """Return a provider of that kind whose `detect` returns, or raises, the answer."""

    def answering(self: object) -> object:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return type("Provider", (PlatformProvider,), {"kind": kind, "detect": answering})()


def having(*providers: PlatformProvider):
    """Return a registry with these providers beside the core's."""
    names = [f"plug-{provider.kind}" for provider in providers]
    return build_registry(
        {
            name: SimpleNamespace(quantplug_platforms=hookimpl(lambda item=item: [item]))
            for name, item in zip(names, providers, strict=True)
        }
    )


@pytest.fixture
def no_gpu(monkeypatch):
    """Make this machine one without an NVIDIA driver."""
    monkeypatch.setattr(CudaProvider, "detect", lambda self: None)


def test_an_x86_processor_is_read_from_what_linux_reports(proc, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    found = proc(X86, MEMORY).detect()
    assert str(found) == "cpu:x86_64"
    assert found.features == {
        "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16",
    }  # fmt: skip
    assert found.memory == 32768000 * 1024


def test_an_arm_processor_is_read_from_its_own_words(proc, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    found = proc(ARM, MEMORY).detect()
    assert str(found) == "cpu:aarch64"
    assert found.features == {"asimd", "asimddp", "sve", "i8mm", "bf16"}


def test_a_system_without_proc_still_has_a_processor(tmp_path):
    """On macOS and Windows there are no such files; features and memory are then simply not known."""
    found = CpuProvider(tmp_path / "nowhere").detect()
    assert found.kind == "cpu"
    assert found.features == frozenset()
    assert found.memory is None


@pytest.mark.parametrize(("cpuinfo", "meminfo"), [("", ""), ("flags\n:::\n", "MemTotal:\n")])
def test_odd_files_are_no_reason_to_fail(proc, cpuinfo, meminfo):
    found = proc(cpuinfo, meminfo).detect()
    assert (found.features, found.memory) == (frozenset(), None)


def test_this_very_machine_is_recognised():
    found = detect(build_registry({}), "cpu")
    assert Platform.parse(str(found)) == Platform("cpu", found.arch)
    assert dict(found.versions)["torch"]


def test_a_processor_is_known_by_its_model_and_the_threads_that_torch_takes(proc, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    named = proc(f"model name\t: Some CPU @ 2 GHz\n{X86}", MEMORY).detect()
    assert named.device == "Some CPU @ 2 GHz, 3 threads"
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    assert re.fullmatch(r"\S+, [1-9]\d* processors?", proc("", MEMORY).detect().device)


def test_without_torch_there_is_no_version_of_it(proc, monkeypatch):
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert proc(X86, MEMORY).detect().versions == ()


def test_without_a_driver_torch_is_not_touched(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert CudaProvider(signs=("/no/such/device",)).detect() is None


def gpu(available: bool) -> SimpleNamespace:
    device = SimpleNamespace(major=9, minor=0, total_memory=85_000_000_000, name="NVIDIA H100")
    cuda = SimpleNamespace(is_available=lambda: available, get_device_properties=lambda index: device)
    return SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8"))


def test_a_gpu_is_what_torch_says_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", gpu(available=True))
    found = CudaProvider(signs=("/no/such/device", str(tmp_path))).detect()
    assert str(found) == "cuda:9.0"
    assert (found.memory, found.features, found.device) == (85_000_000_000, frozenset(), "NVIDIA H100")
    assert found.versions == tuple(sorted(found.versions))
    assert dict(found.versions)["cuda"] == "12.8"


def test_a_driver_without_a_gpu_or_with_a_cpu_build_of_torch_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", gpu(available=False))
    assert CudaProvider(signs=(str(tmp_path),)).detect() is None


def test_an_accelerator_comes_before_the_processor(no_gpu):
    found = having(providing("npu", Platform("npu", "910b")), providing("xpu", None))
    assert detect(found) == Platform("npu", "910b")
    assert detect(found, "cpu").kind == "cpu"
    assert [platform.kind for platform in survey(found).platforms] == ["npu", "cpu"]


def test_without_an_accelerator_it_is_the_processor(no_gpu):
    assert detect(having(providing("npu", None))).kind == "cpu"


BROKEN = {
    "raises": (RuntimeError("driver\ntoo old"), "platform 'npu': RuntimeError: driver too old"),
    "exits": (SystemExit(1), "platform 'npu': SystemExit: 1"),
    "answers with text": (
        "npu:910b",
        "platform 'npu': detect(): returned type str; expected a Platform of kind 'npu', or",
    ),
    "answers for another kind": (
        Platform("xpu"),
        "platform 'npu': detect(): returned a platform of kind 'xpu'; expected",
    ),
}


@pytest.mark.parametrize(("answer", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_provider_that_misbehaves_is_kept_as_a_failure_and_the_rest_is_asked(no_gpu, answer, reason):
    found = having(providing("npu", answer))
    result = survey(found)
    assert [platform.kind for platform in result.platforms] == ["cpu"]
    [failure] = result.failures
    assert (failure.distribution, failure.stage) == ("plug-npu", "call")
    assert failure.error.startswith(reason)
    assert detect(found).kind == "cpu"
    with pytest.raises(
        PlanError, match=r"platform 'npu': this machine has none; .*note that plug-npu failed at call: "
    ) as e:
        detect(found, "npu")
    assert e.value.code == "QP-PLAN-PLATFORM"


def test_a_kind_that_is_not_here_is_an_error_that_says_how_to_plan_for_it(no_gpu):
    with pytest.raises(PlanError) as caught:
        detect(build_registry({}), "cuda")
    assert str(caught.value) == (
        "platform 'cuda': this machine has none; expected one of: cpu, cuda. "
        "To plan for another machine, name its architecture, too, as in cuda:9.0 [QP-PLAN-PLATFORM]"
    )


def test_a_kind_that_nobody_knows_is_an_error_that_names_the_broken_plugins():
    found = build_registry({"plug-npu": SimpleNamespace(quantplug_platforms=hookimpl(lambda: None))})
    with pytest.raises(PlanError, match=r"no installed plugin recognises it; .*note that plug-npu .* returned None"):
        detect(found, "npu")


def test_two_plugins_for_one_kind_are_a_conflict():
    one, two = providing("npu", None), providing("npu", None)
    found = build_registry(
        {
            "plug-a": SimpleNamespace(quantplug_platforms=hookimpl(lambda: [one])),
            "plug-b": SimpleNamespace(quantplug_platforms=hookimpl(lambda: [two])),
        }
    )
    with pytest.raises(PluginError, match="platform 'npu': claimed by plug-a and plug-b") as caught:
        detect(found, "npu")
    assert caught.value.code == "QP-PLUG-CONFLICT"
    assert survey(found).failures == ()


def test_the_installed_plugins_are_asked_by_default():
    assert detect(kind="cpu").kind == "cpu"
