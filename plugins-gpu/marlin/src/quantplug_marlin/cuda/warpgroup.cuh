// The products of four warps together with wgmma (sm_90a): weights in registers, x in shared memory.
//
// While the tensor cores work on one chunk, the codes of the next are decoded. `multiply_step` is written out by the host
// for the number of rows: it names every register of the sums.

struct Decoded {
    u32 a[4][4];
    Scale scale[SUBS ? SUBS : 1];
};

template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Where eight rows of 128 bytes follow each other, and the pieces of a row have changed places (128-byte swizzle).
__device__ __forceinline__ u64 describe_x(u32 from) {
    return (u64)((from & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void decode_chunk(const Place& at, int stage, const u32 (&fixed)[TILES][2], Decoded& to) {
    u32 words[4 * STEP_WORDS];
    read_codes(at, stage, 0, words);
#pragma unroll
    for (int part = 0; part < SUBS; ++part) to.scale[part] = read_scale(at, stage, part);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const Scale& scale = to.scale[step * SUBS / 4];
        decode(words + step * STEP_WORDS, SUBS ? scale.zero_upper : fixed[0][0], SUBS ? scale.zero_lower : fixed[0][1],
               to.a[step]);
    }
}

__device__ __forceinline__ void keep(float (&sums)[ROW_TILES * 4]) {
#pragma unroll
    for (int i = 0; i < ROW_TILES * 4; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ __forceinline__ void arrive(const Args& args, const Place& at, int stage, int chunk, int end, u64 policy) {
    wait_copies<AHEAD - 1>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet_group(at.warp_k);
    const int next = chunk + AHEAD * WARPS_K, free = (stage + AHEAD) % DEPTH;
    if (next < end) {
        copy_weights(args, at, free, next, policy);
        copy_x(args, at, free, next);
    }
    commit_copies();
}

__device__ __forceinline__ void multiply_chunk(const Place& at, int stage, const Decoded& now,
                                               float (&part)[SUBS ? SUBS : 1][ROW_TILES * 4], float (&sums)[ROW_TILES * 4]) {
    const u64 x = describe_x(at.x_ring + stage * X_STAGE);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const bool fresh = SUBS && step * SUBS % 4 == 0;
        multiply_step(SUBS ? part[step * SUBS / 4] : sums, now.a[step], x + step * 2, !fresh);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void run(const Args& args, const Place& at, int begin, int end, u64 policy,
                                    const u32 (&fixed)[TILES][2], float (&sums)[TILES][ROW_TILES * 4]) {
    Decoded decoded[2];
    float part[SUBS ? SUBS : 1][ROW_TILES * 4];
    int stage = 0, chunk = begin;
    if (begin < end) {
        arrive(args, at, 0, begin, end, policy);
        decode_chunk(at, 0, fixed, decoded[0]);
    }
    while (chunk < end) {
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
            if (chunk >= end) break;
            const int following = stage + 1 == DEPTH ? 0 : stage + 1;
            multiply_chunk(at, stage, decoded[turn], part, sums[0]);
            if (chunk + WARPS_K < end) {
                arrive(args, at, following, chunk + WARPS_K, end, policy);
                decode_chunk(at, following, fixed, decoded[turn ^ 1]);
            }
            wait_products<0>();
            keep(sums[0]);
#pragma unroll
            for (int sub = 0; sub < SUBS; ++sub) {
                keep(part[sub]);
                scale_sums(sums[0], part[sub], ROW_TILES * 4, decoded[turn].scale[sub]);
            }
            stage = following;
            chunk += WARPS_K;
        }
    }
}
