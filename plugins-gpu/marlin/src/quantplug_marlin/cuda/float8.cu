// A product of a mixture of experts with wgmma (sm_90a) out of 8-bit floats on both sides: y = x W^T, codes of both row by row.
//
// Rows of x lie in the order of experts (route.cu), in blocks of 128 rows of one expert each. A block of threads takes one
// piece of y after the other, such rows times WIDE outputs. One thread has codes of both copied, stage by stage of 128 inputs,
// also those of the next piece; two warpgroups multiply, each for 64 rows. The tensor cores add up in a short accumulator, so
// that what it holds of each stage is added to sums in float32. Two such parts take turns: while one is added, the tensor cores
// work on the other. They are the two halves of the outputs of one stage (PARTS 2), or all outputs of two stages.
//
// Set by the host: WIDE (a multiple of 16; at most 208 with two parts, else 128), PARTS, DEPTH (stages of memory), PRODUCT (1:
// what it writes has a row for each row of x; 2: for each choice), HALF (y is float16, else bfloat16), and the function
// multiply_step.

#include "words.cuh"
#include "memory.cuh"
#include "barrier.cuh"

#define ROWS 128   /* of a piece */
#define TOGETHER 8 /* pieces of the same outputs that follow each other, so that they find x and weights in L2 */
#define COLUMNS (WIDE / PARTS)
#define SUMS (COLUMNS / 2) /* of a lane and part */
#define X_BYTES (ROWS * 128)
#define STAGE_BYTES (X_BYTES + WIDE * 128)
#define ROW_SCALES (ROWS * 4)                /* bytes */
#define PIECE_SCALES (ROW_SCALES + WIDE * 4) /* bytes; DEPTH + 1 pieces may be under way, one more than stages */

struct alignas(64) Map {
    u64 words[16];
};

struct Args {
    Map x, codes;
    const float* x_scales;
    const float* scales;   // [experts, filled]
    const u16* bias;       // [experts, projections * size], or null
    const float* weights;  // of choices, which multiply rows of x, or null
    u16* y;
    const int* order;    // which choice each row of x is for, or -1
    const int* experts;  // of each block of rows
    const int* used;     // blocks that have rows
    int outputs, filled, stages, stride;  // filled: with those that fill an expert's up; stride: of y, in elements
    int projections, size;                // of an expert in one product, and the outputs of each, which are not filled up
};

#include "pieces.cuh"
#include "turns.cuh"
#include "scaled.cuh"

extern "C" __global__ void __launch_bounds__(384, 1) multiply(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ __align__(8) u64 barriers[2 * DEPTH];
    __shared__ __align__(16) u8 buffers[8 * 2048];
    const int warp = threadIdx.x / 32;
    Place at;
    at.lane = threadIdx.x & 31;
    at.group = warp / 4 - 1;
    at.row = warp * 16 - 64;
    at.ring = shared_address(memory);
    at.full = shared_address(barriers);
    at.empty = at.full + DEPTH * 8;
    at.scales = at.ring + DEPTH * STAGE_BYTES;
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < DEPTH; ++slot) {
            set_barrier(at.full + slot * 8, 1);
            set_barrier(at.empty + slot * 8, 8);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    wait_for_earlier_kernels();
    let_later_kernels_start();
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) produce(args, at);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Slot slot = {0, 0};
        const int down = *args.used, pieces = pieces_across(args) * down;
        int piece = 0;
#pragma unroll 1
        for (int index = blockIdx.x; index < pieces; index += gridDim.x, ++piece) {
            const Work work = work_at(args, index, down);
            float sums[PARTS][SUMS];
#pragma unroll
            for (int i = 0; i < PARTS * SUMS; ++i) sums[i / SUMS][i % SUMS] = 0.0f;
            consume(args, at, slot, sums);
            finish(args, at, work, sums, scales_at(at, piece), shared_address(buffers) + (warp - 4) * 2048);
        }
    }
}
