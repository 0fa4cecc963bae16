// Which places each expert gets: its choices one after the other, filled up to a multiple of a block's rows. One block of
// threads; choices come in any order within an expert, which no result depends on.

#define THREADS 1024
#define MOST_EXPERTS 2048

struct Args {
    const void* ids;
    const int* map;  // local numbers of experts, or null
    int* order;      // [blocks * rows]
    int* experts;    // [blocks]
    int* local;      // [choices] the expert of each here, -1 for none
    int* used;       // how many blocks have rows
    int choices, count, global_count, rows, blocks, wide;
};

__device__ __forceinline__ int expert_of(const Args& args, int choice) {
    const long long id = args.wide ? ((const long long*)args.ids)[choice] : ((const int*)args.ids)[choice];
    if (args.map == nullptr) return id >= 0 && id < args.count ? (int)id : -1;
    const int found = id >= 0 && id < args.global_count ? args.map[id] : -1;
    return found >= 0 && found < args.count ? found : -1;
}

extern "C" __global__ void __launch_bounds__(THREADS) route(const __grid_constant__ Args args) {
    __shared__ int counts[MOST_EXPERTS], ends[MOST_EXPERTS], sums[THREADS];
    const int thread = threadIdx.x;
    for (int expert = thread; expert < MOST_EXPERTS; expert += THREADS) counts[expert] = 0;
    for (int place = thread; place < args.blocks * args.rows; place += THREADS) args.order[place] = -1;
    for (int block = thread; block < args.blocks; block += THREADS) args.experts[block] = -1;
    __syncthreads();
    for (int choice = thread; choice < args.choices; choice += THREADS) {
        const int expert = expert_of(args, choice);
        args.local[choice] = expert;
        if (expert >= 0) atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    // Each thread has two neighbouring experts; blocks of all before them are added up.
    const int first = (counts[2 * thread] + args.rows - 1) / args.rows;
    const int second = (counts[2 * thread + 1] + args.rows - 1) / args.rows;
    sums[thread] = first + second;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {
        const int before = thread >= step ? sums[thread - step] : 0;
        __syncthreads();
        sums[thread] += before;
        __syncthreads();
    }
    if (thread == THREADS - 1) *args.used = sums[thread];
    const int begin = sums[thread] - first - second;
    for (int block = 0; block < first; ++block) args.experts[begin + block] = 2 * thread;
    for (int block = 0; block < second; ++block) args.experts[begin + first + block] = 2 * thread + 1;
    ends[2 * thread] = begin * args.rows;
    ends[2 * thread + 1] = (begin + first) * args.rows;
    __syncthreads();
    for (int choice = thread; choice < args.choices; choice += THREADS) {
        const int expert = args.local[choice];
        if (expert >= 0) args.order[atomicAdd(&ends[expert], 1)] = choice;
    }
}
