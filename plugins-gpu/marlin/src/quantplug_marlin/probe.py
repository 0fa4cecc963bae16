"""
Whether the kernels can be compiled and run on this machine.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from quantplug.kernel import Rejected

if TYPE_CHECKING:
    from collections.abc import Callable


@cache
def probe() -> Rejected | None:
    """Return why the kernels cannot be used on this machine, or None."""
    return _refusal(_small_product)


@cache
def probe_rows() -> Rejected | None:
    """Return why the kernel for weights that lie row by row cannot be used on this machine, or None."""
    return _refusal(_small_rows_product)


def _refusal(is_right: Callable[[], bool]) -> Rejected | None:
    """Return why there is no compiler or no GPU, or a small product cannot be made or is wrong."""
    from quantplug_marlin.compiler import CompileError, compiler

    try:
        version = compiler().version
    except ImportError as error:
        return Rejected("dependency", str(error), "pip install cuda-bindings nvidia-cuda-nvrtc, or cupy")
    import torch

    if not torch.cuda.is_available():
        return Rejected("probe", "torch sees no GPU: torch.cuda.is_available() is False", "a CUDA build of torch")
    from quantplug_marlin.driver import DriverError

    try:
        right = is_right()
    except (CompileError, DriverError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        return Rejected("probe", f"{version} cannot build it, or the GPU cannot run it: {first}", "update the driver")
    return None if right else Rejected("probe", f"a small product is wrong with {version}", "report it")


def _small_product() -> bool:
    """Whether a product of small integers, which bfloat16 holds exactly, is exact."""
    import torch

    from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
    from quantplug.weight import Weight
    from quantplug_marlin.calls import apply
    from quantplug_marlin.prepare import prepare

    spec = WeightSpec(ElementType.INT4, PerGroup(64))
    codes = ((torch.arange(16 * 128) * 7) % 15 - 7).to(torch.int8).view(16, 128)
    scales = torch.full((16, 2), 0.5, dtype=torch.float16)
    problem = LinearProblem(128, (SegmentSpec(16, spec),), "bfloat16")
    device = torch.device("cuda", torch.cuda.current_device())
    prepared = prepare(problem, [Weight(codes, scales, spec)], device, "marlin.tiles", None)
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    x[0, 3], x[0, 77], x[1, 127] = 1, -1, 2
    wanted = x.to(torch.float32) @ codes.to(torch.float32).t() / 2
    return torch.equal(apply(x.to(device), prepared, None).cpu().to(torch.float32), wanted)


def _small_rows_product() -> bool:
    """The same of 8-bit floats row by row."""
    import torch

    from quantplug.activations import read_activation
    from quantplug.rowprepare import prepare
    from quantplug.spec import ElementType, LinearProblem, PerChannel, SegmentSpec, WeightSpec
    from quantplug.weight import Weight
    from quantplug_marlin.rowcalls import apply

    spec = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
    codes = ((torch.arange(16 * 256) * 7) % 15 - 7).to(torch.float32).to(torch.float8_e4m3fn).view(16, 256)
    permitted = read_activation("float8_e4m3fn/token/dynamic", "probe")
    problem = LinearProblem(256, (SegmentSpec(16, spec),), "bfloat16", activation=permitted)
    device = torch.device("cuda", torch.cuda.current_device())
    prepared = prepare(problem, [Weight(codes, torch.full((16, 1), 0.5), spec)], [None], device, None)
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    x[0, 3], x[0, 177], x[1, 255] = 1, -1, 2
    wanted = x.to(torch.float32) @ codes.to(torch.float32).t() / 2
    return torch.equal(apply(x.to(device), prepared, None).cpu().to(torch.float32), wanted)
