// y [M, N] = x [M, K] W^T with wgmma (sm_90a), for so many rows of x that the tensor cores matter: weights decoded into
// registers, x in shared memory.
//
// Four warps have weights and x copied, stage by stage of CHUNKS times 64 inputs; GROUPS warpgroups multiply, each for BANDS times 64
// outputs. While the tensor cores work on 64 inputs, the codes of the next are decoded. SHARES blocks of a cluster share
// the stages; their sums are added in one fixed order.
//
// Set by the host, beside what codes.cuh names: GROUPS, BANDS, TOKENS (rows of x per block, a multiple of 8), CHUNKS (1 or
// 2; it divides their number), DEPTH (stages), SHARES, SUBS (scales per 64 inputs and output: 0, 1, 2 or 4), PER_GROUP (such parts per group), SCALE_BYTES, SCALE_HALF.

#include "codes.cuh"
#include "memory.cuh"
#include "barrier.cuh"

#define CONSUMERS (128 * GROUPS)
#define THREADS (CONSUMERS + 128)
#define TILES (4 * GROUPS * BANDS) /* of 16 outputs per block */
#define ROW_TILES (TOKENS / 8)
#define SUMS (ROW_TILES * 4)
#define ITEMS (BANDS * ROW_TILES)

#define STAGE_SUBS (CHUNKS * SUBS)
// Groups that a stage may touch: one more where they do not begin with stages.
#define ALIGNED (STAGE_SUBS % PER_GROUP == 0 || PER_GROUP % (SUBS ? STAGE_SUBS : 1) == 0)
#define STAGE_GROUPS (SUBS ? (STAGE_SUBS - 1) / PER_GROUP + (ALIGNED ? 1 : 2) : 0)
// One scale for the whole stage: its products are added up by the tensor cores.
#define WHOLE (CHUNKS == 2 && SUBS == 1 && PER_GROUP % 2 == 0)

#define X_BYTES (CHUNKS * TOKENS * 128)
#define CODE_BYTES (CHUNKS * UNIT_BYTES)                /* of a tile */
#define SCALE_BLOCK (STAGE_GROUPS * 16 * SCALE_BYTES)   /* of a tile */
#define ZERO_BLOCK (ZEROS ? STAGE_GROUPS * 16 : 0)      /* of a tile */
#define TILE_BYTES (CODE_BYTES + SCALE_BLOCK + ZERO_BLOCK)
#define STAGE_BYTES ((X_BYTES + TILES * TILE_BYTES + 1023) / 1024 * 1024)

struct alignas(64) Map {
    u64 words[16];
};

struct Args {
    Map x;
    const u8* codes;
    const u8* scales;
    const u8* zeros;
    const float* factor;
    const u16* bias;
    u16* y;
    int rows, outputs, tiles, chunks, groups;
};

struct Place {
    int lane, warp;  // of the consumers
    int tile;        // the first of this block
    int row;
    int share, begin, end;  // stages
    u32 ring, full, empty;
};

#include "produce.cuh"

struct Scale {
    float upper, lower;
};

