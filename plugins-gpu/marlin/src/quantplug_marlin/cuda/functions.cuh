// The function between the products of a mixture.
//
// Set by the host: FUNCTION (0 silu, 1 gelu, 2 gelu_tanh, 3 relu, 4 relu2), LIMITED.

// NaN stays NaN in all of these: comparisons with it are false.
__device__ __forceinline__ float named(float z, float alpha) {
#if FUNCTION == 0
    return z / (1.0f + expf(-alpha * z));
#elif FUNCTION == 1
    return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
#elif FUNCTION == 2
    return 0.5f * z * (1.0f + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
#else
    const float positive = z < 0.0f ? 0.0f : z;
    return FUNCTION == 3 ? positive : positive * positive;
#endif
}

__device__ __forceinline__ float between(const Args& args, float gate, float up) {
#if LIMITED
    gate = gate > args.limit ? args.limit : gate;
    up = up > args.limit ? args.limit : up < -args.limit ? -args.limit : up;
#endif
    return named(gate, args.alpha) * (up + args.up_offset);
}
