// Rows of x in the order of experts that route.cu makes, zeros at empty places, for what reads them through a tensor map.

#include "words.cuh"
#include "memory.cuh"

struct Args {
    const u8* x;
    u8* y;             // [blocks * rows, bytes]
    const int* order;  // which choice each place is for, or -1
    const int* used;   // blocks that have rows
    long long x_stride;  // bytes
    int bytes, rows, top_k;
};

extern "C" __global__ void __launch_bounds__(256) order_rows(const __grid_constant__ Args args) {
    wait_for_earlier_kernels();
    let_later_kernels_start();
    const int offset = (blockIdx.x * 256 + threadIdx.x) * 16, places = *args.used * args.rows;
    if (offset >= args.bytes) return;
    for (int place = blockIdx.y; place < places; place += gridDim.y) {
        const int choice = args.order[place];
        uint4 piece = make_uint4(0, 0, 0, 0);
        if (choice >= 0) piece = *(const uint4*)(args.x + choice / args.top_k * args.x_stride + offset);
        *(uint4*)(args.y + (size_t)place * args.bytes + offset) = piece;
    }
}
