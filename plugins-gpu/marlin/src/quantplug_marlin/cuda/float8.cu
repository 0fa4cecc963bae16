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

// A piece of y.
struct Work {
    int row, output, expert;
};

struct Place {
    int lane, group, row;  // of those that multiply: which warpgroup, and the first of a warp's rows in a piece
    u32 ring, full, empty, scales;
};

// A slot of the ring.
struct Slot {
    int index;
    u32 phase;
};

__device__ __forceinline__ void advance(Slot& slot) {
    if (++slot.index == DEPTH) slot.index = 0, slot.phase ^= 1;
}

__device__ __forceinline__ u32 stage_at(const Place& at, const Slot& slot) { return at.ring + slot.index * STAGE_BYTES; }

// Scales of the rows of a piece, and those of its outputs behind them.
__device__ __forceinline__ u32 scales_at(const Place& at, int piece) { return at.scales + piece % (DEPTH + 1) * PIECE_SCALES; }

__device__ __forceinline__ int pieces_across(const Args& args) { return (args.outputs + WIDE - 1) / WIDE; }

__device__ __forceinline__ Work work_at(const Args& args, int index, int down) {
    const int across = pieces_across(args), first = index / (across * TOGETHER) * TOGETHER;
    const int height = min(TOGETHER, down - first), within = index - first * across, block = first + within % height;
    return {block * ROWS, within / height * WIDE, args.experts[block]};
}

__device__ __forceinline__ void produce(const Args& args, const Place& at) {
    const int down = *args.used, pieces = pieces_across(args) * down;
    Slot slot = {0, 1};
    int piece = 0;
#pragma unroll 1
    for (int index = blockIdx.x; index < pieces; index += gridDim.x, ++piece) {
        const Work work = work_at(args, index, down);
        const int first = work.expert * args.filled + work.output;  // row of the weights
        const u32 output_bytes = min(WIDE, args.filled - work.output) * 4;
#pragma unroll 1
        for (int stage = 0; stage < args.stages; ++stage, advance(slot)) {
            const u32 to = stage_at(at, slot), full = at.full + slot.index * 8;
            wait_barrier(at.empty + slot.index * 8, slot.phase);
            expect_bytes(full, STAGE_BYTES + (stage == 0 ? ROW_SCALES + output_bytes : 0));
            copy_box(to, &args.x, stage * 128, work.row, full);
            copy_box(to + X_BYTES, &args.codes, stage * 128, first, full);
            if (stage == 0) {
                copy_bytes(scales_at(at, piece), args.x_scales + work.row, ROW_SCALES, full);
                copy_bytes(scales_at(at, piece) + ROW_SCALES, args.scales + first, output_bytes, full);
            }
        }
    }
}

