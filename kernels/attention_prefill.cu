/* Prefill attention: many query tokens per sequence, FlashAttention-2 (arXiv:2307.08691) over a paged cache.
   out[t, h] = softmax(scale * q[t, h] . K) V, over the keys that t sees
   T = bf16 or fp16; D = head_dim; a block computes ROWS = 16 * M_TILES * WARPS query rows (tokens x heads of the group) of
   one key/value head
   grid (num_kv_heads, blocks of rows of all sequences), block (32 * WARPS), dynamic shared memory: Layout::SHARED_BYTES
   requires block_size % 16 == 0; q, k_cache and v_cache aligned to 16 bytes; q_token_stride % 8 == 0

   Per step of KEYS keys: scores S = Q K' from shared memory into registers, softmax there, O += P V with P taken straight
   from the registers of S. The next K travels during the softmax and P V, V during Q K'.
   bound: tensor cores, 4 * query rows * keys seen * D operations */
#include "common/attention_rows.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"

template <int D, int M_TILES, int WARPS, int KEYS>
struct Layout {
    static constexpr int ROWS = 16 * M_TILES * WARPS;
    static constexpr int THREADS = WARP_SIZE * WARPS;
    static constexpr int CHUNKS = D / 8;                 // of 16 bytes in a row
    static constexpr int ROW_BYTES = 16 * (CHUNKS | 1);  // an odd number of chunks: 8 rows lie in different banks
    static constexpr int LANES_PER_ROW = D <= 64 ? 8 : D <= 128 ? 16 : 32;
    static constexpr int ROWS_PER_PASS = THREADS / LANES_PER_ROW;
    static constexpr int K_OFFSET = ROWS * ROW_BYTES, V_OFFSET = K_OFFSET + KEYS * ROW_BYTES;
    static constexpr int SHARED_BYTES = V_OFFSET + KEYS * ROW_BYTES;
};

/* Starts copying the query rows; zeros past the last one. */
template <typename T, int D, typename L>
__device__ __forceinline__ void load_queries(const AttentionInputs& in, const QueryTile& tile, uint32 to) {
    const int chunk = threadIdx.x % L::LANES_PER_ROW;
    if (chunk >= L::CHUNKS) return;
    for (int row = threadIdx.x / L::LANES_PER_ROW; row < L::ROWS; row += L::ROWS_PER_PASS) {
        const bool is_valid = row < tile.num_rows;
        const T* from = static_cast<const T*>(in.q) + tile.element(is_valid ? row : 0, in.q_token_stride, D);
        cp_async_16(to + row * L::ROW_BYTES + 16 * chunk, from + 8 * chunk, is_valid);
    }
}

/* Starts copying KEYS rows of K or V; zeros for keys outside [begin_key, end_key). offsets: lane i has where the 16 keys
   16 * i behind the first that it was fetched for begin, lane first_lane those of first_key. */
template <typename T, int D, int KEYS, typename L>
__device__ __forceinline__ void load_keys(const AttentionInputs& in, const void* cache, int first_key, int begin_key,
                                          int end_key, int64 offsets, int first_lane, uint32 to) {
    const int thread_row = threadIdx.x / L::LANES_PER_ROW, chunk = threadIdx.x % L::LANES_PER_ROW;
    const int row_stride = in.num_kv_heads * D;
    const T* from = static_cast<const T*>(cache) + thread_row * row_stride + 8 * chunk;
    to += thread_row * L::ROW_BYTES + 16 * chunk;
#pragma unroll
    for (int b = 0; b < KEYS / 16; ++b) {
        const int64 offset = __shfl_sync(FULL_WARP, offsets, first_lane + b);
        if (chunk >= L::CHUNKS || (L::ROWS_PER_PASS > 16 && thread_row >= 16)) continue;
#pragma unroll
        for (int row = 0; row < 16; row += L::ROWS_PER_PASS) {
            const int key = first_key + 16 * b + row + thread_row;
            cp_async_16(to + (16 * b + row) * L::ROW_BYTES, from + offset + row * row_stride,
                        key >= begin_key && key < end_key);
        }
    }
}

/* S = Q K' of a warp's rows. queries, keys: shared memory, offset by what the lane reads. */
template <typename T, int D, int M_TILES, int KEYS, typename L>
__device__ __forceinline__ void multiply_keys(float (&scores)[M_TILES][KEYS / 8][4], uint32 queries, uint32 keys) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        uint32 q[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) ldmatrix_x4(q[m], queries + 16 * m * L::ROW_BYTES + 32 * i);
#pragma unroll
        for (int n = 0; n < KEYS / 16; ++n) {
            uint32 k[4];
            ldmatrix_x4(k, keys + 16 * n * L::ROW_BYTES + 32 * i);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma<T>(scores[m][2 * n], q[m], k[0], k[1]);
                mma<T>(scores[m][2 * n + 1], q[m], k[2], k[3]);
            }
        }
    }
}

