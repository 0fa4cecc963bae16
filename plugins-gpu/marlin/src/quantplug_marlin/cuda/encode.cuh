// Rows of numbers in float8_e4m3fn, with a scale in float32 each. A block of threads takes a row at a time, a thread eight
// neighbours.
//
// Set by the host: THREADS (of a block), TURNS (how often they take eight numbers each to take a row).

#define TURN (THREADS * 8) /* numbers */
#define TOP 448.0f         /* the largest code */
#define LEAST 1.17549435e-38f /* the smallest scale: the smallest normal number */

struct Eight {
    float value[8];
};

__device__ __forceinline__ Eight unpack(const uint4& four) {
    const u32 words[4] = {four.x, four.y, four.z, four.w};
    Eight eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) eight.value[i] = to_float((u16)(words[i / 2] >> (i % 2 * 16)), HALF);
    return eight;
}

__device__ __forceinline__ float largest_of(const Eight& eight) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(eight.value[i]));
    return largest;
}

// The largest that any thread has, for all of them; `shares` is none that the call before had.
__device__ __forceinline__ float share_largest(float largest, float (&shares)[THREADS / 32]) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, apart));
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) largest = fmaxf(largest, shares[warp]);
    return largest;
}

__device__ __forceinline__ float scale_for(float largest) { return fmaxf(largest * (1.0f / TOP), LEAST); }

// Codes of eight numbers times a factor: rounded to the nearest, those beyond the largest code become that, NaN stays NaN.
__device__ __forceinline__ uint2 encode(const Eight& eight, float factor) {
    u32 words[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        u16 pairs[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float first = eight.value[word * 4 + i * 2] * factor, second = eight.value[word * 4 + i * 2 + 1] * factor;
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pairs[i]) : "f"(second), "f"(first));
        }
        words[word] = pairs[0] | (u32)pairs[1] << 16;
    }
    return make_uint2(words[0], words[1]);
}
