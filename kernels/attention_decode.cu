/* Decode attention: few query tokens per sequence against long paged keys and values, split over the whole GPU.
   out[t, h] = softmax(scale * q[t, h] . K) V, over the keys that t sees
   T = bf16 or fp16; D = head_dim; COLS = 8 * NT query rows of one key/value head at a time (tokens x heads of its group)
   grid (any number of blocks, best all that fit on the GPU), block (32 * WARPS)
   dynamic shared memory: Layout::SHARED_BYTES
   requires block_size % 16 == 0; k_cache, v_cache and q aligned to 16 bytes

   Each block computes an equal share of all keys (common/attention_units.cuh), a warp every WARPS-th tile of 16 keys of
   it with its own softmax and pipeline. Warps are merged where a segment (the share's part of one sequence and head)
   ends; segments that several blocks share, by the last of them to arrive (common/attention_merge.cuh). Products are
   transposed, keys as rows, so that one load of K and V serves the whole group with as few as 8 columns of queries:
   S' = K Q', O' = V' P'.
   bound: memory, 2 * keys * num_kv_heads * head_dim * sizeof(T) bytes */
#include "common/attention_merge.cuh"
#include "common/memory.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"

constexpr int TILE = 16;  // keys

template <int D, int NT, int WARPS, int STAGES>
struct Layout {
    static constexpr int COLS = 8 * NT;
    static constexpr int UNIT = TILE * WARPS;
    static constexpr int CHUNKS = D / 8;  // of 16 bytes in a row
    static constexpr bool IS_SWIZZLED = CHUNKS % 8 == 0;
    static constexpr int ROW_BYTES = 16 * (IS_SWIZZLED ? CHUNKS : CHUNKS | 1);
    static constexpr int TILE_BYTES = TILE * ROW_BYTES;
    static constexpr int MERGE_STRIDE = D + 4;  // floats
    static constexpr int MERGE_BYTES = WARPS * COLS * MERGE_STRIDE * 4;
    static constexpr int SHARED_BYTES = MERGE_BYTES + WARPS * STAGES * 2 * TILE_BYTES;

    /* Rows of 128 bytes would all begin in the same bank: exchange chunks by row, or leave a chunk free. */
    static __device__ __forceinline__ uint32 offset(int row, int chunk) {
        return row * ROW_BYTES + 16 * (IS_SWIZZLED ? chunk ^ (row % 8) : chunk);
    }
};

/* A warp's softmax over the keys it has seen, for COLS query rows. Lane (r, c) holds columns 8n + 2c, 8n + 2c + 1. */
template <typename T, int D, int NT>
struct RunningSoftmax {
    float out[D / 16][NT][4];  // (O')[d, column], unnormalized
    float maximum[NT][2], sum[NT][2];

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) maximum[n][e] = minus_infinity(), sum[n][e] = 0.0f;
#pragma unroll
            for (int i = 0; i < D / 16; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[i][n][e] = 0.0f;
        }
    }

    /* Turns scores (S')[key, column] into weights relative to the new maximum, and rescales what was there. */
    __device__ __forceinline__ void absorb(float (&scores)[NT][4], float factor) {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float top = fmaxf(scores[n][e], scores[n][e + 2]);
#pragma unroll
                for (int mask = 4; mask < WARP_SIZE; mask *= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, mask));
                top = fmaxf(top, maximum[n][e]);
                const float base = finite_or_zero(top) * factor;
                const float shrink = exp2f(maximum[n][e] * factor - base);
                maximum[n][e] = top;
                scores[n][e] = exp2f(scores[n][e] * factor - base);
                scores[n][e + 2] = exp2f(scores[n][e + 2] * factor - base);
                sum[n][e] = sum[n][e] * shrink + scores[n][e] + scores[n][e + 2];
#pragma unroll
                for (int i = 0; i < D / 16; ++i) out[i][n][e] *= shrink, out[i][n][e + 2] *= shrink;
            }
    }
};

/* The query rows of one segment: B operand of S' = K Q', and which keys each column sees. */
template <typename T, int D, int NT>
struct Queries {
    uint32 fragment[D / 16][NT][2];
    int end_key[NT][2];

    __device__ __forceinline__ void load(const AttentionInputs& in, const Sequence& s, int kv_head, int first_column) {
        const int lane = threadIdx.x % WARP_SIZE, group = in.group();
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int column = first_column + 8 * n + lane / 4;
            const bool is_valid = column < group * s.query_len;
            const int64 token = s.first_token + (is_valid ? column / group : 0);
            const T* row = static_cast<const T*>(in.q) + token * in.q_token_stride +
                           (kv_head * group + column % group) * D + 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < D / 16; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    fragment[i][n][half] = is_valid ? *reinterpret_cast<const uint32*>(row + 16 * i + 8 * half) : 0;
#pragma unroll
            for (int e = 0; e < 2; ++e)
                end_key[n][e] = s.end_key(min((first_column + 8 * n + 2 * (lane % 4) + e) / group, s.query_len - 1));
        }
    }
};

