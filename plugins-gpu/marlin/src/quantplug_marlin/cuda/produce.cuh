// What warpgroup.cu has copied: stages of weights by bulk copies, of x by boxes, both counted by the stage's barrier.

__device__ __forceinline__ int first_group(int stage) { return SUBS ? stage * STAGE_SUBS / PER_GROUP : 0; }

__device__ __forceinline__ u32 stage_at(const Place& at, int slot) { return at.ring + slot * STAGE_BYTES; }

// What one of the four copying warps brings of a stage's weights; by one lane, with addresses that are the same for all, as
// the copy engine takes them.
__device__ __forceinline__ void copy_weights(const Args& args, const Place& at, int warp, int stage, int slot, u64 policy) {
    const int first = first_group(stage), groups = min(STAGE_GROUPS, args.groups - first);
    const u32 full = at.full + slot * 8, to = stage_at(at, slot) + X_BYTES, scales = to + TILES * CODE_BYTES;
    if (warp == 0)
        expect_bytes(full, X_BYTES + TILES * (CODE_BYTES + (SUBS ? groups * 16 * (SCALE_BYTES + ZEROS) : 0)));
#pragma unroll
    for (int turn = 0; turn < TILES / 4; ++turn) {
        const int tile = turn * 4 + warp;
        const size_t real = min(at.tile + tile, args.tiles - 1);
        const u8* from = args.codes + (real * args.chunks + stage * CHUNKS) * UNIT_BYTES;
        copy_bulk(to + tile * CODE_BYTES, from, CODE_BYTES, full, policy);
#if SUBS
        const size_t group = real * args.groups + first;
        from = args.scales + group * 16 * SCALE_BYTES;
        copy_bulk(scales + tile * SCALE_BLOCK, from, groups * 16 * SCALE_BYTES, full, policy);
#if ZEROS
        copy_bulk(scales + TILES * SCALE_BLOCK + tile * ZERO_BLOCK, args.zeros + group * 16, groups * 16, full, policy);
#endif
#endif
    }
}

// x of one stage; what lies beyond its rows and inputs comes as zeros.
__device__ __forceinline__ void copy_x(const Args& args, const Place& at, int warp, int stage, int slot) {
    if (warp < CHUNKS)
        copy_box(stage_at(at, slot) + warp * TOKENS * 128, &args.x, (stage * CHUNKS + warp) * 64, at.row, at.full + slot * 8);
}

__device__ __forceinline__ void produce(const Args& args, const Place& at, int warp) {
    const u64 policy = read_once();
    const int early = min(at.begin + DEPTH, at.end);
    for (int stage = at.begin; stage < early; ++stage) copy_weights(args, at, warp, stage, stage - at.begin, policy);
    wait_for_earlier_kernels();
    for (int stage = at.begin; stage < early; ++stage) copy_x(args, at, warp, stage, stage - at.begin);
    let_later_kernels_start();
    int slot = 0, phase = 0;
    for (int stage = early; stage < at.end; ++stage) {
        wait_barrier(at.empty + slot * 8, phase);
        copy_weights(args, at, warp, stage, slot, policy);
        copy_x(args, at, warp, stage, slot);
        if (++slot == DEPTH) slot = 0, phase ^= 1;
    }
}
