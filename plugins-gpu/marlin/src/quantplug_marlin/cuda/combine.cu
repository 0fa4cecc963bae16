// y [M, H] from what each chosen expert gives [M * T, H]: added up in float32, in the order of choices.
//
// Set by the host: HALF (numbers are float16, else bfloat16).

#include "words.cuh"
#include "memory.cuh"

struct Args {
    const u16* outputs;
    const float* weights;  // or null: 1
    const int* local;      // the expert of each choice here, -1 for none
    u16* y;
    int rows, hidden, top_k;
};

// Add what the experts of a row give for COUNT columns from one on: eight, or one where rows are no multiple of that.
template <int COUNT>
__device__ __forceinline__ void combine_row(const Args& args, int row, int column) {
    float sums[COUNT] = {};
    for (int turn = 0; turn < args.top_k; ++turn) {
        const int choice = row * args.top_k + turn;
        if (args.local[choice] < 0) continue;
        const u16* const from = args.outputs + (size_t)choice * args.hidden + column;
        const float weight = args.weights != nullptr ? args.weights[choice] : 1.0f;
        u32 words[4] = {*from};
        if constexpr (COUNT == 8) {
            const uint4 four = *(const uint4*)from;
            words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] = fmaf(weight, to_float((u16)(words[i / 2] >> (i % 2 * 16)), HALF), sums[i]);
    }
    u16* const to = args.y + (size_t)row * args.hidden + column;
    if constexpr (COUNT == 8) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = from_float(sums[i * 2], HALF) | (u32)from_float(sums[i * 2 + 1], HALF) << 16;
        *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
        *to = from_float(sums[0], HALF);
    }
}

extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ Args args) {
    wait_for_earlier_kernels();
    const bool eight = args.hidden % 8 == 0;
    const int column = (blockIdx.x * 256 + threadIdx.x) * (eight ? 8 : 1);
    if (column >= args.hidden) return;
    for (int row = blockIdx.y; row < args.rows; row += gridDim.y) {
        if (eight) combine_row<8>(args, row, column);
        else combine_row<1>(args, row, column);
    }
}