/* O += P V of a warp's rows, P rounded to T. values: shared memory, offset by what the lane reads. */
template <typename T, int D, int M_TILES, int KEYS, typename L>
__device__ __forceinline__ void multiply_values(float (&out)[M_TILES][D / 8][4],
                                                const float (&weights)[M_TILES][KEYS / 8][4], uint32 values) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
        uint32 p[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                p[m][i] = pack<T>(weights[m][2 * k + i / 2][i % 2 * 2], weights[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32 v[4];
            ldmatrix_x4_trans(v, values + 16 * k * L::ROW_BYTES + 32 * n);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma<T>(out[m][2 * n], p[m], v[0], v[1]);
                mma<T>(out[m][2 * n + 1], p[m], v[2], v[3]);
            }
        }
    }
}

template <typename T, int D, int M_TILES, int WARPS, int KEYS>
__global__ void __launch_bounds__(32 * WARPS) attention_prefill(AttentionInputs in) {
    using L = Layout<D, M_TILES, WARPS, KEYS>;
    release_successor();
    const QueryTile tile = find_tile<L::ROWS>(in);
    await_predecessors();
    if (tile.num_rows <= 0) return;
    const int lane = threadIdx.x % WARP_SIZE, warp_row = threadIdx.x / WARP_SIZE * 16 * M_TILES;
    const uint32 shared = shared_address(dynamic_shared());
    const uint32 queries = shared + (warp_row + lane % 16) * L::ROW_BYTES + lane / 16 * 16;
    const uint32 keys = shared + L::K_OFFSET + (lane / 16 * 8 + lane % 8) * L::ROW_BYTES + lane / 8 % 2 * 16;
    const uint32 values = shared + L::V_OFFSET + lane % 16 * L::ROW_BYTES + lane / 16 * 16;

    // All rows see keys [last_begin, first_end); outside of it masks are needed.
    const int first_token = tile.token(0), last_token = tile.token(tile.num_rows - 1);
    const int begin_key = tile.sequence.begin_key(first_token, in.window), end_key = tile.sequence.end_key(last_token);
    const int first_end = tile.sequence.end_key(first_token), last_begin = tile.sequence.begin_key(last_token, in.window);
    const ScoreScale scale(in);
    RunningSoftmax<D, M_TILES, KEYS> softmax;

    constexpr int STEPS_PER_FETCH = WARP_SIZE * 16 / KEYS;
    int first_key = begin_key / KEYS * KEYS;
    int64 offsets = offset_of_unit(in, tile, first_key);
    const auto load = [&](const void* cache, int key, int step, int offset) {
        load_keys<T, D, KEYS, L>(in, cache, key, begin_key, end_key, offsets, step % STEPS_PER_FETCH * (KEYS / 16),
                                 shared + offset);
    };
    load_queries<T, D, L>(in, tile, shared);
    load(in.k_cache, first_key, 0, L::K_OFFSET);
    cp_async_commit();
    for (int step = 0; first_key < end_key; ++step, first_key += KEYS) {
        cp_async_wait<0>();
        __syncthreads();  // K is there, and everyone has done with V
        load(in.v_cache, first_key, step, L::V_OFFSET);
        cp_async_commit();

        float scores[M_TILES][KEYS / 8][4];
        multiply_keys<T, D, M_TILES, KEYS, L>(scores, queries, keys);
        cp_async_wait<0>();
        __syncthreads();  // V is there, and everyone has done with K
        if (first_key + KEYS < end_key) {
            if ((step + 1) % STEPS_PER_FETCH == 0) offsets = offset_of_unit(in, tile, first_key + KEYS);
            load(in.k_cache, first_key + KEYS, step + 1, L::K_OFFSET);
        }
        cp_async_commit();

        if (scale.inner > 0.0f) cap(scores, scale);
        if (first_key + KEYS > first_end || first_key < last_begin) mask<M_TILES, KEYS>(scores, tile, warp_row, first_key, in.window);
        float shrink[M_TILES][2];
        softmax.absorb(scores, scale.factor, shrink);
        softmax.rescale(shrink);
        multiply_values<T, D, M_TILES, KEYS, L>(softmax.out, scores, values);
    }
    softmax.template store_to<T>(in, tile, warp_row);
}
