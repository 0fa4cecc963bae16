// What enters the second product of a mixture, in float8_e4m3fn with a scale per row: f of the first, which is computed in
// float32 out of 16-bit numbers; codes [places, width], zeros behind the last.
//
// Set by the host: what encode.cuh names, GATED (whether there are gate and up), HALF, and what functions.cuh names.

#include "words.cuh"
#include "memory.cuh"
#include "encode.cuh"

struct Args {
    const u16* product;  // [places, stride]; up behind `filled` numbers of gate
    u8* codes;
    float* scales;
    const int* order;  // which choice each place is for, or -1
    const int* used;   // blocks that have rows
    int inputs, width, rows, stride, filled;  // rows: of a block; stride and filled: multiples of 8
    float limit, alpha, up_offset;
};

#include "functions.cuh"

// Eight neighbours of gate, or of all there is, and of up.
struct Words {
    uint4 gate, up;
};

__device__ __forceinline__ Words read_words(const Args& args, const u16* row, int input) {
    Words words = {};
    if (input < args.inputs) {
        words.gate = *(const uint4*)(row + input);
        if (GATED) words.up = *(const uint4*)(row + args.filled + input);
    }
    return words;
}

// f of them, zeros behind the last.
__device__ __forceinline__ Eight between_eight(const Args& args, const Words& words, int input) {
    Eight eight;
    const Eight gate = unpack(words.gate);
#if GATED
    const Eight up = unpack(words.up);
#endif
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#if GATED
        const float value = between(args, gate.value[i], up.value[i]);
#else
        const float value = named(gate.value[i], args.alpha);
#endif
        eight.value[i] = input + i < args.inputs ? value : 0.0f;
    }
    return eight;
}

extern "C" __global__ void __launch_bounds__(THREADS) between_products(const __grid_constant__ Args args) {
    __shared__ float shares[2][THREADS / 32];
    wait_for_earlier_kernels();
    let_later_kernels_start();
    const int places = *args.used * args.rows, first = threadIdx.x * 8;
    int side = 0;
    for (int place = blockIdx.x; place < places; place += gridDim.x) {
        if (args.order[place] < 0) continue;
        const u16* const row = args.product + (size_t)place * args.stride;
        Words words[TURNS];
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) words[turn] = read_words(args, row, first + turn * TURN);
        Eight held[TURNS];
        float largest = 0.0f;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            held[turn] = between_eight(args, words[turn], first + turn * TURN);
            largest = fmaxf(largest, largest_of(held[turn]));
        }
        const float scale = scale_for(share_largest(largest, shares[side ^= 1])), inverse = __fdiv_rn(1.0f, scale);
        if (threadIdx.x == 0) args.scales[place] = scale;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int input = first + turn * TURN;
            if (input < args.width) *(uint2*)(args.codes + (size_t)place * args.width + input) = encode(held[turn], inverse);
        }
    }
}
