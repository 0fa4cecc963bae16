// The product of 16 outputs, 16 inputs and eight rows of x with mma.m16n8k16, for every device from compute capability 8.0 on.

#if HALF
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif

__device__ __forceinline__ void multiply_step(float* d, const u32 (&a)[4], u32 b0, u32 b1, bool fresh) {
    const float c0 = fresh ? 0.0f : d[0], c1 = fresh ? 0.0f : d[1], c2 = fresh ? 0.0f : d[2], c3 = fresh ? 0.0f : d[3];
    asm volatile(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

// Add products of all rows of x, `upper` times those of outputs g and `lower` times those of outputs g + 8.
__device__ __forceinline__ void scale_sums(float (&sums)[ROW_TILES * 4], const float (&part)[ROW_TILES * 4], float upper, float lower) {
#pragma unroll
    for (int i = 0; i < ROW_TILES * 4; i += 4) {
        sums[i] = fmaf(part[i], upper, sums[i]);
        sums[i + 1] = fmaf(part[i + 1], upper, sums[i + 1]);
        sums[i + 2] = fmaf(part[i + 2], lower, sums[i + 2]);
        sums[i + 3] = fmaf(part[i + 3], lower, sums[i + 3]);
    }
}
