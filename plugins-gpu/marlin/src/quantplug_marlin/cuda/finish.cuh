// What becomes of the sums of warpgroup.cu.

#if EXPERTS
#include "functions.cuh"
#define WIDTH (args.y_stride) /* of a row of y; what fills those of the first product up is zero */
#else
#define WIDTH (args.outputs)
#endif

#if ROWS
#define FACTOR_STEP (args.factor_step)
#else
#define FACTOR_STEP 1
#endif

// Zero points of weights that have one group only; they hold for all chunks.
__device__ __forceinline__ void read_fixed_zeros(const Args& args, const Place& at, const Work& work, u32 (&fixed)[2]) {
    fixed[0] = fixed[1] = LIFT | SIGN | MIDDLE * 0x00010001u;
#if ZEROS && !SUBS
    const int half = args.tiles / 2, g = at.lane >> 2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int tile = PAIRED ? min(work.tile + (at.warp & 3), half - 1) + row * half : min(work.tile + at.warp, args.tiles - 1);
        const size_t of = (size_t)work.expert * args.tiles + tile;
        fixed[row] = negated_zero(args.fixed_zeros[of * 16 + g * 2 + (PAIRED ? at.warp >> 2 : row)]);
    }
#endif
}

// The first output of a warp.
__device__ __forceinline__ int first_output(const Place& at, const Work& work) {
    return PAIRED ? (work.tile + (at.warp & 3)) * 16 + (at.warp >> 2) * 8 : (work.tile + at.warp) * 16;
}

// What the sums of rows g and g + 8 of a lane are multiplied with, and what is added.
struct Finish {
    float factor[2], bias[2];
    bool inside[2];
};

__device__ __forceinline__ Finish finish_of(const Args& args, const Place& at, const Work& work) {
    Finish how;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int output = first_output(at, work) + (at.lane >> 2) + (PAIRED ? 0 : row * 8);
        const size_t place = ((size_t)work.expert * (PAIRED ? 2 : 1) + (PAIRED ? row : 0)) * args.outputs + output;
        how.inside[row] = output < args.outputs;
        how.factor[row] = how.inside[row] && args.factor != nullptr ? args.factor[place * FACTOR_STEP] : 1.0f;
        how.bias[row] = how.inside[row] && args.bias != nullptr ? to_float(args.bias[place], HALF) : 0.0f;
#if FOLDED
        how.factor[row] *= power_of_two(UNFOLD);
#endif
    }
    return how;
}

// A number of y, or of gate or up, out of its sum; `weight` is the router's, where it multiplies x.
__device__ __forceinline__ float complete(const Args& args, const Finish& how, int row, float sum, float weight) {
    const float value = (EXPERTS == 1 ? sum * how.factor[row] * weight : sum * how.factor[row]) + how.bias[row];
#if EXPERTS == 1 && !GATED
    return how.inside[row] ? named(value, args.alpha) : 0.0f;
#else
    return value;
#endif
}

