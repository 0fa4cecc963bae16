// x [M, S] in the order of slots, from an x [M, K] of any strides: slot s takes input columns[s], or 0 where that is -1.

typedef unsigned short u16;

struct Args {
    const u16* x;
    const int* columns;  // or null: slot s takes input s
    u16* y;
    long long row_stride, column_stride;  // of x, in elements
    int rows, inputs, slots;
};

extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ Args args) {
    const int slot = blockIdx.x * 256 + threadIdx.x;
    if (slot >= args.slots) return;
    const int input = args.columns != nullptr ? args.columns[slot] : slot < args.inputs ? slot : -1;
    for (int row = blockIdx.y; row < args.rows; row += gridDim.y)
        args.y[(size_t)row * args.slots + slot] =
            input < 0 ? (u16)0 : args.x[row * args.row_stride + input * args.column_stride];
}
