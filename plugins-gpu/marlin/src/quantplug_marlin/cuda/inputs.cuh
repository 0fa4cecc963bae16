// What multiply.cu copies of x into shared memory, for each group of warps.

#define COLUMNS (CHUNK / 8) /* pieces of a row of x in a chunk, 16 bytes each */
#define X_PIECES ((TOKENS * COLUMNS + GROUP_THREADS - 1) / GROUP_THREADS) /* that a thread copies at a time */

// Where a piece lies in a stage; pieces change places so that those read at once lie in different banks.
__device__ __forceinline__ u32 place_of_x(int row, int column) {
    return row * (CHUNK * 2) + ((column ^ (ROWS ? row & 1 : row & 7)) << 4);
}

__device__ __forceinline__ void copy_x(const Args& args, const Place& at, int stage, int chunk, const int (&source)[X_PIECES]) {
    const u32 to = at.x_ring + stage * X_STAGE;
    const int thread = at.warp_n * 32 + at.lane;
#pragma unroll
    for (int turn = 0; turn < X_PIECES; ++turn) {
        const int piece = turn * GROUP_THREADS + thread, row = piece / COLUMNS, column = piece % COLUMNS;
        const int input = chunk * CHUNK + column * 8;
        const bool inside = source[turn] >= 0 && input < args.inputs;
        const u8* from = inside ? args.x + source[turn] * args.x_stride + input * 2 : args.x;
        if (TOKENS * COLUMNS % GROUP_THREADS == 0 || row < TOKENS)
            copy_filled(to + place_of_x(row, column), from, inside ? 16 : 0);
    }
}

// The same by way of registers, for the first stages: copies of weights are under way then, and none of them has to be
// waited for before the products begin.
__device__ __forceinline__ void fetch_x(const Args& args, const Place& at, int begin, int end, const int (&source)[X_PIECES]) {
    const int thread = at.warp_n * 32 + at.lane;
    uint4 values[AHEAD][X_PIECES];
#pragma unroll
    for (int stage = 0; stage < AHEAD; ++stage)
#pragma unroll
        for (int turn = 0; turn < X_PIECES; ++turn) {
            const int chunk = begin + stage * WARPS_K, input = chunk * CHUNK + thread % COLUMNS * 8;
            const bool inside = source[turn] >= 0 && chunk < end && input < args.inputs;
            const u8* from = args.x + source[turn] * args.x_stride + input * 2;
            values[stage][turn] = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
    for (int stage = 0; stage < AHEAD; ++stage)
#pragma unroll
        for (int turn = 0; turn < X_PIECES; ++turn) {
            const int piece = turn * GROUP_THREADS + thread, row = piece / COLUMNS;
            if (row < TOKENS) store_shared(at.x_ring + stage * X_STAGE + place_of_x(row, piece % COLUMNS), values[stage][turn]);
        }
}
