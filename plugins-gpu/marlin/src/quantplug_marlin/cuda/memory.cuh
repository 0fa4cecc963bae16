// Copies into shared memory, barriers and what a cluster shares.

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// 16 bytes that are read once: past L1, and the first to be evicted from L2.
__device__ __forceinline__ void copy_stream(u32 to, const void* from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy));
}

// The same, of which only the first `bytes` are read; the rest is filled with zeros.
__device__ __forceinline__ void copy_stream(u32 to, const void* from, u32 bytes, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(bytes), "l"(policy));
}

// Four bytes.
__device__ __forceinline__ void copy_word(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

// 16 bytes, of which only the first `bytes` are read; the rest is filled with zeros.
__device__ __forceinline__ void copy_filled(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

template <typename T>
__device__ __forceinline__ T load_shared(u32 from) {
    T value;
    if constexpr (sizeof(T) == 16) {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(((u32*)&value)[0]), "=r"(((u32*)&value)[1]), "=r"(((u32*)&value)[2]), "=r"(((u32*)&value)[3])
                     : "r"(from));
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(((u32*)&value)[0]), "=r"(((u32*)&value)[1]) : "r"(from));
    } else if constexpr (sizeof(T) == 4) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(*(u32*)&value) : "r"(from));
    } else if constexpr (sizeof(T) == 2) {
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(*(u16*)&value) : "r"(from));
    } else {
        u32 wide;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(wide) : "r"(from));
        value = (T)wide;
    }
    return value;
}

__device__ __forceinline__ void store_shared(u32 to, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

// The kernel before this one has finished, and what it wrote can be read. Nothing to wait for unless the launch allows
// the two to overlap.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_later_kernels_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
