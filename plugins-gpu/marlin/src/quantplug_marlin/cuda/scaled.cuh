// What becomes of the sums of float8.cu: scaled, rounded, and stored by whole lines.

__device__ __forceinline__ u32 pack(float first, float second) {
    u32 pair;
    asm("cvt.rn." PAIR ".f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ float bias_of(const Args& args, const Work& work, int column) {
    if (args.bias == nullptr) return 0.0f;
    const int each = args.filled / args.projections, output = work.output + column, projection = output / each, within = output % each;
    if (projection >= args.projections || within >= args.size) return 0.0f;
    return to_float(args.bias[((size_t)work.expert * args.projections + projection) * args.size + within], HALF);
}

// Store eight numbers of the row of y that is for a choice, as far as they are inside.
__device__ __forceinline__ void store_eight(const Args& args, int row, int choice, int output, const uint4& eight) {
    if (choice < 0 || output >= args.outputs) return;
    u16* const to = args.y + (size_t)(PRODUCT == 1 ? row : choice) * args.stride + output;
    if (args.stride % 8 == 0 && output + 8 <= args.outputs) {
        *(uint4*)to = eight;
        return;
    }
    const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (output + i < args.outputs) to[i] = (u16)(words[i / 2] >> (i % 2 * 16));
}

// Store a warp's 16 rows, 64 outputs at a time turned round in shared memory, so that whole lines are written. `scales`: where
// those of the piece lie; `buffer`: the warp's own 2 kB.
__device__ __forceinline__ void finish(const Args& args, const Place& at, const Work& work, const float (&sums)[PARTS][SUMS], u32 scales, u32 buffer) {
    const int first_row = work.row + at.row, g = at.lane >> 2, q = at.lane & 3;
    float row_scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        row_scale[half] = load_shared<float>(scales + (at.row + g + half * 8) * 4);
        if (args.weights != nullptr) {
            const int choice = args.order[first_row + g + half * 8];
            row_scale[half] *= choice < 0 ? 0.0f : args.weights[choice];
        }
    }
    int choices[4];
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) choices[turn] = args.order[first_row + turn * 4 + (at.lane >> 3)];
#pragma unroll
    for (int first = 0; first < WIDE; first += 64) {
        const int pieces = min(4, (WIDE - first) / 16);
        __syncwarp();
#pragma unroll
        for (int piece = 0; piece < pieces; ++piece) {
            u32 pairs[4];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int begins = first + piece * 16 + side * 8, column = begins + q * 2;
                const float* const four = &sums[begins / COLUMNS][begins % COLUMNS / 2];
                const float2 scale = load_shared<float2>(scales + ROW_SCALES + column * 4);
                const float bias[2] = {bias_of(args, work, column), bias_of(args, work, column + 1)};
                pairs[side * 2] = pack(fmaf(four[0], scale.x * row_scale[0], bias[0]), fmaf(four[1], scale.y * row_scale[0], bias[1]));
                pairs[side * 2 + 1] = pack(fmaf(four[2], scale.x * row_scale[1], bias[0]), fmaf(four[3], scale.y * row_scale[1], bias[1]));
            }
            // Rows of 128 bytes, whose pieces of 16 change places so that eight rows lie in different banks.
            const int row = at.lane & 15, column = piece * 2 + (at.lane >> 4);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(buffer + row * 128 + ((column ^ (row & 7)) << 4)),
                         "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                         : "memory");
        }
        __syncwarp();
#pragma unroll
        for (int turn = 0; turn < 4; ++turn) {
            const int row = turn * 4 + (at.lane >> 3), column = at.lane & 7;
            const uint4 eight = load_shared<uint4>(buffer + row * 128 + ((column ^ (row & 7)) << 4));
            if (column < pieces * 2) store_eight(args, first_row + row, choices[turn], work.output + first + column * 8, eight);
        }
    }
}