template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void keep(float (&sums)[SUMS]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Rows of 128 bytes follow each other, eight to a kilobyte, and their 16-byte pieces have changed places.
__device__ __forceinline__ u64 describe_x(u32 from) {
    return (u64)((from & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void decode_chunk(const Args& args, const Place& at, int slot, int stage, int tile, int chunk,
                                             const u32 (&fixed)[2], u32 (&a)[4][4], Scale (&scale)[SUBS ? SUBS : 1]) {
    const u32 base = stage_at(at, slot) + X_BYTES;
    u32 words[4 * STEP_WORDS];
#pragma unroll
    for (int part = 0; part < STEP_WORDS; ++part) {
        const uint4 four = load_shared<uint4>(base + tile * CODE_BYTES + chunk * UNIT_BYTES + part * 512 + at.lane * 16);
        words[part * 4] = four.x, words[part * 4 + 1] = four.y, words[part * 4 + 2] = four.z, words[part * 4 + 3] = four.w;
    }
    u32 zero[SUBS ? SUBS : 1][2];
    const int g = at.lane >> 2;
#pragma unroll
    for (int sub = 0; sub < (SUBS ? SUBS : 1); ++sub) {
        zero[sub][0] = fixed[0], zero[sub][1] = fixed[1];
#if SUBS
        const int within = chunk * SUBS + sub;
        int place = within / PER_GROUP;
        if (!(STAGE_SUBS % PER_GROUP == 0)) place = (stage * STAGE_SUBS + within) / PER_GROUP - first_group(stage);
        place = min(place, args.groups - 1 - first_group(stage));
        const u32 scales = base + TILES * CODE_BYTES + tile * SCALE_BLOCK + place * 16 * SCALE_BYTES;
#if SCALE_BYTES == 4
        const float2 pair = load_shared<float2>(scales + g * 8);
        scale[sub].upper = pair.x, scale[sub].lower = pair.y;
#else
        const u32 pair = load_shared<u32>(scales + g * 4);
        scale[sub].upper = to_float((u16)pair, SCALE_HALF), scale[sub].lower = to_float((u16)(pair >> 16), SCALE_HALF);
#endif
#if ZEROS
        const u32 zeros = load_shared<u16>(base + TILES * (CODE_BYTES + SCALE_BLOCK) + tile * ZERO_BLOCK + place * 16 + g * 2);
        zero[sub][0] = negated_zero(zeros & 255), zero[sub][1] = negated_zero(zeros >> 8);
#endif
#endif
    }
#pragma unroll
    for (int step = 0; step < 4; ++step)
        decode(words + step * STEP_WORDS, zero[step * SUBS / 4][0], zero[step * SUBS / 4][1], a[step]);
    // Decoded here, and not further down among the products: those would have to wait for each other.
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

__device__ __forceinline__ void add_scaled(float (&sums)[SUMS], float (&part)[SUMS], const Scale& scale) {
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
        sums[i] = fmaf(part[i], scale.upper, sums[i]);
        sums[i + 1] = fmaf(part[i + 1], scale.upper, sums[i + 1]);
        sums[i + 2] = fmaf(part[i + 2], scale.lower, sums[i + 2]);
        sums[i + 3] = fmaf(part[i + 3], scale.lower, sums[i + 3]);
    }
}

__device__ __forceinline__ void consume(const Args& args, const Place& at, float (&sums)[BANDS][SUMS]) {
    const int first = at.warp / 4 * BANDS * 4 + at.warp % 4;  // this warp's tile of the first band; bands are 4 tiles apart
    u32 fixed[BANDS][2];
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
        fixed[band][0] = fixed[band][1] = LIFT | SIGN | MIDDLE * 0x00010001u;
#if ZEROS && !SUBS
        const size_t tile = min(at.tile + first + band * 4, args.tiles - 1);
        const u16 zeros = *(const u16*)(args.zeros + tile * 16 + (at.lane >> 2) * 2);
        fixed[band][0] = negated_zero(zeros & 255), fixed[band][1] = negated_zero(zeros >> 8);
#endif
    }
    u32 a[2][4][4];
    float part[SUBS ? SUMS : 4];
    Scale now[SUBS ? SUBS : 1], before = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < (SUBS ? SUMS : 4); ++i) part[i] = 0.0f;
    int slot = 0, phase = 0;
#pragma unroll 1
    for (int stage = at.begin; stage < at.end; ++stage) {
        wait_barrier(at.full + slot * 8, phase);
        const u32 previous = at.empty + (slot == 0 ? DEPTH - 1 : slot - 1) * 8;
#pragma unroll
        for (int band = 0; band < BANDS; ++band) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                wait_products<CHUNKS - 1>();  // the registers that this chunk is decoded into are free now
                if (!SUBS && band == 0 && chunk == CHUNKS - 1 && stage > at.begin && at.lane == 0) arrive_barrier(previous);
                decode_chunk(args, at, slot, stage, first + band * 4, chunk, fixed[band], a[chunk], now);
                const u64 x = describe_x(stage_at(at, slot) + chunk * TOKENS * 128);
#pragma unroll
                for (int sub = 0; sub < (SUBS ? SUBS : 1); ++sub) {
                    const bool fresh = SUBS && !(WHOLE && chunk == 1);
#if SUBS
                    if (fresh) {
                        wait_products<0>();
                        keep(part);
                        add_scaled(sums[sub > 0 || chunk > 0 ? band : (band + BANDS - 1) % BANDS], part, before);
                        keep(sums[sub > 0 || chunk > 0 ? band : (band + BANDS - 1) % BANDS]);
                        before = now[sub];
                        if (band == 0 && chunk == 0 && sub == 0 && stage > at.begin && at.lane == 0) arrive_barrier(previous);
                    }
#endif
                    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                    for (int step = sub * 4 / (SUBS ? SUBS : 1); step < (sub + 1) * 4 / (SUBS ? SUBS : 1); ++step) {
                        const bool add = !fresh || step > sub * 4 / (SUBS ? SUBS : 1);
#if SUBS
                        multiply_step(part, a[chunk][step], x + step * 2, add);
#else
                        multiply_step(sums[band], a[chunk][step], x + step * 2, add);
#endif
                    }
                    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                }
            }
        }
        if (++slot == DEPTH) slot = 0, phase ^= 1;
    }
    wait_products<0>();
#if SUBS
    keep(part);
    add_scaled(sums[BANDS - 1], part, before);
#else
#pragma unroll
    for (int band = 0; band < BANDS; ++band) keep(sums[band]);
#endif
}

