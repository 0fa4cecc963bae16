"""
Faults for the sanitizer to find, one for each of its tools, and none: `python -m tests.device.planted KERNEL`.

A tool that does not report the one that is planted for it shows nothing about other kernels. And racecheck shows
nothing about kernels that are like one of the `FAULTLESS` that it reports: in each of them, a barrier of the whole
block lies between what threads write and what others read.
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

// Groups of two warps meet by themselves, one of them twice, and then all of the block, before they swap.
template <bool IN_REGISTER>
__device__ void meet(int group) {
  if (IN_REGISTER) asm volatile("bar.sync %0, 64;" ::"r"(1 + group) : "memory");
  else if (group == 0) asm volatile("bar.sync 1, 64;" ::: "memory");
  else asm volatile("bar.sync 2, 64;" ::: "memory");
}

template <bool IN_REGISTER>
__device__ void swap(const Args& a) {
  __shared__ float held[128];
  const int group = threadIdx.x / 64;
#pragma unroll 1
  for (int turn = group; turn < 2; ++turn) meet<IN_REGISTER>(group);
  __syncthreads();
  held[threadIdx.x] = a.from[threadIdx.x];
  __syncthreads();
  a.to[threadIdx.x] = held[threadIdx.x ^ 64];
}

extern "C" __global__ void barriers_by_number(Args a) { swap<false>(a); }
extern "C" __global__ void barriers_in_registers(Args a) { swap<true>(a); }

extern "C" __global__ void synccheck(Args a) {
  if (threadIdx.x < 16) __syncthreads();
  a.to[threadIdx.x] = a.from[threadIdx.x];
}
"""
"""
An input behind the last one, no barrier between two warps, inputs that nobody wrote, a barrier for some only; and none:
blocks of a cluster, and barriers of groups of warps, whose number the instruction has or a register.
"""

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FAULTLESS = ("clusters", "barriers_by_number", "barriers_in_registers")
_THREADS = {
    "memcheck": 250, "racecheck": 64, "synccheck": 32, "initcheck": 64,
    "clusters": 64, "barriers_by_number": 128, "barriers_in_registers": 128,
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
