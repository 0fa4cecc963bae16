// What the warpgroups of warpgroup.cu do: decode weights into registers, multiply, and scale sums.

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

// Codes of rows g and g + 8: those of a tile, or of one half of a tile of gate and of one of up.
__device__ __forceinline__ void read_codes(const Place& at, u32 codes, int chunk, u32 (&words)[4 * STEP_WORDS]) {
    const int tile = PAIRED ? at.warp & 3 : at.warp;
#pragma unroll
    for (int part = 0; part < STEP_WORDS; ++part) {
        const u32 from = codes + tile * CODE_BYTES + chunk * UNIT_BYTES + part * 512 + at.lane * 16;
        const uint4 four = load_shared<uint4>(from);
        words[part * 4] = four.x, words[part * 4 + 1] = four.y, words[part * 4 + 2] = four.z, words[part * 4 + 3] = four.w;
#if PAIRED
        const uint4 other = load_shared<uint4>(from + 4 * CODE_BYTES);
        const u32 ups[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) words[part * 4 + i] = join_halves(words[part * 4 + i], ups[i], at.warp >> 2);
#endif
    }
}

// The numbers of rows g and g + 8 at `from`, where a tile has pairs of them.
template <typename T>
__device__ __forceinline__ void read_rows(const Place& at, u32 from, int part_bytes, int tile_bytes, T& upper, T& lower) {
    const int g = at.lane >> 2;
#if PAIRED
    from += (at.warp & 3) * tile_bytes + (g * 2 + (at.warp >> 2)) * sizeof(T);
    upper = load_shared<T>(from), lower = load_shared<T>(from + part_bytes);
#else
    struct alignas(2 * sizeof(T)) Pair { T upper, lower; };
    const Pair pair = load_shared<Pair>(from + (at.warp >> 2) * part_bytes + (at.warp & 3) * tile_bytes + g * sizeof(Pair));
    upper = pair.upper, lower = pair.lower;
#endif
}

__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float((u32)(127 + exponent) << 23); }

__device__ __forceinline__ u32 twice(float value) {
    u32 pair;
    asm("cvt.rn." PAIR ".f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
    return pair;
}

// Operands are decoded here, and not further down among the products: those would have to wait for each other.
__device__ __forceinline__ void keep_operands(u32 (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

#if ROWS
// Rows of 128 codes, whose pieces of 16 have changed places as those of x have; a step of 16 inputs is one piece.
__device__ __forceinline__ void decode_chunk(const Args& args, const Place& at, const Work& work, int slot, int stage, int chunk,
                                             const u32 (&)[2], u32 (&a)[4][4], Scale (&scale)[SUBS ? SUBS : 1]) {
    const int g = at.lane >> 2;
    const u32 codes = stage_at(at, slot) + X_BYTES + at.warp * CODE_BYTES + g * 128 + (at.lane & 3) * 2;
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[step][i] = decode_pair(load_shared<u16>(codes + (((chunk * 4 + step) ^ g) << 4) + (i & 1) * 1024 + (i >> 1) * 8), false);
#if SUBS
    const size_t across = (size_t)((work.tile + at.warp) / 8) * args.scale_across;
    scale[0].upper = scale[0].lower = work.tile + at.warp < args.tiles ? args.blocks[across + (size_t)stage * args.scale_along] : 0.0f;
#endif
    keep_operands(a);
}
#else
__device__ __forceinline__ void decode_chunk(const Args&, const Place& at, const Work&, int slot, int stage, int chunk,
                                             const u32 (&fixed)[2], u32 (&a)[4][4], Scale (&scale)[SUBS ? SUBS : 1]) {
    const u32 codes = stage_at(at, slot) + X_BYTES;
    u32 words[4 * STEP_WORDS];
    read_codes(at, codes, chunk, words);
    u32 zero[SUBS ? SUBS : 1][2] = {{fixed[0], fixed[1]}};
#if SUBS
    const u32 scales = codes + TILES * CODE_BYTES, zeros = scales + GROUPS * SCALE_PART;
#pragma unroll
    for (int sub = 0; sub < SUBS; ++sub) {
        zero[sub][0] = fixed[0], zero[sub][1] = fixed[1];
        const int within = chunk * SUBS + sub;
        int place = within / PER_GROUP;
        if (!(STAGE_SUBS % PER_GROUP == 0)) place = (stage * STAGE_SUBS + within) / PER_GROUP - first_group(stage);
#if SCALE_BYTES == 4
        read_rows<float>(at, scales + place * 64, SCALE_PART, SCALE_BLOCK, scale[sub].upper, scale[sub].lower);
#else
        u16 upper, lower;
        read_rows<u16>(at, scales + place * 32, SCALE_PART, SCALE_BLOCK, upper, lower);
        scale[sub].upper = to_float(upper, SCALE_HALF), scale[sub].lower = to_float(lower, SCALE_HALF);
#endif
#if ZEROS
        u8 above, below;
        read_rows<u8>(at, zeros + place * 16, ZERO_PART, ZERO_BLOCK, above, below);
        zero[sub][0] = negated_zero(above), zero[sub][1] = negated_zero(below);
#endif
    }
#endif
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int sub = step * SUBS / 4;
#if FOLDED
        decode_scaled(words + step * STEP_WORDS, twice(scale[sub].upper * power_of_two(FOLD)), twice(scale[sub].lower * power_of_two(FOLD)), a[step]);
#else
        decode(words + step * STEP_WORDS, zero[sub][0], zero[sub][1], a[step]);
#endif
    }
    keep_operands(a);
}
#endif

__device__ __forceinline__ void add_part(float (&sums)[SUMS], float (&part)[SUMS], const Scale& scale) {
    keep(part);
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
        sums[i] = fmaf(part[i], scale.upper, sums[i]);
        sums[i + 1] = fmaf(part[i + 1], scale.upper, sums[i + 1]);
        sums[i + 2] = fmaf(part[i + 2], scale.lower, sums[i + 2]);
        sums[i + 3] = fmaf(part[i + 3], scale.lower, sums[i + 3]);
    }
    keep(sums);
}

__device__ __forceinline__ void multiply_steps(float (&sums)[SUMS], const u32 (&a)[4][4], u64 x, int begin, int end, bool fresh) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = begin; step < end; ++step) multiply_step(sums, a[step], x + step * 2, !fresh || step > begin);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// What a warpgroup has read of the ring's slots so far.
struct Reader {
    int slot, phase;
};