__device__ __forceinline__ u32 pack(float first, float second) {
    u32 pair;
    asm("cvt.rn." PAIR ".f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// Eight rows of y and the outputs of rows g (0) or g + 8 (1) of this lane, or of both where those are gate and up.
__device__ __forceinline__ u32 complete_pair(const Args& args, const Finish& how, int row, const float4& sum, const float (&weight)[2]) {
#if PAIRED
    float first = 0.0f, second = 0.0f;
    if (how.inside[0]) {
        first = between(args, complete(args, how, 0, sum.x, weight[0]), complete(args, how, 1, sum.z, weight[0]));
        second = between(args, complete(args, how, 0, sum.y, weight[1]), complete(args, how, 1, sum.w, weight[1]));
    }
    return pack(first, second);
#else
    return pack(complete(args, how, row, row ? sum.z : sum.x, weight[0]), complete(args, how, row, row ? sum.w : sum.y, weight[1]));
#endif
}

// The row of y for a row of the product, -1 for none.
__device__ __forceinline__ int target_of(const Args& args, int row) {
#if EXPERTS == 1
    return row;
#elif EXPERTS == 2
    return args.order[row];
#else
    return row < args.rows ? row : -1;
#endif
}

__device__ __forceinline__ void store_eight(const Args& args, int row, int output, const uint4& eight) {
    const int target = target_of(args, row);
    if (target < 0 || output >= WIDTH) return;
    u16* const to = args.y + (size_t)target * WIDTH + output;
    if (WIDTH % 8 == 0) {
        *(uint4*)to = eight;
        return;
    }
    const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (output + i < WIDTH) to[i] = (u16)(words[i / 2] >> (i % 2 * 16));
}

// 16 rows of the outputs of a warp, turned round in shared memory so that whole sectors are written.
__device__ __forceinline__ void store_rows(const Args& args, const Place& at, const Work& work, const Finish& how, u32 buffer,
                                           int row, const float4& upper, const float4& lower) {
    float weight[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
#if EXPERTS == 1
    if (args.weights != nullptr)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int choice = args.order[row + i / 2 * 8 + (at.lane & 3) * 2 + i % 2];
            weight[i / 2][i % 2] = choice < 0 ? 0.0f : args.weights[choice];
        }
#endif
    const u32 p0 = complete_pair(args, how, 0, upper, weight[0]), p1 = complete_pair(args, how, 0, lower, weight[1]);
#if PAIRED
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(buffer + (at.lane & 15) * 16), "r"(p0), "r"(p1)
                 : "memory");
    __syncwarp();
    const uint4 eight = load_shared<uint4>(buffer + (at.lane & 15) * 16);
    if (at.lane < 16) store_eight(args, row + at.lane, first_output(at, work), eight);
#else
    const u32 p2 = complete_pair(args, how, 1, upper, weight[0]), p3 = complete_pair(args, how, 1, lower, weight[1]);
    // 32 bytes per row of y, whose halves change places so that eight rows lie in different banks.
    const int given = (at.lane >> 4) * 8 + (at.lane & 7), side = (at.lane >> 3 & 1) ^ (given >> 2 & 1);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(buffer + given * 32 + side * 16),
                 "r"(p0), "r"(p2), "r"(p1), "r"(p3)
                 : "memory");
    __syncwarp();
    const int taken = at.lane >> 1, half = at.lane & 1;
    const uint4 eight = load_shared<uint4>(buffer + taken * 32 + ((half ^ (taken >> 2 & 1)) << 4));
    store_eight(args, row + taken, first_output(at, work) + half * 8, eight);
#endif
}

__device__ __forceinline__ float4 four_of(const float (&sums)[SUMS], int row_tile) {
    return make_float4(sums[row_tile * 4], sums[row_tile * 4 + 1], sums[row_tile * 4 + 2], sums[row_tile * 4 + 3]);
}

// Store the sums, or those of all blocks of a cluster, added up; `buffer` is the warp's own kilobyte.
__device__ __forceinline__ void finish(const Args& args, const Place& at, const Work& work, const float (&sums)[SUMS], u8* memory,
                                       u32 buffer) {
    const Finish how = finish_of(args, at, work);
#if SHARES > 1
    float4* const mine = (float4*)memory + (size_t)at.warp * ROW_TILES * 32 + at.lane;
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");  // all have read the last stage
#pragma unroll
    for (int item = 0; item < ROW_TILES; ++item) mine[item * 32] = four_of(sums, item);
    meet_cluster();
#pragma unroll 1
    for (int pair = at.share; pair < ROW_TILES / 2; pair += SHARES) {
        float4 sum[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int share = 0; share < SHARES; ++share) {
                const float4 other = load_cluster(shared_address(mine + (pair * 2 + half) * 32), share);
                sum[half] = make_float4(sum[half].x + other.x, sum[half].y + other.y, sum[half].z + other.z, sum[half].w + other.w);
            }
        }
        store_rows(args, at, work, how, buffer + (pair / SHARES & 1) * 512, work.row + pair * 16, sum[0], sum[1]);
    }
    meet_cluster();  // no block may leave while another still reads its memory
#else
#pragma unroll
    for (int pair = 0; pair < ROW_TILES / 2; ++pair)
        store_rows(args, at, work, how, buffer + (pair & 1) * 512, work.row + pair * 16, four_of(sums, pair * 2), four_of(sums, pair * 2 + 1));
#endif
}
