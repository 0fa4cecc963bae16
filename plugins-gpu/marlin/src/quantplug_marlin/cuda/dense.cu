// The values of a weight [R, K], computed in float32 and rounded once. A warp takes one unit of 16 outputs x 64 inputs.
//
// Set by the host, beside what codes.cuh names: SUBS, PER_GROUP, SCALE_BYTES, SCALE_HALF as for multiply.cu, and OUT (what
// is written: 0 bfloat16, 1 float16, 2 float32).

#include "codes.cuh"

#define WARPS 8
#define OUT_BYTES (OUT == 2 ? 4 : 2)
#define ROW_BYTES (64 * OUT_BYTES + 16) /* so that rows begin in other banks */

struct Args {
    const u8* codes;
    const u8* scales;
    const u8* zeros;
    const float* factor;
    const int* columns;
    u8* values;
    int outputs, inputs, tiles, chunks, groups;
};

__device__ __forceinline__ float scale_of(const Args& args, size_t group, int place) {
#if SUBS == 0
    return 1.0f;
#elif SCALE_BYTES == 4
    return ((const float*)args.scales)[group * 16 + place];
#else
    return to_float(((const u16*)args.scales)[group * 16 + place], SCALE_HALF);
#endif
}

__device__ __forceinline__ void put(u8* to, float value) {
    if (OUT == 2) {
        *(float*)to = value;
    } else {
        *(u16*)to = from_float(value, OUT == 1);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) dequantize(const __grid_constant__ Args args) {
    __shared__ __align__(16) u8 memory[WARPS][16 * ROW_BYTES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    const int chunk = blockIdx.x * WARPS + warp, tile = blockIdx.y;
    if (chunk >= args.chunks) return;
    u8* const rows = memory[warp];

    u32 words[4 * STEP_WORDS];
    const u8* from = args.codes + ((size_t)tile * args.chunks + chunk) * UNIT_BYTES + lane * 16;
#pragma unroll
    for (int part = 0; part < STEP_WORDS; ++part) {
        const uint4 four = *(const uint4*)(from + part * 512);
        words[part * 4] = four.x, words[part * 4 + 1] = four.y, words[part * 4 + 2] = four.z, words[part * 4 + 3] = four.w;
    }
    float factors[2] = {1.0f, 1.0f};
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
        const int output = tile * 16 + g + lower * 8;
        if (args.factor != nullptr && output < args.outputs) factors[lower] = args.factor[output];
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        size_t group = tile;
#if SUBS
        const int wanted = (chunk * SUBS + step * SUBS / 4) / PER_GROUP;
        group = (size_t)tile * args.groups + (wanted < args.groups ? wanted : args.groups - 1);
#endif
        u32 zero[2] = {LIFT | SIGN | MIDDLE * 0x00010001u, LIFT | SIGN | MIDDLE * 0x00010001u};
#if ZEROS
        zero[0] = negated_zero(args.zeros[group * 16 + g * 2]), zero[1] = negated_zero(args.zeros[group * 16 + g * 2 + 1]);
#endif
        u32 a[4];
        decode(words + step * STEP_WORDS, zero[0], zero[1], a);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int lower = i & 1, column = step * 16 + (i >> 1) * 8 + q * 2;
            const float scale = scale_of(args, group, g * 2 + lower);
            u8* to = rows + (g + lower * 8) * ROW_BYTES + column * OUT_BYTES;
            put(to, to_float((u16)a[i], HALF) * scale * factors[lower]);
            put(to + OUT_BYTES, to_float((u16)(a[i] >> 16), HALF) * scale * factors[lower]);
        }
    }
    __syncwarp();
    if (args.columns != nullptr || args.inputs % 8 != 0) {
        for (int place = lane; place < 16 * 64; place += 32) {
            const int row = place / 64, output = tile * 16 + row, slot = chunk * 64 + place % 64;
            const int input = args.columns != nullptr ? args.columns[slot] : slot < args.inputs ? slot : -1;
            if (output >= args.outputs || input < 0) continue;
            const u8* value = rows + row * ROW_BYTES + place % 64 * OUT_BYTES;
            u8* to = args.values + ((size_t)output * args.inputs + input) * OUT_BYTES;
            if (OUT == 2) {
                *(u32*)to = *(const u32*)value;
            } else {
                *(u16*)to = *(const u16*)value;
            }
        }
        return;
    }
    constexpr int PIECES = 64 * OUT_BYTES / 16;
    for (int piece = lane; piece < 16 * PIECES; piece += 32) {
        const int row = piece / PIECES, output = tile * 16 + row, input = chunk * 64 + piece % PIECES * (16 / OUT_BYTES);
        if (output < args.outputs && input < args.inputs)
            *(uint4*)(args.values + ((size_t)output * args.inputs + input) * OUT_BYTES) =
                *(const uint4*)(rows + row * ROW_BYTES + piece % PIECES * 16);
    }
}
