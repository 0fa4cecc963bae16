// y [M, N] = x [M, K] W^T for the layout that prepare.py describes.
//
// Weights are the first operand of each matrix instruction, x is the second: 16 outputs x 8 rows of x at a time. WARPS_N
// warps side by side share x; WARPS_K such groups take turns at the chunks of 64 inputs, and their sums are added in
// shared memory; SHARES blocks (a cluster, or gridDim.z blocks whose sums another kernel adds) share the chunks, too.
// Every sum is added up in one fixed order.
//
// Codes lie as lanes take them, or with ROWS row by row, as rowwise.cuh says.
//
// Set by the host, beside what codes.cuh names: TILES (of 16 outputs per warp), TOKENS (rows of x per block, a multiple of
// 8), WARPS_N, WARPS_K, DEPTH (chunks under way), SHARES, BLOCKS (per multiprocessor), SUBS (scales per chunk and output:
// 0, 1, 2 or 4), PER_GROUP (such parts of a chunk per group), SCALE_BYTES (2 or 4), SCALE_HALF.
//
// Experts: with EXPERTS = 1 or 2 it is the first or the second product of a mixture (see experts.cuh); weights of one
// expert follow those of the one before it, and every TOKENS places of the order that route.cu makes belong to one expert.

#include "codes.cuh"
#include "memory.cuh"

#define THREADS (32 * WARPS_N * WARPS_K)
#define GROUP_THREADS (32 * WARPS_N)
#define ROW_TILES (TOKENS / 8)
#define ITEMS (TILES * ROW_TILES) /* pieces of 16 outputs x 8 rows per warp */

#ifndef ROWS
#define ROWS 0
#endif
#define CHUNK (ROWS ? 128 : 64) /* inputs */

#define CODE_STAGE (TILES * CHUNK * 2 * BITS)
#define SCALE_TILE (ROWS ? 4 : 16 * SCALE_BYTES)
#define SCALE_STAGE ((TILES * SUBS * SCALE_TILE + 15) / 16 * 16)
#define ZERO_STAGE (ZEROS ? TILES * SUBS * 16 : 0)
#define WARP_STAGE (CODE_STAGE + SCALE_STAGE + ZERO_STAGE)
#define X_STAGE (TOKENS * CHUNK * 2)
#define X_RING (DEPTH * X_STAGE)
#define RING_BYTES (WARPS_K * X_RING + WARPS_N * WARPS_K * DEPTH * WARP_STAGE)
#define SUM_BYTES (WARPS_N * ITEMS * 512)
#define AHEAD (DEPTH - 1)

#ifndef EXPERTS
#define EXPERTS 0
#define GATED 0
#endif
// Gate and up: a warp's tiles are those of the same outputs of both, in turns.
#define PAIRED (EXPERTS == 1 && GATED)

struct Args {
    const u8* x;
    const u8* codes;
    const u8* scales;
    const u8* zeros;
    const float* factor;
    const u16* bias;
    u16* y;
    float* shares;
    long long x_stride;  // bytes from one row of x to the next
    int rows, outputs, inputs, tiles, chunks, groups;  // outputs, tiles: of one expert
#if ROWS
    int width, factor_step;           // bytes of a row of codes; elements from one output's factor to the next
    int scale_across, scale_along;    // elements from the scale of a block to that of the next outputs, the next inputs
#endif
#if EXPERTS
    int top_k, y_stride;  // elements from one row of y to the next
    const int* order;     // which choice each place is for: row * top_k + turn, or -1
    const int* experts;   // of every TOKENS places, or -1
    const float* weights; // of choices, where they multiply x, or null
    float limit, alpha, up_offset;
#endif
};

struct Place {
    int lane, warp_n, warp_k;
    int tile;   // the first of this warp
    int row;    // the first of this block
    int share;  // of the chunks
    int expert;
    u32 x_ring, warp_ring;
};

