/* Prefill attention on Hopper's warpgroup instructions: what attention_prefill.cu computes, in the manner of
   FlashAttention-3 (arXiv:2407.08608). sm_90a only
   T = bf16 or fp16; D = 64, 128 or 256; a block computes ROWS query rows (tokens x heads of the group) of one key/value
   head, KEYS keys a step
   grid (num_kv_heads, blocks of rows of all sequences), block (384), dynamic shared memory: Layout::SHARED_BYTES
   requires block_size % 16 == 0; q, k_cache and v_cache aligned to 16 bytes; q_token_stride % 8 == 0

       warpgroup 0        copies Q, then K and V step by step into STAGES buffers each; barriers say full and empty
       warpgroups 1, 2    compute 64 rows each: S(j + 1) = Q K' runs while the softmax of step j is applied to V

   bound: tensor cores, 4 * query rows * keys seen * D operations */
#include "common/attention_rows.cuh"
#include "common/hopper.cuh"
#include "common/overlap.cuh"

constexpr int ROWS = 128, THREADS = 384, STAGES = 2;
constexpr int GROUP_THREADS = 128, GROUP_ROWS = 64, CONSUMER_WARPS = 8;

template <int D, int KEYS>
struct Layout {
    static constexpr int CHUNKS = D / 8;  // of 16 bytes in a row
    static constexpr int Q_BYTES = ROWS * D * 2, KEY_BYTES = KEYS * D * 2;
    static constexpr int K_OFFSET = Q_BYTES, V_OFFSET = K_OFFSET + STAGES * KEY_BYTES;
    static constexpr int SHARED_BYTES = V_OFFSET + STAGES * KEY_BYTES + 1024;  // to begin at a multiple of 1024
};

/* Barriers by shared address: a buffer's stage has been filled, or may be filled again. */
struct Pipeline {
    uint32 full, empty;

    __device__ __forceinline__ Pipeline(uint32 barriers) : full(barriers), empty(barriers + 8 * STAGES) {}

    __device__ __forceinline__ void initialize() const {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, GROUP_THREADS);
            barrier_init(empty + 8 * s, CONSUMER_WARPS);
        }
    }

    __device__ __forceinline__ void wait_empty(int step) const {
        barrier_wait(empty + 8 * (step % STAGES), step / STAGES % 2 ^ 1);
    }
    __device__ __forceinline__ void signal_full(int step) const { barrier_arrive_after_copies(full + 8 * (step % STAGES)); }
    __device__ __forceinline__ void wait_full(int step) const {
        barrier_wait(full + 8 * (step % STAGES), step / STAGES % 2);
        fence_for_wgmma();
    }
    __device__ __forceinline__ void signal_empty(int step) const {
        if (threadIdx.x % WARP_SIZE == 0) barrier_arrive(empty + 8 * (step % STAGES));
    }
};

/* The steps of a block: KEYS keys each from first_key on; no row sees keys outside [begin_key, end_key). */
struct Steps {
    int first_key, begin_key, end_key, count;
};

template <typename T, int D, typename L>
__device__ __forceinline__ void load_queries(const AttentionInputs& in, const QueryTile& tile, uint32 to) {
    for (int i = threadIdx.x; i < ROWS * L::CHUNKS; i += GROUP_THREADS) {
        const int row = i / L::CHUNKS, chunk = i % L::CHUNKS;
        const bool is_valid = row < tile.num_rows;
        const T* from = static_cast<const T*>(in.q) + tile.element(is_valid ? row : 0, in.q_token_stride, D);
        cp_async_16(to + panel_offset(ROWS, row, chunk), from + 8 * chunk, is_valid);
    }
}

/* Starts copying KEYS rows of K or V; zeros outside of the keys that are seen, if the step is not IS_WHOLE. offsets: lane i
   has where the 16 keys 16 * i behind the first that it was fetched for begin, lane first_lane those of first_key. */
template <typename T, int D, int KEYS, bool IS_WHOLE, typename L>
__device__ __forceinline__ void load_keys(const AttentionInputs& in, const void* cache, const Steps& steps, int first_key,
                                          int64 offsets, int first_lane, uint32 to) {
    constexpr int ROWS_PER_PASS = GROUP_THREADS / L::CHUNKS;
    const int thread_row = threadIdx.x / L::CHUNKS, chunk = threadIdx.x % L::CHUNKS, row_stride = in.num_kv_heads * D;
    const T* from = static_cast<const T*>(cache) + thread_row * row_stride + 8 * chunk;
#pragma unroll
    for (int b = 0; b < KEYS / 16; ++b) {
        const int64 offset = __shfl_sync(FULL_WARP, offsets, first_lane + b);
#pragma unroll
        for (int pass = 0; pass < 16; pass += ROWS_PER_PASS) {
            const int key = first_key + 16 * b + pass + thread_row;
            const bool is_seen = IS_WHOLE || (key >= steps.begin_key && key < steps.end_key);
            cp_async_16(to + panel_offset(KEYS, pass + thread_row, chunk) + 16 * b * PANEL_ROW_BYTES,
                        from + offset + pass * row_stride, is_seen);
        }
    }
}

