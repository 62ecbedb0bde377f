/* The matrix product of few rows on Hopper:  out[m, n] = x[m] . weight[n]  (+ bias[n]), or the first half of a gated MLP:
   out[m, i] = F(x[m] . weight[i]) * (x[m] . weight[n + i]).  T = bf16 or fp16, F: Plain or an activation
   x [m <= TOKENS, k] T, rows any distance apart, weight [n, k] or [2 * n, k] T, as TensorMaps of boxes of 64 columns: the
   rows of x, ROWS rows of weight, or ROWS / 16 times 8 gates and their 8 ups; bias [n] Out or null, Plain only;
   out [m, n] Out; accumulates in float32. sm_90a only
   grid (parts, ceil(n / COLUMNS)), cluster (parts), block (288), dynamic shared memory: Stages<TOKENS>::SHARED_BYTES
   requires k % 8 == 0, n % 8 == 0, x's rows and all arrays aligned to 16 bytes, parts a power of two up to 8

       warpgroups 0, 1    multiply half of a tile's rows of weight each by all rows of x: weights take the side of a
                          warpgroup's product that has 64 rows, x the one that may be narrow
       warp 8             one thread copies weights and x DEPTH columns a step into the stages; weights depend on nobody,
                          so their first stages are under way while the kernels before still run
       cluster            its blocks share the columns of x and weight, then each sums up a share of the tile

   bound: memory, n * k * sizeof(T) bytes */
#include "common/activations.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/tensor_copies.cuh"

constexpr int GROUP_THREADS = 128, CONSUMER_WARPS = 8, CONSUMERS = CONSUMER_WARPS * WARP_SIZE, THREADS = CONSUMERS + WARP_SIZE;
constexpr int ROWS = 16 * CONSUMER_WARPS, DEPTH = PANEL_COLUMNS, WEIGHT_BYTES = ROWS * PANEL_ROW_BYTES;
constexpr int BLOCK_BYTES = 112 << 10;  // so that two blocks fit a multiprocessor

/* No activation: a warp's 16 rows of weight are 16 columns of out. With one, they are the gates and the ups of 8. */
struct Plain {};
template <typename F>
constexpr bool IS_GATED = true;
template <>
constexpr bool IS_GATED<Plain> = false;
template <typename F>
constexpr int WARP_COLUMNS = IS_GATED<F> ? 8 : 16;
template <typename F>
constexpr int COLUMNS = CONSUMER_WARPS * WARP_COLUMNS<F>;

template <int TOKENS>
struct Stages {
    static constexpr int BYTES = WEIGHT_BYTES + TOKENS * PANEL_ROW_BYTES;
    static constexpr int COUNT = BLOCK_BYTES / BYTES;
    static constexpr int SHARED_BYTES = COUNT * BYTES + 1024;  // to begin at a multiple of 1024
};

/* Barriers by shared address: a stage has been filled; it may be filled again; the cluster's sums have come. */
template <int COUNT>
struct Barriers {
    static constexpr int NUM = 2 * COUNT + 1;
    uint32 full, empty, sums;

    __device__ __forceinline__ Barriers(uint32 barriers)
        : full(barriers), empty(barriers + 8 * COUNT), sums(barriers + 16 * COUNT) {}

    __device__ __forceinline__ void initialize() const {
        for (int s = 0; s < COUNT; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMER_WARPS);
        }
        barrier_init(sums, 1);
        fence_barriers();
    }
    __device__ __forceinline__ uint32 full_barrier(int step) const { return full + 8 * (step % COUNT); }
    __device__ __forceinline__ void wait_full(int step) const { barrier_wait(full_barrier(step), step / COUNT % 2); }
    __device__ __forceinline__ void wait_empty(int step) const {
        barrier_wait(empty + 8 * (step % COUNT), step / COUNT % 2 ^ 1);
    }
    __device__ __forceinline__ void signal_empty(int step) const {
        if (threadIdx.x % WARP_SIZE == 0) barrier_arrive(empty + 8 * (step % COUNT));
    }
};

/* One thread's copies: of a tile's rows, and of the steps that are this block's part. */
template <int TOKENS, typename F>
struct Producer {
    using Stage = Stages<TOKENS>;
    const TensorMap &x, &weight;
    const Barriers<Stage::COUNT> barriers;
    const uint32 shared;
    const int first, num_steps;

