// From stored codes to operands of a matrix product: exact, eight codes a lane at a time.
//
// Set by the host: BITS (4 or 8: width of a stored code), FLOATING (floating-point codes or integers), HALF (operands are
// float16, else bfloat16), ZEROS (there are zero points), MIDDLE (what is subtracted where there are none), and for
// floating-point codes SHIFT (from the place of a code in the upper bits of 16 to that of the operand) and FACTOR_BITS
// (the operand type's bits of the power of two that corrects the exponent, 0 for 1).
//
// A unit is 16 outputs x 64 inputs, four steps of 16 inputs each. Of a step, lane 4 g + q holds what mma.m16n8k16 takes as
// its first operand: a[0] = output g, inputs 2q and 2q + 1; a[1] the same of output g + 8; a[2] and a[3] the inputs eight on.

#include "words.cuh"

#define UNIT_BYTES (128 * BITS)
#define STEP_WORDS (BITS / 4)

#if HALF
#define ONE 0x3C003C00u
#define MINUS_ONE 0xBC00BC00u
#define LIFT 0x64006400u /* 1024: a code in the low bits is added to it */
#else
#define ONE 0x3F803F80u
#define MINUS_ONE 0xBF80BF80u
#define LIFT 0x43004300u /* 128 */
#endif
#define MINUS_ZERO 0x80008000u
#define SIGN 0x80008000u

__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn." PAIR " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// What is added to lifted codes of a row: minus the zero point, and minus what lifted them; twice, for a pair.
__device__ __forceinline__ u32 negated_zero(u32 zero) {
#if BITS == 8 && !HALF
    // A bfloat16 has no room to lift eight bits: codes come as signed ones, and so does the zero point.
    u32 pair;
    const float value = 128.0f - (float)zero;
    asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
    return pair;
#else
    return (LIFT | SIGN) | (zero * 0x00010001u);
#endif
}

// Pick the bits of `mask` out of a word, and add those of `others`, of which it has none: one instruction.
__device__ __forceinline__ u32 pick(u32 word, u32 mask, u32 others) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(others));
    return result;
}

// One word of codes of rows g and g + 8 out of two tiles' words: rows g of both, or rows g + 8 of both (half 1).
__device__ __forceinline__ u32 join_halves(u32 one, u32 other, int half) {
#if BITS == 8
    return __byte_perm(one, other, half ? 0x7351 : 0x6240);
#else
    return (one >> (4 * half) & 0x0F0F0F0Fu) | (other >> (4 * half) & 0x0F0F0F0Fu) << 4;
#endif
}

#if FLOATING
// The bits of operand i of a step: the value of its codes but for a power of two.
__device__ __forceinline__ u32 place_code(const u32* words, int i) {
    const u32 code = BITS == 8 ? words[i >> 1] << (i & 1 ? 0 : 8) : words[0] << (12 - 4 * i);
    return pick(code, SIGN, (code & (BITS == 8 ? 0x7F007F00u : 0x70007000u)) >> SHIFT);
}

// Two codes of a word, each a byte, the lower or the upper two.
__device__ __forceinline__ u32 decode_pair(u32 word, bool upper) {
    const u32 code = __byte_perm(word, 0, upper ? 0x3424 : 0x1404);
    const u32 bits = pick(code, SIGN, (code & 0x7F007F00u) >> SHIFT);
    return FACTOR_BITS ? multiply_add(bits, FACTOR_BITS * 0x00010001u, MINUS_ZERO) : bits;
}

// Decode one step, and multiply outputs g and g + 8 with powers of two, or what else leaves the product exact.
__device__ __forceinline__ void decode_scaled(const u32* words, u32 upper, u32 lower, u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = multiply_add(place_code(words, i), i & 1 ? lower : upper, MINUS_ZERO);
}
#endif

// Decode one step. `upper` and `lower` are the negated zeros of outputs g and g + 8 (integers only).
__device__ __forceinline__ void decode(const u32* words, u32 upper, u32 lower, u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if FLOATING
        const u32 bits = place_code(words, i);
        a[i] = FACTOR_BITS ? multiply_add(bits, FACTOR_BITS * 0x00010001u, MINUS_ZERO) : bits;
#else
        const u32 zero = i & 1 ? lower : upper;
        const u32 code = BITS == 8 ? words[i >> 1] >> (i & 1 ? 8 : 0) : words[0] >> (4 * i);
#if BITS == 4
        a[i] = multiply_add(pick(code, 0x000F000Fu, LIFT), ONE, zero);
#elif HALF
        a[i] = multiply_add(pick(code ^ 0x00800080u, 0x00FF00FFu, LIFT), ONE, zero);
#else
        const u32 magnitude = pick(code, 0x007F007Fu, LIFT), sign = pick(code, 0x00800080u, LIFT);
        a[i] = multiply_add(sign, MINUS_ONE, magnitude);
#if ZEROS
        a[i] = multiply_add(a[i], ONE, zero);
#endif
#endif
#endif
    }
}
