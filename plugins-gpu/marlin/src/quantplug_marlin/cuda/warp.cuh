// The products of one warp with mma.m16n8k16, for every device from compute capability 8.0 on.

#if HALF
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif

__device__ __forceinline__ void multiply_step(float* d, const u32 (&a)[4], u32 b0, u32 b1, bool fresh) {
    const float c0 = fresh ? 0.0f : d[0], c1 = fresh ? 0.0f : d[1], c2 = fresh ? 0.0f : d[2], c3 = fresh ? 0.0f : d[3];
    asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
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
            if (last) scale_sums(sums[tile], part, ROW_TILES * 4, scale);
        }
    }
}

__device__ __forceinline__ void run(const Args& args, const Place& at, int begin, int end, u64 policy,
                                    const int (&source)[PIECES], const u32 (&fixed)[TILES][2],
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
