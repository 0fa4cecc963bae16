"""
Faults for the sanitizer to find, one for each of its tools, and none: `python -m tests.device.planted KERNEL`.

A tool that does not report the one that is planted for it shows nothing about other kernels. One that reports
`clusters`, where each block waits for all its threads between what they write and what they read of its own memory,
shows nothing about kernels in clusters: it takes the blocks of one for one block.
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

extern "C" __global__ void __cluster_dims__(2, 1, 1) clusters(Args a) {
  __shared__ float held[64];
  for (int turn = 0; turn < 64 * (1 + blockIdx.x); ++turn) {
    held[threadIdx.x] = a.from[threadIdx.x] + turn;
    __syncthreads();
    a.to[threadIdx.x] = held[63 - threadIdx.x];
    __syncthreads();
  }
}

extern "C" __global__ void synccheck(Args a) {
  if (threadIdx.x < 16) __syncthreads();
  a.to[threadIdx.x] = a.from[threadIdx.x];
}
"""
"""An input behind the last one, no barrier between two warps, inputs that nobody wrote, a barrier for some only."""

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CLUSTERS = "clusters"
_THREADS = {"memcheck": 250, "racecheck": 64, "synccheck": 32, "initcheck": 64, CLUSTERS: 64}
"""250 numbers end where no allocator would end by itself: what is read behind them is seen only if sizes are exact."""


def main(name: str) -> int:
    """Launch the kernel of that name: the fault that a tool must find, or `CLUSTERS`."""
    threads = _THREADS[name]
    given = torch.empty(threads, device="cuda") if name == "initcheck" else torch.ones(threads, device="cuda")
    made = torch.zeros(threads, device="cuda")
    code = compiler().compile(SOURCE, options_for(target_of(0).architecture))
    function = load(code, name, 0, 0)
    launch = Launch(function, (2 if name == CLUSTERS else 1, 1, 1), threads, 0, stream_of(0), overlap=False)
    launch(given.data_ptr().to_bytes(8, "little") + made.data_ptr().to_bytes(8, "little"))
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
