// What becomes of the sums of an expert's products: f of the first, in the order of places; the second, in that of choices.
//
// Set by the host: EXPERTS (1 or 2), GATED (whether there are gate and up), and what functions.cuh names.

#define TOGETHER (PAIRED ? 2 : 1)

// The piece of gate (0) or up (1) that belongs to a piece of both.
__device__ __forceinline__ int item_of(int item, int one) {
    return PAIRED ? (item / ROW_TILES * 2 + one) * ROW_TILES + item % ROW_TILES : item;
}

#include "functions.cuh"

// A sum, scaled, weighted and with its bias; `output` counts the rows of gate and up together.
__device__ __forceinline__ float complete(const Args& args, const Place& at, int choice, int output, float sum) {
    const size_t place = (size_t)at.expert * args.outputs * (PAIRED ? 2 : 1) + output;
    if (args.factor != nullptr) sum *= args.factor[place];
    if (EXPERTS == 1 && args.weights != nullptr) sum *= args.weights[choice];
    return args.bias != nullptr ? sum + to_float(args.bias[place], HALF) : sum;
}

__device__ __forceinline__ void store(const Args& args, const Place& at, int place, int output, float first, float second) {
    const int choice = args.order[place];
    if (choice < 0 || output >= args.y_stride) return;
    float value = 0.0f;  // what fills rows of the first product up
    if (output < args.outputs) {
        value = complete(args, at, choice, output, first);
#if PAIRED
        value = between(args, value, complete(args, at, choice, args.outputs + output, second));
#elif EXPERTS == 1
        value = named(value, args.alpha);
#endif
    }
    args.y[(size_t)(EXPERTS == 1 ? place : choice) * args.y_stride + output] = from_float(value, HALF);
}

__device__ __forceinline__ void store_item(const Args& args, const Place& at, int item, const float4 (&sum)[TOGETHER]) {
    const int output = (at.tile + item / ROW_TILES) * 16 + (at.lane >> 2);
    const int place = at.row + item % ROW_TILES * 8 + (at.lane & 3) * 2;
    const float4 first = sum[0], second = sum[TOGETHER - 1];
    store(args, at, place, output, first.x, second.x);
    store(args, at, place + 1, output, first.y, second.y);
    store(args, at, place, output + 8, first.z, second.z);
    store(args, at, place + 1, output + 8, first.w, second.w);
}
