/* The first half of a gated MLP on Hopper:  out[m, i] = F(x[m] . weight[i]) * (x[m] . weight[inter + i])
   T = bf16 or fp16, F: an activation. x [m, k], rows x_stride apart, weight [2, inter, k], out [m, inter], as TensorMaps
   whose boxes are 64 x ROWS, 64 x COLUMNS / 2 x 2 and 64 x GROUP_ROWS; accumulates and activates in float32. sm_90a only
   grid (2 * clusters), cluster (2), block (384), dynamic shared memory: SHARED_BYTES
   requires k % 8 == 0, inter % 8 == 0, x_stride % 8 == 0, arrays aligned to 16 bytes

       cluster            computes 2 * ROWS rows and COLUMNS columns of out at a time, its blocks ROWS each; each brings its
                          rows of x, and half of the weights for both
       warpgroup 0        one thread copies x and weights DEPTH columns a step into STAGES buffers, tile after tile
       warpgroups 1, 2    compute GROUP_ROWS rows each: gates and ups in the same threads, so that nothing but out is written

   bound: tensor cores, 4 * m * inter * k operations; or memory, 4 * inter * k bytes of weights */
#include "common/activations.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/reduce.cuh"
#include "common/tensor_copies.cuh"

constexpr int THREADS = 384, GROUP_THREADS = 128, CONSUMER_WARPS = 8, BLOCKS = 2, STAGES = 4;
constexpr int GROUP_ROWS = 64, ROWS = 128, COLUMNS = 128, DEPTH = PANEL_COLUMNS;
constexpr int X_BYTES = ROWS * PANEL_ROW_BYTES, WEIGHT_BYTES = 2 * COLUMNS * PANEL_ROW_BYTES;
constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES, OUT_PANEL_BYTES = GROUP_ROWS * PANEL_ROW_BYTES;
constexpr int OUT_OFFSET = STAGES * STAGE_BYTES, OUT_BYTES = ROWS * COLUMNS * 2;
constexpr int SHARED_BYTES = OUT_OFFSET + OUT_BYTES + 1024;  // to begin at a multiple of 1024
constexpr int ROWS_TOGETHER = 4;  // clusters that read the same weights at about the same time

/* The cluster's tiles: down ROWS_TOGETHER rows of them, then the next column, so that weights and x are found in the cache. */
struct Tiles {
    int num_rows, num_columns;

    __device__ __forceinline__ int count() const { return num_rows * num_columns; }
    __device__ __forceinline__ int2 at(int index) const {  // column, row
        const int per_band = ROWS_TOGETHER * num_columns, band = index / per_band, within = index % per_band;
        const int height = min(ROWS_TOGETHER, num_rows - band * ROWS_TOGETHER);
        return make_int2(within / height, band * ROWS_TOGETHER + within % height);
    }
};

/* Barriers by shared address: a stage has been filled in this block; it may be filled again in both blocks. */
struct Pipeline {
    uint32 full, empty;

    __device__ __forceinline__ Pipeline(uint32 barriers) : full(barriers), empty(barriers + 8 * STAGES) {}

    __device__ __forceinline__ void initialize() const {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, BLOCKS * CONSUMER_WARPS);
        }
    }

    __device__ __forceinline__ void wait_empty(int step) const {
        barrier_wait(empty + 8 * (step % STAGES), step / STAGES % 2 ^ 1);
    }
    __device__ __forceinline__ uint32 expect(int step) const {
        barrier_arrive_expecting(full + 8 * (step % STAGES), STAGE_BYTES);
        return full + 8 * (step % STAGES);
    }
    __device__ __forceinline__ void wait_full(int step) const {
        barrier_wait(full + 8 * (step % STAGES), step / STAGES % 2);
    }
    __device__ __forceinline__ void signal_empty(int step) const {
        const int lane = threadIdx.x % WARP_SIZE;
        if (lane < BLOCKS) barrier_arrive_at(empty + 8 * (step % STAGES), lane);
    }
};

/* One thread of warpgroup 0. */
__device__ __forceinline__ void produce(const TensorMap& x, const TensorMap& weight, const Tiles& tiles, int num_steps,
                                        uint32 shared, const Pipeline& pipeline) {
    const int rank = cluster_rank();
    int step = 0;
    for (int index = blockIdx.x / BLOCKS; index < tiles.count(); index += gridDim.x / BLOCKS) {
        const int2 tile = tiles.at(index);
        for (int i = 0; i < num_steps; ++i, ++step) {
            const uint32 stage = shared + step % STAGES * STAGE_BYTES;
            pipeline.wait_empty(step);
            const uint32 barrier = pipeline.expect(step);
            copy_box(stage, x, i * DEPTH, (tile.y * BLOCKS + rank) * ROWS, barrier);
            copy_box_to_blocks(stage + X_BYTES + rank * (WEIGHT_BYTES / BLOCKS), weight, i * DEPTH,
                               tile.x * COLUMNS + rank * (COLUMNS / BLOCKS), 0, barrier, (1 << BLOCKS) - 1);
        }
    }
}

