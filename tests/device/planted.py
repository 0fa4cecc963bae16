"""
Faults for the sanitizer to find, one for each of its tools: `python -m tests.device.planted TOOL`.

A tool that does not report the one that is planted for it shows nothing about other kernels.
"""

from __future__ import annotations

import sys

import torch

from quantplug_marlin.compiler import compiler
from quantplug_marlin.device import options_for, target_of
from quantplug_marlin.driver import Launch, load
from quantplug_marlin.launch import stream_of

SOURCE = r"""
struct Args { const float* from; float* to; };

extern "C" __global__ void memcheck(Args a) { a.to[threadIdx.x] = a.from[threadIdx.x + 1]; }

extern "C" __global__ void racecheck(Args a) {
  __shared__ float held[64];
  held[threadIdx.x % 64] = a.from[threadIdx.x];
  a.to[threadIdx.x] = held[63 - threadIdx.x % 64];
}

extern "C" __global__ void initcheck(Args a) { a.to[threadIdx.x] = a.from[threadIdx.x] + 1.0f; }

extern "C" __global__ void synccheck(Args a) {
  if (threadIdx.x < 16) __syncthreads();
  a.to[threadIdx.x] = a.from[threadIdx.x];
}
"""
"""An input behind the last one, no barrier between two warps, inputs that nobody wrote, a barrier for some only."""

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_THREADS = {"memcheck": 250, "racecheck": 64, "synccheck": 32, "initcheck": 64}
"""250 numbers end where no allocator would end by itself: what is read behind them is seen only if sizes are exact."""


def main(tool: str) -> int:
    """Launch the fault that a tool must find."""
    threads = _THREADS[tool]
    given = torch.empty(threads, device="cuda") if tool == "initcheck" else torch.ones(threads, device="cuda")
    made = torch.zeros(threads, device="cuda")
    code = compiler().compile(SOURCE, options_for(target_of(0).architecture))
    function = load(code, tool, 0, 0)
    launch = Launch(function, (1, 1, 1), threads, 0, stream_of(0), overlap=False)
    launch(given.data_ptr().to_bytes(8, "little") + made.data_ptr().to_bytes(8, "little"))
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