// Rows of 128 bytes follow each other, eight to a kilobyte, and their 16-byte pieces have changed places.
__device__ __forceinline__ u64 describe(u32 from) {
    return (u64)((from & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void keep(float (&part)[SUMS]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(part[i])::"memory");
}

// What is under way of a piece: both parts, the slot of the older one and that of the newer one.
struct Turns {
    float part[2][SUMS];
    Slot slot, next;
};

// Begin the products of a part: 64 rows of x times COLUMNS outputs and 128 inputs.
__device__ __forceinline__ void begin(const Place& at, const Slot& slot, int half, float (&part)[SUMS]) {
    const u32 from = stage_at(at, slot);
    const u64 x = describe(from + at.group * 64 * 128), codes = describe(from + X_BYTES + half * COLUMNS * 128);
    keep(part);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < 4; ++step) multiply_step(part, x + step * 2, codes + step * 2, step > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void begin_stage(const Place& at, Turns& turns, int which) {
    wait_barrier(at.full + turns.next.index * 8, turns.next.phase);
    begin(at, turns.next, 0, turns.part[which]);
}

__device__ __forceinline__ void release(const Place& at, const Slot& slot) {
    if (at.lane == 0) arrive_barrier(at.empty + slot.index * 8);
}

__device__ __forceinline__ void add_part(float (&sums)[PARTS][SUMS], int which, float (&part)[SUMS]) {
    float(&to)[SUMS] = sums[PARTS == 2 ? which : 0];
    keep(part);
#pragma unroll
    for (int i = 0; i < SUMS; ++i) to[i] += part[i];
    keep(to);
}

// Begin the other part than `which`, and add this one while the tensor cores work on that.
__device__ __forceinline__ void take_turns(const Place& at, Turns& turns, int which, float (&sums)[PARTS][SUMS]) {
    const bool same_stage = PARTS == 2 && which == 0;
    if (same_stage) {
        begin(at, turns.slot, 1, turns.part[1]);
    } else {
        advance(turns.next);
        begin_stage(at, turns, which ^ 1);
    }
    wait_products<1>();
    if (!same_stage) release(at, turns.slot);
    add_part(sums, which, turns.part[which]);
    turns.slot = turns.next;
}

__device__ __forceinline__ void end_turns(const Place& at, Turns& turns, int which, float (&sums)[PARTS][SUMS]) {
    wait_products<0>();
    release(at, turns.slot);
    add_part(sums, which, turns.part[which]);
}

// Add up a piece, whose first stage is in a slot; leaves the slot behind its last.
__device__ __forceinline__ void consume(const Args& args, const Place& at, Slot& slot, float (&sums)[PARTS][SUMS]) {
    const int parts = args.stages * PARTS;
    Turns turns;
    turns.slot = turns.next = slot;
    begin_stage(at, turns, 0);
    int turn = 1;
#pragma unroll 1
    for (; turn + 1 < parts; turn += 2) {
        take_turns(at, turns, 0, sums);
        take_turns(at, turns, 1, sums);
    }
    // Two halves are an even number, but ptxas, told so, has every product wait for the one before.
    if (turn < parts) {
        take_turns(at, turns, 0, sums);
        end_turns(at, turns, 1, sums);
    } else {
        end_turns(at, turns, 0, sums);
    }
    slot = turns.slot;
    advance(slot);
}

__device__ __forceinline__ u32 pack(float first, float second) {
    u32 pair;
    asm("cvt.rn." PAIR ".f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ float bias_of(const Args& args, const Work& work, int column) {
    if (args.bias == nullptr) return 0.0f;
    const int each = args.filled / args.projections, output = work.output + column, projection = output / each, within = output % each;
    if (projection >= args.projections || within >= args.size) return 0.0f;
    return to_float(args.bias[((size_t)work.expert * args.projections + projection) * args.size + within], HALF);
}

// Store eight numbers of the row of y that is for a choice, as far as they are inside.
__device__ __forceinline__ void store_eight(const Args& args, int row, int choice, int output, const uint4& eight) {
    if (choice < 0 || output >= args.outputs) return;
    u16* const to = args.y + (size_t)(PRODUCT == 1 ? row : choice) * args.stride + output;
    if (args.stride % 8 == 0 && output + 8 <= args.outputs) {
        *(uint4*)to = eight;
        return;
    }
    const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (output + i < args.outputs) to[i] = (u16)(words[i / 2] >> (i % 2 * 16));
}

// Store a warp's 16 rows, 64 outputs at a time turned round in shared memory, so that whole lines are written. `scales`: where
// those of the piece lie; `buffer`: the warp's own 2 kB.
__device__ __forceinline__ void finish(const Args& args, const Place& at, const Work& work, const float (&sums)[PARTS][SUMS], u32 scales, u32 buffer) {
    const int first_row = work.row + at.row, g = at.lane >> 2, q = at.lane & 3;
    float row_scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        row_scale[half] = load_shared<float>(scales + (at.row + g + half * 8) * 4);
        if (args.weights != nullptr) {
            const int choice = args.order[first_row + g + half * 8];
            row_scale[half] *= choice < 0 ? 0.0f : args.weights[choice];
        }
    }
    int choices[4];
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) choices[turn] = args.order[first_row + turn * 4 + (at.lane >> 3)];
#pragma unroll
    for (int first = 0; first < WIDE; first += 64) {
        const int pieces = min(4, (WIDE - first) / 16);
        __syncwarp();
#pragma unroll
        for (int piece = 0; piece < pieces; ++piece) {
            u32 pairs[4];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int begins = first + piece * 16 + side * 8, column = begins + q * 2;
                const float* const four = &sums[begins / COLUMNS][begins % COLUMNS / 2];
                const float2 scale = load_shared<float2>(scales + ROW_SCALES + column * 4);
                const float bias[2] = {bias_of(args, work, column), bias_of(args, work, column + 1)};
                pairs[side * 2] = pack(fmaf(four[0], scale.x * row_scale[0], bias[0]), fmaf(four[1], scale.y * row_scale[0], bias[1]));
                pairs[side * 2 + 1] = pack(fmaf(four[2], scale.x * row_scale[1], bias[0]), fmaf(four[3], scale.y * row_scale[1], bias[1]));
            }
            // Rows of 128 bytes, whose pieces of 16 change places so that eight rows lie in different banks.
            const int row = at.lane & 15, column = piece * 2 + (at.lane >> 4);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(buffer + row * 128 + ((column ^ (row & 7)) << 4)),
                         "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                         : "memory");
        }
        __syncwarp();
#pragma unroll
        for (int turn = 0; turn < 4; ++turn) {
            const int row = turn * 4 + (at.lane >> 3), column = at.lane & 7;
            const uint4 eight = load_shared<uint4>(buffer + row * 128 + ((column ^ (row & 7)) << 4));
            if (column < pieces * 2) store_eight(args, first_row + row, choices[turn], work.output + first + column * 8, eight);
        }
    }
}

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