/* Warpgroup 0: Q, K0, V0, K1, V1, …; the copies themselves signal their completion, Q together with K0. */
template <typename T, int D, int KEYS, typename L>
__device__ __forceinline__ void produce(const AttentionInputs& in, const QueryTile& tile, const Steps& steps,
                                        uint32 shared, const Pipeline& k_pipeline, const Pipeline& v_pipeline) {
    constexpr int STEPS_PER_FETCH = WARP_SIZE * 16 / KEYS;
    int64 offsets = 0;
    load_queries<T, D, L>(in, tile, shared);
    for (int step = 0; step < steps.count; ++step) {
        const int first_key = steps.first_key + step * KEYS, first_lane = step % STEPS_PER_FETCH * (KEYS / 16);
        if (first_lane == 0) offsets = offset_of_unit(in, tile, first_key);
        const bool is_whole = first_key >= steps.begin_key && first_key + KEYS <= steps.end_key;
        const auto load = [&](const Pipeline& pipeline, const void* cache, uint32 to) {
            pipeline.wait_empty(step);
            to += step % STAGES * L::KEY_BYTES;
            if (is_whole) load_keys<T, D, KEYS, true, L>(in, cache, steps, first_key, offsets, first_lane, to);
            else load_keys<T, D, KEYS, false, L>(in, cache, steps, first_key, offsets, first_lane, to);
            pipeline.signal_full(step);
        };
        load(k_pipeline, in.k_cache, shared + L::K_OFFSET);
        load(v_pipeline, in.v_cache, shared + L::V_OFFSET);
    }
}

/* The two computing warpgroups take turns at the tensor cores, so that one's softmax falls into the other's products. */
__device__ __forceinline__ void await_turn(int warpgroup) { named_barrier_sync(1 + warpgroup, 2 * GROUP_THREADS); }
__device__ __forceinline__ void give_turn(int warpgroup) { named_barrier_arrive(1 + warpgroup, 2 * GROUP_THREADS); }

/* Begins S = Q K' of a warpgroup's rows. */
template <typename T, int D, int KEYS>
__device__ __forceinline__ void begin_scores(float (&scores)[KEYS / 8][4], uint32 queries, uint32 keys) {
    const uint64 q = operand(queries, 16), k = operand(keys, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        const int panel = i / 4, column_bytes = i % 4 * 32;
        wgmma<T>(scores, advanced(q, panel * ROWS * PANEL_ROW_BYTES + column_bytes),
                 advanced(k, panel * KEYS * PANEL_ROW_BYTES + column_bytes), i > 0);
    }
    wgmma_commit();
}

/* Begins O += P V of a warpgroup's rows. */
template <typename T, int D, int KEYS>
__device__ __forceinline__ void begin_outputs(float (&out)[D / 8][4], const uint32 (&weights)[KEYS / 16][4], uint32 values) {
    const uint64 v = operand(values, KEYS * PANEL_ROW_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
        const uint64 rows = advanced(v, 16 * k * PANEL_ROW_BYTES);
        if constexpr (D <= 128) {
            wgmma_transposed<T>(out, weights[k], rows);
        } else {
            float(&halves)[2][D / 16][4] = reinterpret_cast<float(&)[2][D / 16][4]>(out);
            wgmma_transposed<T>(halves[0], weights[k], rows);
            wgmma_transposed<T>(halves[1], weights[k], advanced(rows, 2 * KEYS * PANEL_ROW_BYTES));
        }
    }
    wgmma_commit();
}

