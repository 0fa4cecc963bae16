// Which pieces of y a block of warpgroup.cu takes, and what it has copied for them: boxes of weights and x, stage by stage,
// counted by the stage's barrier.

#define TOGETHER_DOWN 8 /* pieces of the same outputs that follow each other, so that they find weights and x in L2 */
#define ACROSS (PAIRED ? TILES / 2 : TILES)

// How many pieces there are side by side and one below the other.
struct Extent {
    int across, down;
};

// A piece of y: its first tile among those of gate, or of all, its first row, and whose it is.
struct Work {
    int tile, row, expert;
};

__device__ __forceinline__ Extent extent_of(const Args& args) {
    const int across = (args.tiles / (PAIRED ? 2 : 1) + ACROSS - 1) / ACROSS;
#if EXPERTS
    return {across, *args.used};
#else
    return {across, (args.rows + TOKENS - 1) / TOKENS};
#endif
}

__device__ __forceinline__ Work work_at(const Args& args, const Extent& extent, int index) {
    const int first = index / (extent.across * TOGETHER_DOWN) * TOGETHER_DOWN;
    const int height = min(TOGETHER_DOWN, extent.down - first), within = index - first * extent.across;
    const int block = first + within % height;
#if EXPERTS
    return {within / height * ACROSS, block * TOKENS, args.experts[block]};
#else
    return {within / height * ACROSS, block * TOKENS, 0};
#endif
}

__device__ __forceinline__ int first_group(int stage) { return SUBS ? stage * STAGE_SUBS / PER_GROUP : 0; }

__device__ __forceinline__ u32 stage_at(const Place& at, int slot) { return at.ring + slot * STAGE_BYTES; }

// A box of weights: the first to be evicted from L2 where no other block reads it.
__device__ __forceinline__ void copy_weight(u32 to, const Map& map, int column, int tile, u32 full, bool once, u64 policy) {
    if (once) {
        copy_box(to, &map, column, tile, full, policy);
    } else {
        copy_box(to, &map, column, tile, full);
    }
}

// What one of the four copying warps brings of a stage's weights. Beyond the last tile and group come zeros, or weights of
// the next expert that nobody stores a sum of.
__device__ __forceinline__ void copy_weights(const Args& args, const Place& at, const Work& work, int warp, int stage, int slot,
                                             bool once, u64 policy) {
    const u32 full = at.full + slot * 8, codes = stage_at(at, slot) + X_BYTES, scales = codes + TILES * CODE_BYTES;
    if (warp == 0) expect_bytes(full, X_BYTES + TILES * (CODE_BYTES + SCALE_BLOCK + ZERO_BLOCK));
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#if ROWS
        const int output = (work.tile + group * 4) * 16;
        if (warp == group) copy_weight(codes + group * 4 * CODE_BYTES, args.codes, stage * 128, output, full, once, policy);
#else
        const int tile = work.expert * args.tiles + work.tile + (PAIRED ? group * (args.tiles / 2) : group * 4);
        if (warp == group) copy_weight(codes + group * 4 * CODE_BYTES, args.codes, stage * (CODE_BYTES / 8), tile, full, once, policy);
#if SUBS
        const int first = first_group(stage);
        if (warp == 2) copy_weight(scales + group * SCALE_PART, args.scales, first * (2 * SCALE_BYTES), tile, full, once, policy);
#if ZEROS
        const u32 zeros = scales + GROUPS * SCALE_PART + group * ZERO_PART;
        if (warp == 3) copy_weight(zeros, args.zeros, first * 2, tile, full, once, policy);
#endif
#endif
#endif
    }
}

// x of one stage; what lies beyond its rows and inputs comes as zeros.
__device__ __forceinline__ void copy_x(const Args& args, const Place& at, const Work& work, int warp, int stage, int slot) {
    if (warp >= 4 - CHUNKS)
        copy_box(stage_at(at, slot) + (3 - warp) * TOKENS * 128, &args.x, (stage * CHUNKS + 3 - warp) * 64, work.row, at.full + slot * 8);
}

__device__ __forceinline__ void produce(const Args& args, const Place& at, int warp) {
    const u64 policy = read_once();
    int index = blockIdx.x / SHARES, slot = 0, phase = 1, begin = at.begin;
#if EXPERTS
    wait_for_earlier_kernels();
    const Extent extent = extent_of(args);
    const bool once = false;
    let_later_kernels_start();
#else
    const Extent extent = extent_of(args);
    const bool once = extent.down == 1;
    // Weights do not depend on what ran before; x may.
    const Work first = work_at(args, extent, index);
    begin = min(at.begin + DEPTH, at.end);
    for (int stage = at.begin; stage < begin; ++stage) copy_weights(args, at, first, warp, stage, stage - at.begin, once, policy);
    wait_for_earlier_kernels();
    for (int stage = at.begin; stage < begin; ++stage) copy_x(args, at, first, warp, stage, stage - at.begin);
    let_later_kernels_start();
    slot = begin - at.begin;
    if (slot == DEPTH) slot = 0, phase = 0;
#endif
#pragma unroll 1
    for (; index < extent.across * extent.down; index += gridDim.x / SHARES) {
        const Work work = work_at(args, extent, index);
#pragma unroll 1
        for (int stage = begin; stage < at.end; ++stage) {
            wait_barrier(at.empty + slot * 8, phase);
            copy_weights(args, at, work, warp, stage, slot, once, policy);
            copy_x(args, at, work, warp, stage, slot);
            if (++slot == DEPTH) slot = 0, phase ^= 1;
        }
        begin = at.begin;
    }
}
