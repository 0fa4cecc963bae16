// y [M, N] = x [M, K] W^T with wgmma (sm_90a), for so many rows of x that the tensor cores matter: weights decoded into
// registers, x in shared memory.
//
// A block takes one piece of y after the other, 64 GROUPS outputs x TOKENS rows. Four warps have weights and x copied, stage
// by stage of CHUNKS times 64 inputs, also those of the next piece; GROUPS warpgroups multiply, each for 64 outputs. While
// the tensor cores work on 64 inputs, the codes of the next are decoded. SHARES blocks of a cluster share the stages of one
// piece; their sums are added in one fixed order.
//
// Where groups of inputs have scales, two partial sums take turns: one is scaled and added while the other grows. FOLDED:
// a scale multiplies codes instead, which is exact where it is a power of two, or both have few digits.
//
// Set by the host, beside what codes.cuh names: GROUPS, TOKENS (a multiple of 16), CHUNKS (1 or 2; it divides their number),
// STAGES (1 or 2: how many a turn of the loop takes; it divides those of each share), DEPTH (stages of memory), SHARES, SUBS
// (scales per 64 inputs and output: 0, 1, 2 or 4), PER_GROUP (such parts per group), SCALE_BYTES, SCALE_HALF, FOLDED, FOLD and
// UNFOLD (exponents of powers of two that multiply scales and whole sums, so that scaled codes are within the operands' range).
//
// With ROWS, codes are 8-bit floats that lie row by row, in stages of 128 inputs (CHUNKS is 2), and where there are scales,
// blocks of 128 x 128 share one (SUBS is 1, PER_GROUP 2).
//
// Experts: with EXPERTS = 1 or 2 it is the first or the second product of a mixture, see multiply.cu. Gate and up of one
// output are rows g and g + 8 of one warp.

#include "codes.cuh"
#include "memory.cuh"
#include "barrier.cuh"

#ifndef EXPERTS
#define EXPERTS 0
#define GATED 0
#endif
#define PAIRED (EXPERTS == 1 && GATED)
#ifndef ROWS
#define ROWS 0
#endif

#define CONSUMERS (128 * GROUPS)
#define THREADS (CONSUMERS + 128)
#define TILES (4 * GROUPS) /* of 16 outputs per block; half of them those of gate where there is one */
#define ROW_TILES (TOKENS / 8)
#define SUMS (ROW_TILES * 4)
#define SCALED (SUBS && !FOLDED)

#define STAGE_SUBS (CHUNKS * SUBS)
// Groups that a stage may touch: one more where they do not begin with stages.
#define ALIGNED (STAGE_SUBS % PER_GROUP == 0 || PER_GROUP % (SUBS ? STAGE_SUBS : 1) == 0)
#define STAGE_GROUPS (SUBS && !ROWS ? (STAGE_SUBS - 1) / PER_GROUP + (ALIGNED ? 1 : 2) : 0)
// A scale covers a whole stage.
#define LONG (SCALED && CHUNKS == 2 && SUBS == 1 && PER_GROUP % 2 == 0)
#define RUNS (LONG ? STAGES : STAGES * STAGE_SUBS) /* of products with one scale, per turn of the loop */

#define X_BYTES (CHUNKS * TOKENS * 128)
#define CODE_BYTES (CHUNKS * UNIT_BYTES)              /* of a tile */
#define SCALE_BLOCK (STAGE_GROUPS * 16 * SCALE_BYTES) /* of a tile */
#define ZERO_BLOCK (ZEROS ? STAGE_GROUPS * 16 : 0)    /* of a tile */
// Of four tiles, which are copied together: a multiple of 128.
#define SCALE_PART ((4 * SCALE_BLOCK + 127) / 128 * 128)
#define ZERO_PART ((4 * ZERO_BLOCK + 127) / 128 * 128)
#define STAGE_BYTES ((X_BYTES + TILES * CODE_BYTES + GROUPS * (SCALE_PART + ZERO_PART) + 1023) / 1024 * 1024)

struct alignas(64) Map {
    u64 words[16];
};

struct Args {
    Map x, codes, scales, zeros;
    const u8* fixed_zeros;  // where there is one group
    const float* factor;
    const u16* bias;
    u16* y;
    int rows, outputs, tiles, chunks;  // outputs, tiles: of one expert
#if ROWS
    const float* blocks;                         // their scales
    int factor_step, scale_across, scale_along;  // see multiply.cu
#endif
#if EXPERTS
    int top_k, y_stride;  // elements from one row of y to the next
    const int* order;     // which choice each place is for, or -1
    const int* experts;   // of every TOKENS places
    const int* used;      // how many of them there are
    const float* weights; // of choices, where they multiply x, or null
    float limit, alpha, up_offset;
#endif
};

struct Place {
    int lane, warp;  // of those that multiply
    int share, begin, end;  // stages
    u32 ring, full, empty;
};

#include "produce.cuh"

#include "consume.cuh"
#include "finish.cuh"

extern "C" __global__ void
#if SHARES > 1
__cluster_dims__(SHARES, 1, 1)
#endif
__launch_bounds__(THREADS, 1) multiply(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ __align__(8) u64 barriers[2 * DEPTH];
    __shared__ __align__(16) u8 buffers[CONSUMERS / 32 * 1024];
    const int warp = threadIdx.x / 32, stages = args.chunks / CHUNKS;
    Place at;
    at.lane = threadIdx.x & 31;
    at.warp = warp - 4;
    at.share = blockIdx.x % SHARES;
    at.begin = stages * at.share / SHARES;
    at.end = stages * (at.share + 1) / SHARES;
    at.ring = shared_address(memory);
    at.full = shared_address(barriers);
    at.empty = at.full + DEPTH * 8;
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < DEPTH; ++slot) {
            set_barrier(at.full + slot * 8, 1);
            set_barrier(at.empty + slot * 8, CONSUMERS / 32);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (at.lane == 0) produce(args, at, __shfl_sync(1, warp, 0));
        __syncwarp();
#if SHARES > 1
        meet_cluster();
        meet_cluster();
#endif
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#if EXPERTS
        wait_for_earlier_kernels();
#endif
        Reader reader = {0, 0};
        const Extent extent = extent_of(args);
#pragma unroll 1
        for (int index = blockIdx.x / SHARES; index < extent.across * extent.down; index += gridDim.x / SHARES) {
            const Work work = work_at(args, extent, index);
            u32 fixed[2];
            read_fixed_zeros(args, at, work, fixed);
            float sums[SUMS];
#pragma unroll
            for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
            consume(args, at, work, fixed, reader, sums);
            finish(args, at, work, sums, memory, shared_address(buffers) + at.warp * 1024);
        }
    }
}