/* Starts copying a warp's tile of 16 keys: K rows, then V rows; zeros beyond the keys anyone may see. */
template <typename T, int D, typename L>
__device__ __forceinline__ void load_tile(const AttentionInputs& in, const Sequence& s, int first_key, int kv_head,
                                          int block, uint32 to) {
    const int lane = threadIdx.x % WARP_SIZE, begin_key = s.begin_key(0, in.window);
    const int64 offset = offset_of_key(in, block, first_key, kv_head);
    const T* k = static_cast<const T*>(in.k_cache) + offset;
    const T* v = static_cast<const T*>(in.v_cache) + offset;
#pragma unroll
    for (int i = lane; i < TILE * L::CHUNKS; i += WARP_SIZE) {
        const int row = i / L::CHUNKS, chunk = i % L::CHUNKS, from = row * in.num_kv_heads * D + 8 * chunk;
        const bool is_valid = first_key + row >= begin_key && first_key + row < s.context_len;
        cp_async_16(to + L::offset(row, chunk), k + from, is_valid);
        cp_async_16(to + L::TILE_BYTES + L::offset(row, chunk), v + from, is_valid);
    }
}

/* Attention to one tile of 16 keys that has arrived in shared memory. */
template <typename T, int D, int NT, typename L>
__device__ __forceinline__ void attend(const AttentionInputs& in, const Sequence& s, const Queries<T, D, NT>& queries,
                                       RunningSoftmax<T, D, NT>& softmax, const ScoreScale& scale, int first_key,
                                       uint32 tile) {
    const int lane = threadIdx.x % WARP_SIZE;
    float scores[NT][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        uint32 k[4];
        ldmatrix_x4(k, tile + L::offset(lane % 16, 2 * i + lane / 16));
#pragma unroll
        for (int n = 0; n < NT; ++n) mma<T>(scores[n], k, queries.fragment[i][n][0], queries.fragment[i][n][1]);
    }
    const bool is_seen_by_all = first_key + TILE <= s.end_key(0) && first_key >= s.begin_key(s.query_len - 1, in.window);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int key = first_key + lane / 4 + e / 2 * 8, end = queries.end_key[n][e % 2];
            const bool is_seen = is_seen_by_all || (key < end && key >= end - in.window);
            scores[n][e] = is_seen ? scale.capped(scores[n][e]) : minus_infinity();
        }
    softmax.absorb(scores, scale.factor);
    uint32 weights[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            weights[n][half] = transpose_8x8(pack<T>(scores[n][2 * half], scores[n][2 * half + 1]));
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        uint32 v[4];  // A operand V': rows d, columns keys
        ldmatrix_x4_trans(v, tile + L::TILE_BYTES + L::offset(lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
#pragma unroll
        for (int n = 0; n < NT; ++n) mma<T>(softmax.out[i][n], v, weights[n][0], weights[n][1]);
    }
}

/* Merges the warps' softmaxes of a finished segment, and stores the result where it belongs. All threads. */
template <typename T, int D, int NT, int WARPS, typename L>
__device__ void finish_segment(const AttentionInputs& in, const Partials& partials, const Shares& shares,
                               const Segment& at, const RunningSoftmax<T, D, NT>& softmax, float factor) {
    __shared__ float2 warp_stats[WARPS][L::COLS];
    float* warp_outs = reinterpret_cast<float*>(dynamic_shared());  // [WARPS, COLS, MERGE_STRIDE]
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int column = 8 * n + 2 * (lane % 4) + e;
            float sum = softmax.sum[n][e];
#pragma unroll
            for (int mask = 4; mask < WARP_SIZE; mask *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, mask);
            if (lane < 4) warp_stats[warp][column] = make_float2(softmax.maximum[n][e], sum);
            if (column >= at.num_columns) continue;
            float* row = warp_outs + (warp * L::COLS + column) * L::MERGE_STRIDE + lane / 4;
#pragma unroll
            for (int i = 0; i < D / 16; ++i) row[16 * i] = softmax.out[i][n][e], row[16 * i + 8] = softmax.out[i][n][e + 2];
        }
    __syncthreads();

    const int64 first_row = (2 * blockIdx.x + at.starts_here()) * L::COLS;
    for (int i = threadIdx.x; i < at.num_columns * (D / 4); i += blockDim.x) {
        const int column = i / (D / 4), d = i % (D / 4) * 4;
        float2 stats[WARPS];
        float4 outs[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            stats[w] = warp_stats[w][column];
            outs[w] = *reinterpret_cast<const float4*>(warp_outs + (w * L::COLS + column) * L::MERGE_STRIDE + d);
        }
        Merged merged;
        merged.add(stats, outs, factor);
        if (at.is_whole()) {
            merged.store_normalized(at.out_row<T, D>(in, column) + d);
        } else {
            *reinterpret_cast<float4*>(partials.out + (first_row + column) * D + d) = merged.out;
            if (d == 0) partials.stats[first_row + column] = make_float2(merged.maximum, merged.sum);
        }
    }
    if (!at.is_whole()) merge_if_last<T, D, L::COLS>(in, partials, shares, at, factor);
    __syncthreads();
}

