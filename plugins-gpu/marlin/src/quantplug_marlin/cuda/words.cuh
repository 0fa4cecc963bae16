// Words, and numbers of 16 bits: float16 where HALF is set, else bfloat16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if HALF
#define PAIR "f16x2"
#else
#define PAIR "bf16x2"
#endif

__device__ __forceinline__ float to_float(u16 bits, bool half) {
    float value;
    if (half) {
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    } else {
        value = __uint_as_float((u32)bits << 16);
    }
    return value;
}

__device__ __forceinline__ u16 from_float(float value, bool half) {
    u16 bits;
    if (half) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    } else {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    }
    return bits;
}