__device__ __forceinline__ void store(const Args& args, int row, int output, float value) {
    if (row >= args.rows || output >= args.outputs) return;
    if (args.factor != nullptr) value *= args.factor[output];
    if (args.bias != nullptr) value += to_float(args.bias[output], HALF);
    args.y[(size_t)row * args.outputs + output] = from_float(value, HALF);
}

__device__ __forceinline__ void store_item(const Args& args, const Place& at, int tile, int row_tile, float4 sum) {
    const int output = (at.tile + tile) * 16 + (at.lane >> 2), row = at.row + row_tile * 8 + (at.lane & 3) * 2;
    store(args, row, output, sum.x);
    store(args, row + 1, output, sum.y);
    store(args, row, output + 8, sum.z);
    store(args, row + 1, output + 8, sum.w);
}

__device__ __forceinline__ void finish(const Args& args, const Place& at, const float (&sums)[BANDS][SUMS], u8* memory) {
    const int first = at.warp / 4 * BANDS * 4 + at.warp % 4;
#if SHARES > 1
    float4* const mine = (float4*)memory + (size_t)at.warp * ITEMS * 32 + at.lane;
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");  // all have read the last stage
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const float* four = &sums[item / ROW_TILES][item % ROW_TILES * 4];
        mine[item * 32] = make_float4(four[0], four[1], four[2], four[3]);
    }
    meet_cluster();
#pragma unroll 1
    for (int item = at.share; item < ITEMS; item += SHARES) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int share = 0; share < SHARES; ++share) {
            const float4 other = load_cluster(shared_address(mine + item * 32), share);
            sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
        }
        store_item(args, at, first + item / ROW_TILES * 4, item % ROW_TILES, sum);
    }
    meet_cluster();  // no block may leave while another still reads its memory
#else
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
        const float* four = &sums[item / ROW_TILES][item % ROW_TILES * 4];
        store_item(args, at, first + item / ROW_TILES * 4, item % ROW_TILES, make_float4(four[0], four[1], four[2], four[3]));
    }
#endif
}

extern "C" __global__ void
#if SHARES > 1
__cluster_dims__(SHARES, 1, 1)
#endif
__launch_bounds__(THREADS, 1) multiply(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ __align__(8) u64 barriers[2 * DEPTH];
    const int warp = threadIdx.x / 32;
    const int stages = args.chunks / CHUNKS;
    Place at;
    at.lane = threadIdx.x & 31;
    at.warp = warp - 4;
    at.tile = blockIdx.x / SHARES * TILES;
    at.row = blockIdx.y * TOKENS;
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
        float sums[BANDS][SUMS];
#pragma unroll
        for (int band = 0; band < BANDS; ++band)
#pragma unroll
            for (int i = 0; i < SUMS; ++i) sums[band][i] = 0.0f;
        consume(args, at, sums);
        finish(args, at, sums, memory);
    }
}
