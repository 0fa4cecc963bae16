// y [M, N] from the shares of it [SHARES, M, N] that blocks have computed, always added in the same order.
//
// Set by the host: HALF and the rest of what codes.cuh names.

#include "codes.cuh"

struct Args {
    const float* shares;
    const float* factor;
    const u16* bias;
    u16* y;
    int count, rows, outputs;
};

extern "C" __global__ void __launch_bounds__(256) add_shares(const __grid_constant__ Args args) {
    const int output = blockIdx.x * 256 + threadIdx.x;
    if (output >= args.outputs) return;
    const float factor = args.factor != nullptr ? args.factor[output] : 1.0f;
    const float bias = args.bias != nullptr ? to_float(args.bias[output], HALF) : 0.0f;
    const size_t size = (size_t)args.rows * args.outputs;
    for (int row = blockIdx.y; row < args.rows; row += gridDim.y) {
        const size_t place = (size_t)row * args.outputs + output;
        float sum = 0.0f;
        for (int share = 0; share < args.count; ++share) sum += args.shares[share * size + place];
        args.y[place] = from_float(sum * factor + bias, HALF);
    }
}