__device__ __forceinline__ void meet_group(int warp_k) {
#if WARPS_N == 1
    __syncwarp();
#else
    asm volatile("bar.sync %0, %1;" ::"r"(1 + warp_k), "n"(GROUP_THREADS) : "memory");
#endif
}

// Where a tile of this warp lies among those of all experts; outputs beyond the last tile are computed and not stored.
__device__ __forceinline__ size_t tile_within(const Args& args, const Place& at, int tile) {
    const int half = args.tiles / 2;
    const int found = PAIRED ? min(at.tile + tile / 2, half - 1) + (tile & 1) * half : min(at.tile + tile, args.tiles - 1);
    return (size_t)at.expert * args.tiles + found;
}

// Which row of x a row of this block is, -1 for none.
__device__ __forceinline__ int source_row(const Args& args, const Place& at, int row) {
#if EXPERTS
    const int choice = args.order[at.row + row];
    return choice < 0 ? -1 : EXPERTS == 1 ? choice / args.top_k : at.row + row;
#else
    return at.row + row < args.rows ? at.row + row : -1;
#endif
}

#include "inputs.cuh"
#include "warp.cuh"

#if ROWS
#include "rowwise.cuh"
#else
#include "tiles.cuh"
#endif

// Copy, wait and multiply, chunk by chunk.
__device__ __forceinline__ void run(const Args& args, const Place& at, int begin, int end, u64 policy,
                                    const int (&source)[X_PIECES], const u32 (&fixed)[TILES][2],
                                    float (&sums)[TILES][ROW_TILES * 4]) {
    int stage = 0;
#pragma unroll 1
    for (int chunk = begin; chunk < end; chunk += WARPS_K) {
        wait_copies<AHEAD - 1>();
        meet_group(at.warp_k);
        const int next = chunk + AHEAD * WARPS_K, free = stage == 0 ? DEPTH - 1 : stage - 1;
        if (next < end) {
            copy_weights(args, at, free, next, policy);
            copy_x(args, at, free, next, source);
        }
        commit_copies();
        multiply_chunk(at, stage, fixed, sums);
        stage = stage + 1 == DEPTH ? 0 : stage + 1;
    }
}

// Zero points of weights that have one group only; they hold for all chunks.
__device__ __forceinline__ void read_fixed_zeros(const Args& args, const Place& at, u32 (&fixed)[TILES][2]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#if ZEROS && !SUBS
        const u16 zeros = *(const u16*)(args.zeros + tile_within(args, at, tile) * 16 + (at.lane >> 2) * 2);
        fixed[tile][0] = negated_zero(zeros & 255), fixed[tile][1] = negated_zero(zeros >> 8);
#else
        fixed[tile][0] = fixed[tile][1] = LIFT | SIGN | MIDDLE * 0x00010001u;
#endif
    }
}

#if EXPERTS
#include "experts.cuh"
#else
#include "store.cuh"
#endif

__device__ __forceinline__ float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Add up what the groups of warps have summed, and store it, or what the blocks of a cluster have.
__device__ __forceinline__ void finish(const Args& args, const Place& at, const float (&sums)[TILES][ROW_TILES * 4], u8* memory) {
    float4* const parts = (float4*)memory;  // [WARPS_K, WARPS_N, ITEMS, 32]
    const int mine = (at.warp_n * ITEMS) * 32 + at.lane, stride = WARPS_N * ITEMS * 32;
    wait_copies<0>();
    __syncthreads();
#if WARPS_K > 1 || SHARES > 1
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const float* four = &sums[item / ROW_TILES][item % ROW_TILES * 4];
        parts[at.warp_k * stride + mine + item * 32] = make_float4(four[0], four[1], four[2], four[3]);
    }
    __syncthreads();
    float4* const whole = parts + (WARPS_K > 1 ? WARPS_K * stride : 0);