    __device__ __forceinline__ void copy_weights(int step) const {
        const uint32 barrier = barriers.full_barrier(step), stage = shared + step % Stage::COUNT * Stage::BYTES;
        barrier_arrive_expecting(barrier, Stage::BYTES);
        if constexpr (IS_GATED<F>)
            copy_box(stage, weight, (first + step) * DEPTH, 0, 0, blockIdx.y * CONSUMER_WARPS, barrier);
        else
            copy_box(stage, weight, (first + step) * DEPTH, blockIdx.y * ROWS, barrier);
    }
    __device__ __forceinline__ void copy_x(int step) const {
        const uint32 stage = shared + step % Stage::COUNT * Stage::BYTES;
        copy_box(stage + WEIGHT_BYTES, x, (first + step) * DEPTH, 0, barriers.full_barrier(step));
    }
    __device__ __forceinline__ void refill(int step) const {
        barriers.wait_empty(step);
        copy_weights(step);
        copy_x(step);
    }
    __device__ __forceinline__ void copy_first_weights() const {
        for (int step = 0; step < min(num_steps, Stage::COUNT); ++step) copy_weights(step);
    }
    /* Lets the next kernel's blocks in when the last round begins: their first weights come while this one ends, which
       memory would have nothing to do in, and not before, when they would be in the way of this one's. */
    __device__ __forceinline__ void copy_rest() const {
        for (int step = 0; step < min(num_steps, Stage::COUNT); ++step) copy_x(step);
        const int last_round = max(num_steps - Stage::COUNT, Stage::COUNT);
        for (int step = Stage::COUNT; step < last_round; ++step) refill(step);
        release_successor();
        for (int step = last_round; step < num_steps; ++step) refill(step);
    }
};

template <int TOKENS>
using Sums = float[TOKENS / 8][4];

/* A warpgroup's rows of weight times x. */
template <typename T, int TOKENS>
__device__ __forceinline__ void multiply(Sums<TOKENS>& sums, int group, int num_steps, uint32 shared,
                                         const Barriers<Stages<TOKENS>::COUNT>& barriers) {
    for (int step = 0; step < num_steps; ++step) {
        const uint32 stage = shared + step % Stages<TOKENS>::COUNT * Stages<TOKENS>::BYTES;
        const uint64 a = operand(stage + group * (WEIGHT_BYTES / 2), 16), b = operand(stage + WEIGHT_BYTES, 16);
        barriers.wait_full(step);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < DEPTH / 16; ++i) wgmma<T>(sums, advanced(a, 32 * i), advanced(b, 32 * i), step > 0 || i > 0);
        wgmma_commit();
        wgmma_wait<0>();
        barriers.signal_empty(step);
    }
    pin(sums);
}

/* Writes 8 rows and columns of out from (token, column). The lane has columns lane / 4 of rows lane % 4 * 2 and the next. */
template <typename Out>
__device__ __forceinline__ void write_8x8(Out* out, float first, float second, int m, int n, int token, int column) {
    const int lane = threadIdx.x % WARP_SIZE;
    if constexpr (sizeof(Out) == 2) {
        const uint32 pair = transpose_8x8(pack<Out>(first, second));  // now row lane / 4, columns lane % 4 * 2 and the next
        token += lane / 4;
        if (token < m && column < n) *reinterpret_cast<uint32*>(out + (int64)token * n + column + lane % 4 * 2) = pair;
    } else {
        token += lane % 4 * 2;
        if (token < m && column < n) out[(int64)token * n + column + lane / 4] = first;
        if (token + 1 < m && column < n) out[(int64)(token + 1) * n + column + lane / 4] = second;
    }
}