/* Sums of a warpgroup's rows: 8 tiles of gates, 8 of the same columns' ups, and that again for the other half. */
using Sums = float[4 * COLUMNS / BLOCKS / 8][4];

template <typename T>
__device__ __forceinline__ void accumulate(Sums& sums, uint32 rows, uint32 weights, bool is_first) {
    const uint64 a = operand(rows, 16), b = operand(weights, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DEPTH / 16; ++i) wgmma<T>(sums, advanced(a, 32 * i), advanced(b, 32 * i), i > 0 || !is_first);
    wgmma_commit();
}

/* Writes F(gate) * up of a warp's 16 rows into the warpgroup's panels of out. */
template <typename T, typename F>
__device__ __forceinline__ void activate(const Sums& sums, uint32 panels) {
    const int lane = threadIdx.x % WARP_SIZE, row = threadIdx.x % GROUP_THREADS / WARP_SIZE * 16 + lane % 16;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&gate)[4] = sums[16 * half + n + i / 2], (&up)[4] = sums[16 * half + 8 + n + i / 2];
                const int j = i % 2 * 2;
                pairs[i] = pack<T>(F::apply(gate[j]) * up[j], F::apply(gate[j + 1]) * up[j + 1]);
            }
            stmatrix_x4(panels + half * OUT_PANEL_BYTES + panel_offset(GROUP_ROWS, row, n + lane / 16), pairs);
        }
}

/* Warpgroups 1 and 2. */
template <typename T, typename F>
__device__ __forceinline__ void consume(const TensorMap& out, const Tiles& tiles, int num_steps, uint32 shared,
                                        const Pipeline& pipeline) {
    const int warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / GROUP_THREADS - 1, 0);  // so that operands are uniform
    const int rank = cluster_rank();
    const bool writes = threadIdx.x % GROUP_THREADS == 0;
    const uint32 panels = shared + OUT_OFFSET + warpgroup * 2 * OUT_PANEL_BYTES;
    Sums sums;
    int step = 0;
    for (int index = blockIdx.x / BLOCKS; index < tiles.count(); index += gridDim.x / BLOCKS) {
        for (int i = 0; i < num_steps; ++i, ++step) {
            const uint32 stage = shared + step % STAGES * STAGE_BYTES;
            pipeline.wait_full(step);
            accumulate<T>(sums, stage + warpgroup * GROUP_ROWS * PANEL_ROW_BYTES, stage + X_BYTES, i == 0);
            wgmma_wait<1>();
            if (i > 0) pipeline.signal_empty(step - 1);
        }
        wgmma_wait<0>();
        pin(sums);
        pipeline.signal_empty(step - 1);

        if (writes) await_read_boxes();
        named_barrier_sync(1 + warpgroup, GROUP_THREADS);
        activate<T, F>(sums, panels);
        fence_for_wgmma();
        named_barrier_sync(1 + warpgroup, GROUP_THREADS);
        if (writes) {
            const int2 tile = tiles.at(index);
            const int row = (tile.y * BLOCKS + rank) * ROWS + warpgroup * GROUP_ROWS;
            write_box(out, tile.x * COLUMNS, row, panels);
            write_box(out, tile.x * COLUMNS + PANEL_COLUMNS, row, panels + OUT_PANEL_BYTES);
            commit_writes();
        }
    }
    if (writes) await_writes();
}

template <typename T, typename F>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
gemm_gated_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                  const __grid_constant__ TensorMap out, int m, int inter, int k) {
    __shared__ uint64 barriers[2 * STAGES];
    release_successor();
    const uint32 shared = (shared_address(dynamic_shared()) + 1023) / 1024 * 1024;
    const Pipeline pipeline(shared_address(barriers));
    if (threadIdx.x == 0) {
        prefetch_map(x), prefetch_map(weight), prefetch_map(out);
        pipeline.initialize();
        fence_barriers();
    }
    cluster_sync();
    await_predecessors();

    const Tiles tiles = {(m + BLOCKS * ROWS - 1) / (BLOCKS * ROWS), (inter + COLUMNS - 1) / COLUMNS};
    const int num_steps = (k + DEPTH - 1) / DEPTH;
    if (threadIdx.x < GROUP_THREADS) {
        release_registers<40>();
        if (threadIdx.x == 0) produce(x, weight, tiles, num_steps, shared, pipeline);
    } else {
        claim_registers<232>();
        consume<T, F>(out, tiles, num_steps, shared, pipeline);
    }
    cluster_sync();  // a block may not end while the other still writes to it
}