#pragma unroll
    for (int item = at.warp_k; item < ITEMS / TOGETHER; item += WARPS_K) {
        float4 sum[TOGETHER];
#pragma unroll
        for (int one = 0; one < TOGETHER; ++one) {
            const int place = mine + item_of(item, one) * 32;
            sum[one] = parts[place];
#pragma unroll
            for (int k = 1; k < WARPS_K; ++k) sum[one] = add(sum[one], parts[k * stride + place]);
        }
#if SHARES > 1
        if (WARPS_K > 1) whole[mine + item * 32] = sum[0];
#else
        store_item(args, at, item, sum);
#endif
    }
#if SHARES > 1
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#pragma unroll 1
    for (int item = at.share + SHARES * at.warp_k; item < ITEMS; item += SHARES * WARPS_K) {
        float4 sum[1] = {make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll
        for (int share = 0; share < SHARES; ++share) {
            u32 from;
            float4 other;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(from) : "r"(shared_address(whole + mine + item * 32)), "r"(share));
            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(other.x), "=f"(other.y), "=f"(other.z), "=f"(other.w)
                         : "r"(from));
            sum[0] = add(sum[0], other);
        }
        store_item(args, at, item, sum);
    }
    // No block may leave while another still reads its memory.
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
#else
#pragma unroll
    for (int item = 0; item < ITEMS / TOGETHER; ++item) {
        float4 sum[TOGETHER];
#pragma unroll
        for (int one = 0; one < TOGETHER; ++one) {
            const int place = item_of(item, one);
            const float* four = &sums[place / ROW_TILES][place % ROW_TILES * 4];
            sum[one] = make_float4(four[0], four[1], four[2], four[3]);
        }
        store_item(args, at, item, sum);
    }
#endif
}

extern "C" __global__ void
#if SHARES > 1
__cluster_dims__(SHARES, 1, 1)
#endif
__launch_bounds__(THREADS, BLOCKS) multiply(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) u8 memory[];
    const int warp = threadIdx.x / 32;
    const int shares = SHARES > 1 ? SHARES : gridDim.z;
    Place at;
    at.lane = threadIdx.x & 31;
    at.warp_n = warp % WARPS_N;
    at.warp_k = warp / WARPS_N;
    at.tile = (blockIdx.x / SHARES * WARPS_N + at.warp_n) * (PAIRED ? TILES / 2 : TILES);
    at.row = blockIdx.y * TOKENS;
#if EXPERTS
    wait_for_earlier_kernels();
    at.expert = args.experts[blockIdx.y];
    if (at.expert < 0) return;
#else
    at.expert = 0;
#endif
    at.share = SHARES > 1 ? blockIdx.x % SHARES : blockIdx.z;
    at.x_ring = shared_address(memory) + at.warp_k * X_RING;
    at.warp_ring = shared_address(memory) + WARPS_K * X_RING + warp * DEPTH * WARP_STAGE;

    const int begin = (int)((long long)args.chunks * at.share / shares) + at.warp_k;
    const int end = (int)((long long)args.chunks * (at.share + 1) / shares);
    const u64 policy = read_once();

    // Weights do not depend on what ran before; x may.
#pragma unroll
    for (int stage = 0; stage < AHEAD; ++stage) {
        const int chunk = begin + stage * WARPS_K;
        if (chunk < end) copy_weights(args, at, stage, chunk, policy);
        commit_copies();
    }
#if !EXPERTS
    wait_for_earlier_kernels();
#endif
    int source[X_PIECES];
#pragma unroll
    for (int turn = 0; turn < X_PIECES; ++turn) {
        const int row = (turn * GROUP_THREADS + at.warp_n * 32 + at.lane) / COLUMNS;
        source[turn] = row < TOKENS ? source_row(args, at, row) : -1;
    }
    fetch_x(args, at, begin, end, source);
    let_later_kernels_start();
    u32 fixed[TILES][2];
    read_fixed_zeros(args, at, fixed);
    float sums[TILES][ROW_TILES * 4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < ROW_TILES * 4; ++i) sums[tile][i] = 0.0f;

    run(args, at, begin, end, policy, source, fixed, sums);
    finish(args, at, sums, memory);
}