__device__ __forceinline__ void wait_stage(const Place& at, const Reader& reader) {
    wait_barrier(at.full + reader.slot * 8, reader.phase);
}

__device__ __forceinline__ void advance(Reader& reader) {
    if (++reader.slot == DEPTH) reader.slot = 0, reader.phase ^= 1;
}

// The slot before this one can be filled again.
__device__ __forceinline__ void release_previous(const Place& at, const Reader& reader) {
    if (at.lane == 0) arrive_barrier(at.empty + (reader.slot == 0 ? DEPTH - 1 : reader.slot - 1) * 8);
}

__device__ __forceinline__ void consume(const Args& args, const Place& at, const Work& work, const u32 (&fixed)[2], Reader& reader, float (&sums)[SUMS]) {
    constexpr int PIECES = STAGES * CHUNKS;  // per turn of the loop, of 64 inputs
    u32 a[2][4][4];
#if SCALED
    constexpr int STEPS = 4 / SUBS;
    float part[2][SUMS];
    Scale next[SUBS], scale[RUNS];
    wait_stage(at, reader);
    decode_chunk(args, at, work, reader.slot, at.begin, 0, fixed, a[0], next);
#pragma unroll 1
    for (int stage = at.begin; stage < at.end; stage += STAGES) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            const int chunk = piece % CHUNKS;
            const u64 x = describe_x(stage_at(at, reader.slot) + chunk * TOKENS * 128);
#pragma unroll
            for (int sub = 0; sub < (LONG ? 1 : SUBS); ++sub) {
                const int run = LONG ? piece / 2 : piece * SUBS + sub;
                const bool fresh = !LONG || chunk == 0;
                if (fresh) scale[run] = next[sub];
                multiply_steps(part[run & 1], a[piece & 1], x, LONG ? 0 : sub * STEPS, LONG ? 4 : (sub + 1) * STEPS, fresh);
                if (piece > 0 || sub > 0) wait_products<1>();
                if (run > 0 && fresh) add_part(sums, part[(run & 1) ^ 1], scale[run - 1]);
            }
            if (chunk == 0 && piece > 0) release_previous(at, reader);
            const int ahead = stage + (piece + 1) / CHUNKS;
            if (chunk == CHUNKS - 1) {
                advance(reader);
                if (ahead < at.end) wait_stage(at, reader);
            }
            if (PIECES == 1) wait_products<0>();  // the registers that the next chunk is decoded into are free now
            if (chunk < CHUNKS - 1 || ahead < at.end)
                decode_chunk(args, at, work, reader.slot, ahead, (piece + 1) % CHUNKS, fixed, a[(piece + 1) % PIECES & 1], next);
        }
        wait_products<0>();
        release_previous(at, reader);
        add_part(sums, part[(RUNS - 1) & 1], scale[RUNS - 1]);
    }
#else
    Scale scale[SUBS ? SUBS : 1];
#pragma unroll 1
    for (int stage = at.begin; stage < at.end; stage += STAGES) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            const int chunk = piece % CHUNKS, held = piece & (PIECES > 1);
            if (chunk == 0) wait_stage(at, reader);
            wait_products<(PIECES > 1)>();  // the registers that this chunk is decoded into are free now
            decode_chunk(args, at, work, reader.slot, stage + piece / CHUNKS, chunk, fixed, a[held], scale);
            multiply_steps(sums, a[held], describe_x(stage_at(at, reader.slot) + chunk * TOKENS * 128), 0, 4, false);
            if (chunk == 0) {
                wait_products<1>();
                if (stage + piece > at.begin) release_previous(at, reader);
            }
            if (chunk == CHUNKS - 1) advance(reader);
        }
    }
    wait_products<0>();
    release_previous(at, reader);
    keep(sums);
#endif
}