/* Computes a block's units [begin, end) of all. */
template <typename T, int D, int NT, int WARPS, int STAGES>
__device__ __forceinline__ void attend_share(const AttentionInputs& in, const Partials& partials, const Shares& shares,
                                             const Cursor<TILE * WARPS>& start, int begin, int end, int column_blocks) {
    using L = Layout<D, NT, WARPS, STAGES>;
    const int warp = threadIdx.x / WARP_SIZE, num_heads = in.num_kv_heads * column_blocks;
    const uint32 stages = shared_address(dynamic_shared()) + L::MERGE_BYTES + warp * STAGES * 2 * L::TILE_BYTES;
    const ScoreScale scale(in);

    // The block id of the next tile to load is fetched one tile ahead, since the copies' addresses hang on it.
    Cursor<L::UNIT> loading = start, at = start;
    int num_left = end - begin, loading_stage = 0;
    int block = block_of_key(in, loading.seq, loading.first_key() + warp * TILE);
    const auto load_next = [&] {
        if (num_left > 0) {
            const uint32 to = stages + loading_stage * 2 * L::TILE_BYTES;
            load_tile<T, D, L>(in, loading.sequence, loading.first_key() + warp * TILE, loading.head / column_blocks,
                               block, to);
            if (--num_left > 0) {
                loading.advance(in, num_heads);
                block = block_of_key(in, loading.seq, loading.first_key() + warp * TILE);
            }
        }
        loading_stage = loading_stage + 1 == STAGES ? 0 : loading_stage + 1;
        cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) load_next();

    Segment segment(in, at, column_blocks, L::COLS, begin, begin - (at.unit - at.begin_unit));
    Queries<T, D, NT> queries;
    queries.load(in, at.sequence, segment.kv_head, segment.first_column);
    RunningSoftmax<T, D, NT> softmax;
    softmax.reset();
    for (int unit = begin, stage = 0; unit < end; ++unit, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        cp_async_wait<STAGES - 2>();
        __syncwarp();
        load_next();  // into the stage that the iteration before has used
        const int first_key = at.first_key() + warp * TILE;
        if (first_key < at.sequence.context_len)
            attend<T, D, NT, L>(in, at.sequence, queries, softmax, scale, first_key, stages + stage * 2 * L::TILE_BYTES);
        const bool is_segment_end = at.unit + 1 == at.end_unit || unit + 1 == end;
        if (unit + 1 < end) at.advance(in, num_heads);
        if (!is_segment_end) continue;

        Segment finished = segment;
        finished.end = unit + 1;
        if (unit + 1 < end) {
            segment = Segment(in, at, column_blocks, L::COLS, unit + 1, unit + 1);
            queries.load(in, at.sequence, segment.kv_head, segment.first_column);  // arrives during the merge
        }
        finish_segment<T, D, NT, WARPS, L>(in, partials, shares, finished, softmax, scale.factor);
        softmax.reset();
    }
}

/* Query tokens of sequences without keys get zeros. (What pads a captured graph has no query tokens either.) */
template <typename T, int D>
__device__ __forceinline__ void clear_padding_rows(const AttentionInputs& in) {
    for (int seq = blockIdx.x; seq < in.num_seqs; seq += gridDim.x) {
        const Sequence s(in, seq);
        if (s.context_len > 0 || !s.is_served(in)) continue;
        T* out = static_cast<T*>(in.out) + (int64)s.first_token * in.num_heads * D;
        for (int i = threadIdx.x; i < s.query_len * in.num_heads * D; i += blockDim.x) out[i] = from_float<T>(0.0f);
    }
}

template <typename T, int D, int NT, int WARPS, int STAGES>
__global__ void __launch_bounds__(32 * WARPS)
attention_decode(AttentionInputs in, Partials partials, int column_blocks) {
    using C = Cursor<TILE * WARPS>;
    release_successor();
    const int num_heads = in.num_kv_heads * column_blocks;
    Located borders[2];
    const int total = locate(
        borders, in.num_seqs, [&](int seq) { return C::num_units(in, Sequence(in, seq)) * num_heads; },
        [&](int i, int total) { return Shares(total).border(blockIdx.x + i); });
    const Shares shares(total);
    int share[2], moves[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (borders[i].seq >= 0) {
            const int length = C::num_units(in, Sequence(in, borders[i].seq));
            moves[i] = Shares::move(borders[i].offset % length, length);
        }
        share[i] = shares.border(blockIdx.x + i) + moves[i];
    }
    await_predecessors();
    if (share[0] < share[1]) {
        C start(in, borders[0]);
        if (moves[0] < 0) --start.unit;
        if (moves[0] > 0) start.advance(in, num_heads);
        attend_share<T, D, NT, WARPS, STAGES>(in, partials, shares, start, share[0], share[1], column_blocks);
    }
    clear_padding_rows<T, D>(in);
}