/* Writes what a warp's 16 rows of weight and 8 rows of x make: one tile of its sums. */
template <typename F, typename Out>
__device__ __forceinline__ void write_tile(Out* out, const Out* bias, float4 sum, int m, int n, int token, int warp) {
    const int column = blockIdx.y * COLUMNS<F> + warp * WARP_COLUMNS<F>;
    if constexpr (IS_GATED<F>) {
        write_8x8(out, F::apply(sum.x) * sum.z, F::apply(sum.y) * sum.w, m, n, token, column);
    } else {
        const int mine = threadIdx.x % WARP_SIZE / 4;
        const float left = bias && column < n ? to_float(bias[column + mine]) : 0.0f;
        const float right = bias && column + 8 < n ? to_float(bias[column + 8 + mine]) : 0.0f;
        write_8x8(out, sum.x + left, sum.y + left, m, n, token, column);
        write_8x8(out, sum.z + right, sum.w + right, m, n, token, column + 8);
    }
}

/* The sums of a cluster: a block finishes the rows of 8 / parts warps, whose sums all blocks send to it, to where its
   stages were. Sums that are sent signal a barrier: fences would wait for the next kernel's weights. */
template <int TOKENS, typename F, typename Out>
__device__ __forceinline__ void share_sums(Out* out, const Out* bias, const Sums<TOKENS>& sums, int m, int n, int rank,
                                           int parts, const uint8* table, uint32 barrier) {
    constexpr int TILES = TOKENS / 8, TILE_BYTES = WARP_SIZE * sizeof(float4);
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, num_warps = CONSUMER_WARPS / parts;
    const uint32 place = (rank * num_warps + warp % num_warps) * TILES * TILE_BYTES + lane * sizeof(float4);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
        send_to_block(shared_address(table) + place + tile * TILE_BYTES, sums[tile], barrier, warp / num_warps);
    barrier_wait(barrier, 0);

    for (int i = warp; i < num_warps * TILES; i += CONSUMER_WARPS) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int part = 0; part < parts; ++part) {
            const float4* tiles = reinterpret_cast<const float4*>(table + (part * num_warps * TILES + i) * TILE_BYTES);
            const float4 more = tiles[lane];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        write_tile<F>(out, bias, sum, m, n, i % TILES * 8, rank * num_warps + i / TILES);
    }
}

template <typename T, typename Out, int TOKENS, typename F>
__global__ void __launch_bounds__(THREADS, 2)
gemm_skinny_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, Out* out,
                 const Out* bias, int m, int n, int k) {
    using Stage = Stages<TOKENS>;
    constexpr int SUMS_BYTES = ROWS * TOKENS * sizeof(float);
    static_assert(SUMS_BYTES <= Stage::COUNT * Stage::BYTES, "sums take the place of stages");
    __shared__ uint64 barrier_words[Barriers<Stage::COUNT>::NUM];
    const uint32 begin = shared_address(dynamic_shared()), shared = (begin + 1023) / 1024 * 1024;
    const Barriers<Stage::COUNT> barriers(shared_address(barrier_words));
    const int rank = blockIdx.x, parts = gridDim.x, all_steps = (k + DEPTH - 1) / DEPTH;
    const int first = all_steps * rank / parts, num_steps = all_steps * (rank + 1) / parts - first;
    const Producer<TOKENS, F> producer = {x, weight, barriers, shared, first, num_steps};
    const bool produces = threadIdx.x == CONSUMERS;
    if (produces) {
        barriers.initialize();
        barrier_arrive_expecting(barriers.sums, SUMS_BYTES);
        producer.copy_first_weights();
    }
    __syncthreads();

    Sums<TOKENS> sums;
    if (produces) {
        await_predecessors();
        producer.copy_rest();
    } else if (threadIdx.x < CONSUMERS) {
        const int group = __shfl_sync(FULL_WARP, threadIdx.x / GROUP_THREADS, 0);  // so that operands are uniform
        multiply<T, TOKENS>(sums, group, num_steps, shared, barriers);
    }
    __syncwarp();
    if (parts > 1) cluster_sync_relaxed();  // all stages of the cluster have been read
    if (threadIdx.x >= CONSUMERS) return;
    if (parts > 1) {
        share_sums<TOKENS, F>(out, bias, sums, m, n, rank, parts, dynamic_shared() + (shared - begin), barriers.sums);
    } else {
#pragma unroll
        for (int tile = 0; tile < TOKENS / 8; ++tile) {
            const float4 sum = make_float4(sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]);
            write_tile<F>(out, bias, sum, m, n, tile * 8, threadIdx.x / WARP_SIZE);
        }
    }
}
