// x [M, K] in float8_e4m3fn, a scale per row, its rows in the order of experts that route.cu makes: codes [places, width],
// zeros behind K. What empty places hold, nobody reads on.
//
// Set by the host: what encode.cuh names, HALF (x is float16, else bfloat16).

#include "words.cuh"
#include "memory.cuh"
#include "encode.cuh"

struct Args {
    const u16* x;
    u8* codes;
    float* scales;
    const int* order;  // which choice each place is for, or -1
    const int* used;   // blocks that have rows
    long long row_stride, column_stride;  // of x, in elements
    int inputs, width, rows, top_k;       // rows: of a block
};

// Eight numbers of a row, zeros behind its end; `whole` rows are read 16 bytes at a time.
__device__ __forceinline__ uint4 read_words(const Args& args, const u16* row, int input, bool whole) {
    if (whole && input + 8 <= args.inputs) return *(const uint4*)(row + input);
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = input + 2 * i;
        const u32 first = at < args.inputs ? row[at * args.column_stride] : 0;
        const u32 second = at + 1 < args.inputs ? row[(at + 1) * args.column_stride] : 0;
        words[i] = first | second << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize(const __grid_constant__ Args args) {
    __shared__ float shares[2][THREADS / 32];
    wait_for_earlier_kernels();
    let_later_kernels_start();
    const bool whole = args.column_stride == 1 && args.row_stride % 8 == 0 && ((u64)args.x & 15) == 0;
    const int places = *args.used * args.rows, first = threadIdx.x * 8;
    int side = 0;
    for (int place = blockIdx.x; place < places; place += gridDim.x) {
        const int choice = args.order[place];
        if (choice < 0) continue;
        const u16* const row = args.x + choice / args.top_k * args.row_stride;
        uint4 held[TURNS];
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) held[turn] = read_words(args, row, first + turn * TURN, whole);
        float largest = 0.0f;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) largest = fmaxf(largest, largest_of(unpack(held[turn])));
        const float scale = scale_for(share_largest(largest, shares[side ^= 1])), inverse = __fdiv_rn(1.0f, scale);
        if (threadIdx.x == 0) args.scales[place] = scale;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            const int input = first + turn * TURN;
            if (input < args.width) *(uint2*)(args.codes + (size_t)place * args.width + input) = encode(unpack(held[turn]), inverse);
        }
    }
}
