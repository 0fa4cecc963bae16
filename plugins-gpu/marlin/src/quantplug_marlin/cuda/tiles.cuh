// Weights that lie as prepare.py describes: copied, decoded and multiplied by the warp that they are for.

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

// Scales and negated zeros of one tile and part of a chunk, for outputs g and g + 8 of this lane.
struct Scale {
    float upper, lower;
    u32 zero_upper, zero_lower;
};

__device__ __forceinline__ Scale read_scale(const Place& at, int stage, int place) {
    Scale scale = {1.0f, 1.0f, LIFT | SIGN | MIDDLE * 0x00010001u, LIFT | SIGN | MIDDLE * 0x00010001u};
#if SUBS
    const u32 from = at.warp_ring + stage * WARP_STAGE + CODE_STAGE;
    const int g = at.lane >> 2;
#if SCALE_BYTES == 4
    const float2 pair = load_shared<float2>(from + place * 64 + g * 8);
    scale.upper = pair.x, scale.lower = pair.y;
#else
    const u32 pair = load_shared<u32>(from + place * 32 + g * 4);
    scale.upper = to_float((u16)pair, SCALE_HALF), scale.lower = to_float((u16)(pair >> 16), SCALE_HALF);
#endif
#if ZEROS
    const u32 zeros = load_shared<u16>(from + SCALE_STAGE + place * 16 + g * 2);
    scale.zero_upper = negated_zero(zeros & 255), scale.zero_lower = negated_zero(zeros >> 8);
#endif
#endif
    return scale;
}

__device__ __forceinline__ void read_codes(const Place& at, int stage, int tile, u32 (&words)[4 * STEP_WORDS]) {
    const u32 from = at.warp_ring + stage * WARP_STAGE + tile * UNIT_BYTES + at.lane * 16;
#pragma unroll
    for (int part = 0; part < STEP_WORDS; ++part) {
        const uint4 four = load_shared<uint4>(from + part * 512);
        words[part * 4] = four.x, words[part * 4 + 1] = four.y, words[part * 4 + 2] = four.z, words[part * 4 + 3] = four.w;
    }
}

// 32 inputs (half a chunk) of eight rows of x: what lanes take as the second operand of two steps.
__device__ __forceinline__ void read_x(const Place& at, int stage, int row_tile, int half, u32 (&b)[4]) {
    const int row = at.lane & 7, piece = half * 4 + (at.lane >> 3);
    const u32 from = at.x_ring + stage * X_STAGE + row_tile * 1024 + row * 128 + ((piece ^ row) << 4);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(from));
}

__device__ __forceinline__ void multiply_chunk(const Place& at, int stage, const u32 (&fixed)[TILES][2],
                                               float (&sums)[TILES][ROW_TILES * 4]) {
    u32 b[2][ROW_TILES][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) read_x(at, stage, row_tile, half, b[half][row_tile]);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        u32 words[4 * STEP_WORDS];
        read_codes(at, stage, tile, words);
        float part[ROW_TILES * 4];
        Scale scale;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const bool first = SUBS && step * SUBS % 4 == 0, last = SUBS && (step + 1) * SUBS % 4 == 0;
            if (first) scale = read_scale(at, stage, tile * SUBS + step * SUBS / 4);
            u32 a[4];
            decode(words + step * STEP_WORDS, SUBS ? scale.zero_upper : fixed[tile][0],
                   SUBS ? scale.zero_lower : fixed[tile][1], a);
#pragma unroll
            for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
                multiply_step(SUBS ? part + row_tile * 4 : &sums[tile][row_tile * 4], a, b[step / 2][row_tile][step % 2 * 2],
                              b[step / 2][row_tile][step % 2 * 2 + 1], first);
            if (last) scale_sums(sums[tile], part, scale.upper, scale.lower);
        }
    }
}
