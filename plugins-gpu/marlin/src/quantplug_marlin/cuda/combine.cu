// y [M, H] from what each chosen expert gives [M * T, H]: added up in float32, in the order of choices.
//
// Set by the host: HALF and the rest of what codes.cuh names.

#include "codes.cuh"
#include "memory.cuh"

struct Args {
    const u16* outputs;
    const float* weights;  // or null: 1
    const int* local;      // the expert of each choice here, -1 for none
    u16* y;
    int rows, hidden, top_k;
};

extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ Args args) {
    wait_for_earlier_kernels();
    const int column = blockIdx.x * 256 + threadIdx.x;
    if (column >= args.hidden) return;
    for (int row = blockIdx.y; row < args.rows; row += gridDim.y) {
        float sum = 0.0f;
        for (int turn = 0; turn < args.top_k; ++turn) {
            const int choice = row * args.top_k + turn;
            if (args.local[choice] < 0) continue;
            const float value = to_float(args.outputs[(size_t)choice * args.hidden + column], HALF);
            sum = args.weights != nullptr ? fmaf(args.weights[choice], value, sum) : sum + value;
        }
        args.y[(size_t)row * args.hidden + column] = from_float(sum, HALF);
    }
}
