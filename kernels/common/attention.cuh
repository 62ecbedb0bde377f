/* What the attention kernels share: their inputs, which keys a token sees, who works on what, softmax arithmetic.

   Query token t of a sequence stands at position p = context_len - query_len + t and sees keys (p - window, p].
   Query heads share key/value heads in groups: head h reads key/value head h / group. */
#pragma once
#include "reduce.cuh"
#include "types.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

/* One step's queries and its paged keys and values. Passed by value; the layout is repeated in ops/_cuda_attention.py. */
struct AttentionInputs {
    void* out;                // [num_tokens, num_heads, head_dim] T
    const void* q;            // [num_tokens, num_heads, head_dim] T, tokens q_token_stride elements apart
    const void* k_cache;      // [num_blocks, block_size, num_kv_heads, head_dim] T
    const void* v_cache;      // likewise
    const int* query_start;   // [num_seqs + 1]
    const int* context_lens;  // [num_seqs]
    const int* block_tables;  // [num_seqs, table_width]
    int64 q_token_stride;
    int num_seqs, num_heads, num_kv_heads, head_dim;
    int num_blocks, block_size, table_width;
    int min_query_len, max_query_len;  // the kernel leaves sequences with fewer or more query tokens to another
    int window;                        // INT_MAX for all keys
    float scale;
    float soft_cap;  // 0 for none

    __device__ __forceinline__ int group() const { return num_heads / num_kv_heads; }
};

/* One sequence's query tokens and keys. */
struct Sequence {
    int first_token, query_len, context_len;

    __device__ __forceinline__ Sequence(const AttentionInputs& in, int seq) {
        first_token = in.query_start[seq];
        query_len = in.query_start[seq + 1] - first_token;
        context_len = min(in.context_lens[seq], in.table_width * in.block_size);
    }

    /* Whether this kernel has to compute it. What pads a captured graph has no query tokens, so that none does. */
    __device__ __forceinline__ bool is_served(const AttentionInputs& in) const {
        return query_len >= in.min_query_len && query_len <= in.max_query_len;
    }

    /* The keys [begin, end) that token t sees. */
    __device__ __forceinline__ int end_key(int t) const { return context_len - query_len + t + 1; }
    __device__ __forceinline__ int begin_key(int t, int window) const { return max(0, end_key(t) - window); }
};

/* Where keys lie. Blocks of 16 keys, the usual case, are spared the divisions. */
__device__ __forceinline__ int block_of_key(const AttentionInputs& in, int seq, int key) {
    const int column = clamp_index(in.block_size == 16 ? key / 16 : key / in.block_size, in.table_width);
    return clamp_index(in.block_tables[(int64)seq * in.table_width + column], in.num_blocks);
}

/* The first element of a key of one head in k_cache or v_cache, given its block. */
__device__ __forceinline__ int64 offset_of_key(const AttentionInputs& in, int block, int key, int kv_head) {
    const int row = in.block_size == 16 ? key % 16 : key % in.block_size;
    return (((int64)block * in.block_size + row) * in.num_kv_heads + kv_head) * in.head_dim;
}

/* A position in the concatenation of all sequences' units of work. */
struct Located {
    int seq;     // the sequence it lies in, or -1 if it lies behind the last unit
    int offset;  // units before it in that sequence
};

/* Finds N positions when sequence s has units_of(s) units: the unit target_of(i, total) for every i < N, total being the
   units of all sequences, which is returned. To be called by all threads of the block; all get the same. */
template <int N, typename UnitsOf, typename TargetOf>
__device__ int locate(Located (&found)[N], int num_seqs, UnitsOf units_of, TargetOf target_of) {
    __shared__ int warp_totals[WARP_SIZE];
    __shared__ Located positions[N];
    if (num_seqs == 1) {
        const int total = units_of(0);
#pragma unroll
        for (int i = 0; i < N; ++i) found[i] = {target_of(i, total) < total ? 0 : -1, target_of(i, total)};
        return total;
    }
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, num_warps = blockDim.x / WARP_SIZE;
    const int share = (num_seqs + blockDim.x - 1) / blockDim.x;
    const int begin = min((int)threadIdx.x * share, num_seqs), end = min(begin + share, num_seqs);
    int mine = 0;
    for (int s = begin; s < end; ++s) mine += units_of(s);

    int before = mine;  // inclusive sum over the warp's lanes up to this one
#pragma unroll
    for (int step = 1; step < WARP_SIZE; step *= 2) {
        const int other = __shfl_up_sync(FULL_WARP, before, step);
        if (lane >= step) before += other;
    }
    if (lane == WARP_SIZE - 1) warp_totals[warp] = before;
    if (threadIdx.x < N) positions[threadIdx.x] = {-1, 0};
    __syncthreads();
    before -= mine;
    int total = 0;
    for (int w = 0; w < num_warps; ++w) {
        if (w < warp) before += warp_totals[w];
        total += warp_totals[w];
    }

#pragma unroll
    for (int i = 0; i < N; ++i) {
        int rest = target_of(i, total) - before;
        if (rest < 0 || rest >= mine) continue;
        int s = begin;
        for (int units = units_of(s); rest >= units; units = units_of(++s)) rest -= units;
        positions[i] = {s, rest};
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) found[i] = positions[i];
    return total;
}

/* exp2 arguments from scores: softmax weights are exp2(factor * capped(score) - factor * max). */
struct ScoreScale {
    float inner;   // of the tanh; 0 without soft cap
    float factor;

    __device__ __forceinline__ explicit ScoreScale(const AttentionInputs& in) {
        inner = in.soft_cap > 0.0f ? in.scale / in.soft_cap : 0.0f;
        factor = (in.soft_cap > 0.0f ? in.soft_cap : in.scale) * LOG2_E;
    }

    __device__ __forceinline__ float capped(float score) const { return inner > 0.0f ? tanhf(score * inner) : score; }
};

/* A maximum to subtract: 0 where nothing has been seen yet, so that no inf - inf arises. */
__device__ __forceinline__ float finite_or_zero(float x) { return x == minus_infinity() ? 0.0f : x; }