/* Warpgroups 1 and 2. */
template <typename T, int D, int KEYS, bool TURNS, typename L>
__device__ __forceinline__ void consume(const AttentionInputs& in, const QueryTile& tile, const Steps& steps,
                                        uint32 shared, const Pipeline& k_pipeline, const Pipeline& v_pipeline) {
    const int warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / GROUP_THREADS - 1, 0);  // so that operands are uniform
    const int warp_row = warpgroup * GROUP_ROWS + threadIdx.x % GROUP_THREADS / WARP_SIZE * 16;
    const uint32 queries = shared + warpgroup * GROUP_ROWS * PANEL_ROW_BYTES;
    const ScoreScale scale(in);
    // All rows see keys [last_begin, first_end); outside of it masks are needed.
    const int first_end = tile.sequence.end_key(tile.token(warpgroup * GROUP_ROWS));
    const int last_begin = tile.sequence.begin_key(tile.token(warpgroup * GROUP_ROWS + GROUP_ROWS - 1), in.window);

    RunningSoftmax<D, 1, KEYS> softmax;
    float scores[1][KEYS / 8][4], shrink[1][2];
    uint32 weights[KEYS / 16][4];
    const auto weigh = [&](int step) {
        const int first_key = steps.first_key + step * KEYS;
        if (scale.inner > 0.0f) cap(scores, scale);
        if (first_key + KEYS > first_end || first_key < last_begin)
            mask<1, KEYS>(scores, tile, warp_row, first_key, in.window);
        softmax.absorb(scores, scale.factor, shrink);
    };
    const auto round_weights = [&] {
#pragma unroll
        for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                weights[k][i] = pack<T>(scores[0][2 * k + i / 2][i % 2 * 2], scores[0][2 * k + i / 2][i % 2 * 2 + 1]);
    };

    if (TURNS && warpgroup == 1) give_turn(0);
    k_pipeline.wait_full(0);
    begin_scores<T, D, KEYS>(scores[0], queries, shared + L::K_OFFSET);
    wgmma_wait<0>();
    pin(scores[0]);
    k_pipeline.signal_empty(0);
    weigh(0);
    round_weights();
    for (int step = 1; step < steps.count; ++step) {
        k_pipeline.wait_full(step);
        if (TURNS) await_turn(warpgroup);
        begin_scores<T, D, KEYS>(scores[0], queries, shared + L::K_OFFSET + step % STAGES * L::KEY_BYTES);
        v_pipeline.wait_full(step - 1);
        begin_outputs<T, D, KEYS>(softmax.out[0], weights, shared + L::V_OFFSET + (step - 1) % STAGES * L::KEY_BYTES);
        if (TURNS) give_turn(1 - warpgroup);
        wgmma_wait<1>();
        pin(scores[0]);
        k_pipeline.signal_empty(step);
        weigh(step);
        pin(scores[0]);
        finish_before_wait(softmax.sum[0][0] + softmax.sum[0][1]);  // the softmax, while P V is under way
        wgmma_wait<0>();
        pin(softmax.out[0]);
        v_pipeline.signal_empty(step - 1);
        softmax.rescale(shrink);
        round_weights();
    }
    v_pipeline.wait_full(steps.count - 1);
    begin_outputs<T, D, KEYS>(softmax.out[0], weights, shared + L::V_OFFSET + (steps.count - 1) % STAGES * L::KEY_BYTES);
    wgmma_wait<0>();
    pin(softmax.out[0]);
    softmax.template store_to<T>(in, tile, warp_row);
}

template <typename T, int D, int KEYS, bool TURNS>
__global__ void __launch_bounds__(THREADS, 1) attention_prefill_sm90(AttentionInputs in) {
    using L = Layout<D, KEYS>;
    __shared__ uint64 barriers[2][2 * STAGES];
    release_successor();
    const QueryTile tile = find_tile<ROWS>(in);
    await_predecessors();
    if (tile.num_rows <= 0) return;
    const uint32 shared = (shared_address(dynamic_shared()) + 1023) / 1024 * 1024;
    const Pipeline k_pipeline(shared_address(barriers[0])), v_pipeline(shared_address(barriers[1]));
    if (threadIdx.x == 0) k_pipeline.initialize(), v_pipeline.initialize();
    __syncthreads();

    const int begin_key = tile.sequence.begin_key(tile.token(0), in.window);
    const int end_key = tile.sequence.end_key(tile.token(tile.num_rows - 1)), first_key = begin_key / KEYS * KEYS;
    const Steps steps = {first_key, begin_key, end_key, (end_key - first_key + KEYS - 1) / KEYS};
    if (threadIdx.x < GROUP_THREADS) {
        release_registers<40>();
        produce<T, D, KEYS, L>(in, tile, steps, shared, k_pipeline, v_pipeline);
    } else {
        claim_registers<232>();
        consume<T, D, KEYS, TURNS, L>(in, tile, steps, shared, k_pipeline, v_pipeline);
    }
}
