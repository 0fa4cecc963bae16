"""
Faults for the sanitizer to find, one for each of its tools, and none: `python -m tests.device.planted KERNEL`.

A tool that does not report the one that is planted for it shows nothing about other kernels. And racecheck shows
nothing about kernels that are like one of the `FAULTLESS` that it reports: in each of them, a barrier of the whole
block lies between what threads write and what others read.
"""

from __future__ import annotations

import sys

import torch

from quantplug.cudacalls import stream_of
from quantplug_marlin.compiler import compiler
from quantplug_marlin.device import options_for, target_of
from quantplug_marlin.driver import Launch, load

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

// Two groups of four warps meet by themselves, nine and eight times, and then all of the block, before they swap.
extern "C" __global__ void barriers(Args a) {
  __shared__ float held[256];
  const int group = threadIdx.x / 128;
#pragma unroll 1
  for (int turn = group; turn < 9; ++turn) asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
  __syncthreads();
  held[threadIdx.x] = a.from[threadIdx.x];
  __syncthreads();
  a.to[threadIdx.x] = held[threadIdx.x ^ 128];
}

extern "C" __global__ void synccheck(Args a) {
  if (threadIdx.x < 16) __syncthreads();
  a.to[threadIdx.x] = a.from[threadIdx.x];
}
"""
"""
An input behind the last one, no barrier between two warps, inputs that nobody wrote, a barrier for some only; and none:
blocks of a cluster, and groups of warps that have met unequally often.
"""

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FAULTLESS = ("clusters", "barriers")
_THREADS = {
    "memcheck": 250, "racecheck": 64, "synccheck": 32, "initcheck": 64,
    "clusters": 64, "barriers": 256,
}  # fmt: skip
"""250 numbers end where no allocator would end by itself: what is read behind them is seen only if sizes are exact."""


def main(name: str) -> int:
    """Launch the kernel of that name: the fault that a tool must find, or one of `FAULTLESS`."""
    threads = _THREADS[name]
    given = torch.empty(threads, device="cuda") if name == "initcheck" else torch.ones(threads, device="cuda")
    made = torch.zeros(threads, device="cuda")
    code = compiler().compile(SOURCE, options_for(target_of(0).architecture))
    function = load(code, name, 0, 0)
    launch = Launch(function, (2 if name == "clusters" else 1, 1, 1), threads, 0, stream_of(0), overlap=False)
    launch(given.data_ptr().to_bytes(8, "little") + made.data_ptr().to_bytes(8, "little"))
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
