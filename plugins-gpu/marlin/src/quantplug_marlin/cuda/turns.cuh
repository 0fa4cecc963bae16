// What the warpgroups of float8.cu do: products of one part while they add another.

// Rows of 128 bytes follow each other, eight to a kilobyte, and their 16-byte pieces have changed places.
__device__ __forceinline__ u64 describe(u32 from) {
    return (u64)((from & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void keep(float (&part)[SUMS]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(part[i])::"memory");
}

// What is under way of a piece: both parts, the slot of the older one and that of the newer one.
struct Turns {
    float part[2][SUMS];
    Slot slot, next;
};

// Begin the products of a part: 64 rows of x times COLUMNS outputs and 128 inputs.
__device__ __forceinline__ void begin(const Place& at, const Slot& slot, int half, float (&part)[SUMS]) {
    const u32 from = stage_at(at, slot);
    const u64 x = describe(from + at.group * 64 * 128), codes = describe(from + X_BYTES + half * COLUMNS * 128);
    keep(part);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < 4; ++step) multiply_step(part, x + step * 2, codes + step * 2, step > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void begin_stage(const Place& at, Turns& turns, int which) {
    wait_barrier(at.full + turns.next.index * 8, turns.next.phase);
    begin(at, turns.next, 0, turns.part[which]);
}

__device__ __forceinline__ void release(const Place& at, const Slot& slot) {
    if (at.lane == 0) arrive_barrier(at.empty + slot.index * 8);
}

__device__ __forceinline__ void add_part(float (&sums)[PARTS][SUMS], int which, float (&part)[SUMS]) {
    float(&to)[SUMS] = sums[PARTS == 2 ? which : 0];
    keep(part);
#pragma unroll
    for (int i = 0; i < SUMS; ++i) to[i] += part[i];
    keep(to);
}

// Begin the other part than `which`, and add this one while the tensor cores work on that.
__device__ __forceinline__ void take_turns(const Place& at, Turns& turns, int which, float (&sums)[PARTS][SUMS]) {
    const bool same_stage = PARTS == 2 && which == 0;
    if (same_stage) {
        begin(at, turns.slot, 1, turns.part[1]);
    } else {
        advance(turns.next);
        begin_stage(at, turns, which ^ 1);
    }
    wait_products<1>();
    if (!same_stage) release(at, turns.slot);
    add_part(sums, which, turns.part[which]);
    turns.slot = turns.next;
}

__device__ __forceinline__ void end_turns(const Place& at, Turns& turns, int which, float (&sums)[PARTS][SUMS]) {
    wait_products<0>();
    release(at, turns.slot);
    add_part(sums, which, turns.part[which]);
}

// Add up a piece, whose first stage is in a slot; leaves the slot behind its last.
__device__ __forceinline__ void consume(const Args& args, const Place& at, Slot& slot, float (&sums)[PARTS][SUMS]) {
    const int parts = args.stages * PARTS;
    Turns turns;
    turns.slot = turns.next = slot;
    begin_stage(at, turns, 0);
    int turn = 1;
#pragma unroll 1
    for (; turn + 1 < parts; turn += 2) {
        take_turns(at, turns, 0, sums);
        take_turns(at, turns, 1, sums);
    }
    // Two halves are an even number, but ptxas, told so, has every product wait for the one before.
    if (turn < parts) {
        take_turns(at, turns, 0, sums);
        end_turns(at, turns, 1, sums);
    } else {
        end_turns(at, turns, 0, sums);
    }
    slot = turns.slot;
    advance(slot);
}
