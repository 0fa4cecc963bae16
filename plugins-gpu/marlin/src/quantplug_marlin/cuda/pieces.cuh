// Which pieces of y a block of float8.cu takes, and what it has copied for them, stage by stage.

// A piece of y.
struct Work {
    int row, output, expert;
};

struct Place {
    int lane, group, row;  // of those that multiply: which warpgroup, and the first of a warp's rows in a piece
    u32 ring, full, empty, scales;
};

// A slot of the ring.
struct Slot {
    int index;
    u32 phase;
};

__device__ __forceinline__ void advance(Slot& slot) {
    if (++slot.index == DEPTH) slot.index = 0, slot.phase ^= 1;
}

__device__ __forceinline__ u32 stage_at(const Place& at, const Slot& slot) { return at.ring + slot.index * STAGE_BYTES; }

// Scales of the rows of a piece, and those of its outputs behind them.
__device__ __forceinline__ u32 scales_at(const Place& at, int piece) { return at.scales + piece % (DEPTH + 1) * PIECE_SCALES; }

__device__ __forceinline__ int pieces_across(const Args& args) { return (args.outputs + WIDE - 1) / WIDE; }

__device__ __forceinline__ Work work_at(const Args& args, int index, int down) {
    const int across = pieces_across(args), first = index / (across * TOGETHER) * TOGETHER;
    const int height = min(TOGETHER, down - first), within = index - first * across, block = first + within % height;
    return {block * ROWS, within / height * WIDE, args.experts[block]};
}

__device__ __forceinline__ void produce(const Args& args, const Place& at) {
    const int down = *args.used, pieces = pieces_across(args) * down;
    Slot slot = {0, 1};
    int piece = 0;
#pragma unroll 1
    for (int index = blockIdx.x; index < pieces; index += gridDim.x, ++piece) {
        const Work work = work_at(args, index, down);
        const int first = work.expert * args.filled + work.output;  // row of the weights
        const u32 output_bytes = min(WIDE, args.filled - work.output) * 4;
#pragma unroll 1
        for (int stage = 0; stage < args.stages; ++stage, advance(slot)) {
            const u32 to = stage_at(at, slot), full = at.full + slot.index * 8;
            wait_barrier(at.empty + slot.index * 8, slot.phase);
            expect_bytes(full, STAGE_BYTES + (stage == 0 ? ROW_SCALES + output_bytes : 0));
            copy_box(to, &args.x, stage * 128, work.row, full);
            copy_box(to + X_BYTES, &args.codes, stage * 128, first, full);
            if (stage == 0) {
                copy_bytes(scales_at(at, piece), args.x_scales + work.row, ROW_SCALES, full);
                copy_bytes(scales_at(at, piece) + ROW_SCALES, args.scales + first, output_bytes, full);
            }
        }
    }
}
