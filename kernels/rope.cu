/* Rotary position embedding of a fused projection, and its keys and values into the cache:
       (first, second) = (first * cos - second * sin, second * cos + first * sin)
   for the halves [0, R/2) and [R/2, R) of every query and key head; dimensions from R on stay as they are.
   qkv [num_tokens, num_heads + 2 * num_kv_heads, head_dim] T: queries are rotated in place, keys and values only read
   table [num_positions, 2, R/2] float: cosines, sines; positions, slots [num_tokens] int, a negative slot stores nothing
   k_cache, v_cache [num_slots, num_kv_heads, head_dim] T
   grid (num_tokens), block (up to 256)
   requires R/2, head_dim - R and head_dim % VEC == 0 and, for VEC > 1, arrays aligned to VEC elements
   bound: memory, 2 * num_tokens * (num_heads + 2 * num_kv_heads) * head_dim * sizeof(T) bytes */
#include "common/overlap.cuh"
#include "common/types.cuh"

template <typename T, int VEC>
__device__ __forceinline__ void rotate(Vec<T, VEC>& first, Vec<T, VEC>& second, const float* cosines, const float* sines) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        const float a = to_float(first.at[j]), b = to_float(second.at[j]);
        const float c = __ldg(cosines + j), s = __ldg(sines + j);
        first.at[j] = from_float<T>(a * c - b * s);
        second.at[j] = from_float<T>(b * c + a * s);
    }
}

template <typename T, int VEC>
__global__ void rope_and_write_kv(T* qkv, T* k_cache, T* v_cache, const float* table, const int* positions,
                                  const int* slots, int num_heads, int num_kv_heads, int head_dim, int half,
                                  int num_positions, int64 num_slots) {
    overlap_launches();
    const int token = blockIdx.x;
    const int64 slot = slots[token];
    const bool is_stored = slot >= 0 && slot < num_slots;
    const float* cosines = table + (int64)clamp_index(positions[token], num_positions) * 2 * half;
    T* heads = qkv + (int64)token * (num_heads + 2 * num_kv_heads) * head_dim;
    T* k_row = k_cache + (is_stored ? slot : 0) * num_kv_heads * head_dim;
    T* v_row = v_cache + (is_stored ? slot : 0) * num_kv_heads * head_dim;

    const int vecs_per_half = half / VEC;
    for (int i = threadIdx.x; i < (num_heads + num_kv_heads) * vecs_per_half; i += blockDim.x) {
        const int head = i / vecs_per_half, offset = i % vecs_per_half * VEC;
        const bool is_key = head >= num_heads;
        if (is_key && !is_stored) continue;
        const T* from = heads + head * head_dim + offset;
        T* to = is_key ? k_row + (head - num_heads) * head_dim + offset : heads + head * head_dim + offset;
        Vec<T, VEC> first = load<VEC>(from), second = load<VEC>(from + half);
        rotate(first, second, cosines + offset, cosines + half + offset);
        store(to, first);
        store(to + half, second);
    }
    if (!is_stored) return;

    const int unrotated = head_dim - 2 * half, vecs_per_rest = unrotated / VEC;
    for (int i = threadIdx.x; i < num_kv_heads * vecs_per_rest; i += blockDim.x) {
        const int offset = i / vecs_per_rest * head_dim + 2 * half + i % vecs_per_rest * VEC;
        store(k_row + offset, load<VEC>(heads + num_heads * head_dim + offset));
    }
    for (int i = threadIdx.x * VEC; i < num_kv_heads * head_dim; i += blockDim.x * VEC)
        store(v_row + i, load<VEC>(heads + (num_heads + num_kv_heads) * head_dim + i));
}
