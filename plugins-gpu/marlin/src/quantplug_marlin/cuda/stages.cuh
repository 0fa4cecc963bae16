// What multiply.cu copies into shared memory: weights for each warp, x for each group of warps.

__device__ __forceinline__ void copy_weights(const Args& args, const Place& at, int stage, int chunk, u64 policy) {
    const u32 to = at.warp_ring + stage * WARP_STAGE;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const size_t unit = tile_within(args, at, tile) * args.chunks + chunk;
#pragma unroll
        for (int part = 0; part < UNIT_BYTES; part += 512) {
            const u32 offset = part + at.lane * 16;
            copy_stream(to + tile * UNIT_BYTES + offset, args.codes + unit * UNIT_BYTES + offset, policy);
        }
    }
#if SUBS
    constexpr int PER_SCALE = SCALE_BYTES, SCALES = TILES * SUBS * PER_SCALE, PIECES = SCALES + ZERO_STAGE / 16;
#pragma unroll
    for (int base = 0; base < PIECES; base += 32) {
        const int piece = base + at.lane;
        const bool zero = piece >= SCALES;
        const int place = zero ? piece - SCALES : piece / PER_SCALE;  // tile * SUBS + part of the chunk
        const int last = args.groups - 1, wanted = (chunk * SUBS + place % SUBS) / PER_GROUP;
        const size_t group = tile_within(args, at, place / SUBS) * args.groups + (wanted < last ? wanted : last);
        const u8* from = zero ? args.zeros + group * 16
                              : args.scales + (group * PER_SCALE + piece % PER_SCALE) * 16;
        if (piece < PIECES) copy_stream(to + CODE_STAGE + piece * 16, from, policy);
    }
#endif
}

#define PIECES ((TOKENS * 8 + GROUP_THREADS - 1) / GROUP_THREADS) /* of x, 16 bytes each, that a thread copies at a time */

// Rows of 64 inputs, 128 bytes; their 16-byte pieces change places so that eight rows are read without conflicts.
__device__ __forceinline__ void copy_x(const Args& args, const Place& at, int stage, int chunk, const int (&source)[PIECES]) {
    const u32 to = at.x_ring + stage * X_STAGE;
    const int thread = at.warp_n * 32 + at.lane;
#pragma unroll
    for (int turn = 0; turn < PIECES; ++turn) {
        const int piece = turn * GROUP_THREADS + thread, row = piece >> 3, column = piece & 7;
        const int input = chunk * 64 + column * 8;
        const bool inside = source[turn] >= 0 && input < args.inputs;
        const u8* from = inside ? args.x + source[turn] * args.x_stride + input * 2 : args.x;
        if (TOKENS * 8 % GROUP_THREADS == 0 || row < TOKENS)
            copy_filled(to + row * 128 + ((column ^ (row & 7)) << 4), from, inside ? 16 : 0);
    }
}

// The same by way of registers, for the first stages: copies of weights are under way then, and none of them has to be
// waited for before the products begin.
__device__ __forceinline__ void fetch_x(const Args& args, const Place& at, int begin, int end, const int (&source)[PIECES]) {
    const int thread = at.warp_n * 32 + at.lane;
    uint4 values[AHEAD][PIECES];
#pragma unroll
    for (int stage = 0; stage < AHEAD; ++stage)
#pragma unroll
        for (int turn = 0; turn < PIECES; ++turn) {
            const int chunk = begin + stage * WARPS_K, input = chunk * 64 + (thread & 7) * 8;
            const bool inside = source[turn] >= 0 && chunk < end && input < args.inputs;
            const u8* from = args.x + source[turn] * args.x_stride + input * 2;
            values[stage][turn] = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
    for (int stage = 0; stage < AHEAD; ++stage)
#pragma unroll
        for (int turn = 0; turn < PIECES; ++turn) {
            const int piece = turn * GROUP_THREADS + thread, row = piece >> 3;
            const u32 to = at.x_ring + stage * X_STAGE + row * 128 + (((piece & 7) ^ (row & 7)) << 4);
            if (row < TOKENS) store_shared(to, values[stage][turn]);
        }
}
