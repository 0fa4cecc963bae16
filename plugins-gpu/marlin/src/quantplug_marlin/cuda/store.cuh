// What becomes of the sums of a linear layer.

#define TOGETHER 1

__device__ __forceinline__ int item_of(int item, int) { return item; }

__device__ __forceinline__ void store(const Args& args, int row, int output, float value) {
    if (row >= args.rows || output >= args.outputs) return;
#if SHARES == 1 && !ROWS
    if (args.shares != nullptr) {
        args.shares[((size_t)blockIdx.z * args.rows + row) * args.outputs + output] = value;
        return;
    }
#endif
#if ROWS
    if (args.factor != nullptr) value *= args.factor[output * args.factor_step];
#else
    if (args.factor != nullptr) value *= args.factor[output];
#endif
    if (args.bias != nullptr) value += to_float(args.bias[output], HALF);
    args.y[(size_t)row * args.outputs + output] = from_float(value, HALF);
}

__device__ __forceinline__ void store_item(const Args& args, const Place& at, int item, const float4 (&sum)[1]) {
    const int output = (at.tile + item / ROW_TILES) * 16 + (at.lane >> 2);
    const int row = at.row + item % ROW_TILES * 8 + (at.lane & 3) * 2;
    store(args, row, output, sum[0].x);
    store(args, row + 1, output, sum[0].y);
    store(args, row, output + 8, sum[0].z);
    store(args, row + 1, output + 8, sum[0].w);
}
