// 8-bit floats that lie row by row, as the core's rows.py describes: copied, decoded and multiplied by the warp they are for.
//
// A chunk is 128 inputs, so that a row of it is a whole line of memory. Products may take inputs in any order that codes
// and x share: lane 4 g + q has 16 codes in a row, 16 q to 16 q + 15 of half a chunk, of outputs g and g + 8, and as many
// inputs of row g of x; step s takes four of them from 4 s on. Where blocks of 128 x 128 share a scale (SUBS), a chunk has one.

// The first output of a tile; outputs beyond the last tile are computed and not stored.
__device__ __forceinline__ int first_output(const Args& args, const Place& at, int tile) {
    return min(at.tile + tile, args.tiles - 1) * 16;
}

// Pieces of 16 codes of odd outputs lie in the other half of their row, so that those read at once lie in different banks.
__device__ __forceinline__ u32 place_of_codes(int output, int piece) { return output * 128 + ((piece ^ (output & 1) << 2) << 4); }

__device__ __forceinline__ void copy_weights(const Args& args, const Place& at, int stage, int chunk, u64 policy) {
    const u32 to = at.warp_ring + stage * WARP_STAGE;
    const int piece = at.lane & 7, column = chunk * 128 + piece * 16;
    const u32 bytes = column < args.width ? 16 : 0;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const u8* codes = args.codes + (size_t)first_output(args, at, tile) * args.width + (bytes ? column : 0);
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int output = part * 4 + (at.lane >> 3);
            copy_stream(to + tile * 2048 + place_of_codes(output, piece), codes + (size_t)output * args.width, bytes, policy);
        }
    }
#if SUBS
    if (at.lane < TILES) {
        const size_t block = (size_t)(first_output(args, at, at.lane) >> 7) * args.scale_across + (size_t)chunk * args.scale_along;
        copy_word(to + CODE_STAGE + at.lane * SCALE_TILE, (const float*)args.scales + block);
    }
#endif
}

__device__ __forceinline__ void multiply_chunk(const Place& at, int stage, const u32 (&)[TILES][2], float (&sums)[TILES][ROW_TILES * 4]) {
    const int g = at.lane >> 2, q = at.lane & 3;
    const u32 x = at.x_ring + stage * X_STAGE, codes = at.warp_ring + stage * WARP_STAGE;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint4 b[ROW_TILES][2];
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
                b[row_tile][pair] = load_shared<uint4>(x + place_of_x(row_tile * 8 + g, half * 8 + q * 2 + pair));
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const uint4 above = load_shared<uint4>(codes + tile * 2048 + place_of_codes(g, half * 4 + q));
            const uint4 below = load_shared<uint4>(codes + tile * 2048 + place_of_codes(g + 8, half * 4 + q));
            const u32 upper[4] = {above.x, above.y, above.z, above.w}, lower[4] = {below.x, below.y, below.z, below.w};
            float part[ROW_TILES * 4];
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                const u32 a[4] = {decode_pair(upper[step], false), decode_pair(lower[step], false), decode_pair(upper[step], true),
                                  decode_pair(lower[step], true)};
#pragma unroll
                for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
                    const uint4& four = b[row_tile][step / 2];
                    multiply_step(SUBS ? part + row_tile * 4 : &sums[tile][row_tile * 4], a, step & 1 ? four.z : four.x,
                                  step & 1 ? four.w : four.y, SUBS && step == 0);
                }
            }
#if SUBS
            const float scale = load_shared<float>(codes + CODE_STAGE + tile * SCALE_TILE);
            scale_sums(sums[tile], part, scale, scale);
#endif
        }
    }
}
