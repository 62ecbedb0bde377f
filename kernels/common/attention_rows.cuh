/* Prefill attention's work: blocks of query rows of one sequence and key/value head, their masks and softmax. Scores and
   outputs lie in registers as mma.cuh says, M_TILES tiles of 16 rows below one another, tiles of 8 columns side by side. */
#pragma once
#include "attention.cuh"
#include "mma.cuh"

/* A block's query rows [first_row, first_row + num_rows) of one sequence and key/value head. Rows count the heads of a
   group within tokens: row r is token r / group, head r % group. */
struct QueryTile {
    Sequence sequence;
    int seq, kv_head, first_row, num_rows, group;

    /* The token a row belongs to; rows past the last one count as the last token's. */
    __device__ __forceinline__ int token(int row) const { return min((first_row + row) / group, sequence.query_len - 1); }
    /* Where a row begins in q or out. */
    __device__ __forceinline__ int64 element(int row, int64 token_stride, int head_dim) const {
        const int at = first_row + row;
        return (sequence.first_token + at / group) * token_stride + (int64)(kv_head * group + at % group) * head_dim;
    }
};

/* The block's query rows: blocks of rows are dealt out from the last of each sequence to the first, longest first. */
template <int ROWS>
__device__ __forceinline__ QueryTile find_tile(const AttentionInputs& in) {
    const int group = in.group();
    const auto num_tiles = [&](int seq) {
        const Sequence s(in, seq);
        return s.is_served(in) ? (s.query_len * group + ROWS - 1) / ROWS : 0;
    };
    Located at[1];
    locate(at, in.num_seqs, num_tiles, [&](int, int) { return (int)blockIdx.y; });
    const int seq = max(at[0].seq, 0);
    const Sequence s(in, seq);
    const int first_row = (num_tiles(seq) - 1 - at[0].offset) * ROWS;
    const int num_rows = at[0].seq < 0 ? 0 : min(ROWS, s.query_len * group - first_row);
    return {s, seq, (int)blockIdx.x, first_row, num_rows, group};
}

/* Where the 16 keys begin that this lane answers for: 16 * lane behind first_key. In elements of k_cache or v_cache. */
__device__ __forceinline__ int64 offset_of_unit(const AttentionInputs& in, const QueryTile& tile, int first_key) {
    const int key = first_key + threadIdx.x % WARP_SIZE * 16;
    return offset_of_key(in, block_of_key(in, tile.seq, key), key, tile.kv_head);
}

template <int M_TILES, int TILES>
__device__ __forceinline__ void cap(float (&scores)[M_TILES][TILES][4], const ScoreScale& scale) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[m][n][e] = scale.capped(scores[m][n][e]);
}

/* Hides the keys that a warp's rows do not see. scores: keys first_key on, rows first_row on, as mma.cuh lays them out. */
template <int M_TILES, int KEYS>
__device__ __forceinline__ void mask(float (&scores)[M_TILES][KEYS / 8][4], const QueryTile& tile, int first_row,
                                     int first_key, int window) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int token = tile.token(first_row + 16 * m + 8 * h + threadIdx.x % WARP_SIZE / 4);
            const int end = tile.sequence.end_key(token);
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int key = first_key + 8 * n + 2 * (threadIdx.x % 4) + e;
                    if (key >= end || key < end - window) scores[m][n][2 * h + e] = minus_infinity();
                }
        }
}

/* The softmax of a warp's rows so far. Lane (r, c) holds rows r and r + 8 of each tile of 16. */
template <int D, int M_TILES, int KEYS>
struct RunningSoftmax {
    float out[M_TILES][D / 8][4] = {};  // unnormalized
    float maximum[M_TILES][2], sum[M_TILES][2];

    __device__ __forceinline__ RunningSoftmax() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) maximum[m][h] = minus_infinity(), sum[m][h] = 0.0f;
    }

    /* Turns scores into weights relative to the new maximum. The outputs so far are to be multiplied by shrink. */
    __device__ __forceinline__ void absorb(float (&scores)[M_TILES][KEYS / 8][4], float factor,
                                           float (&shrink)[M_TILES][2]) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float top = maximum[m][h];
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) top = fmaxf(top, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
                top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
                top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
                const float base = finite_or_zero(top) * factor;
                shrink[m][h] = exp2f(maximum[m][h] * factor - base);
                maximum[m][h] = top;
                sum[m][h] *= shrink[m][h];
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; ++e) {
                        scores[m][n][e] = exp2f(scores[m][n][e] * factor - base);
                        sum[m][h] += scores[m][n][e];
                    }
            }
    }

    /* Mostly there is nothing to do: maxima seldom grow after the first keys. */
    __device__ __forceinline__ void rescale(const float (&shrink)[M_TILES][2]) {
        bool has_grown = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) has_grown |= shrink[m][0] != 1.0f || shrink[m][1] != 1.0f;
        if (!__any_sync(FULL_WARP, has_grown)) return;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[m][n][e] *= shrink[m][e / 2];
    }

    template <typename T>
    __device__ __forceinline__ void store_to(const AttentionInputs& in, const QueryTile& tile, int first_row) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float total = sum[m][h];
                total += __shfl_xor_sync(FULL_WARP, total, 1);
                total += __shfl_xor_sync(FULL_WARP, total, 2);
                const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
                const int row = first_row + 16 * m + 8 * h + threadIdx.x % WARP_SIZE / 4;
                if (row >= tile.num_rows) continue;
                T* to = static_cast<T*>(in.out) + tile.element(row, (int64)in.num_heads * D, D);
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
                    *reinterpret_cast<uint32*>(to + 8 * n + 2 * (threadIdx.x % 4)) =
                        pack<T>(out[m][n][2 * h] * inverse, out[m][n][2 * h + 1] * inverse);
            }
    }
};
