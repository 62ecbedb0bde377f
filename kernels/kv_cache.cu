/* Writing keys and values into cache blocks, and copying whole blocks.
   A cache is [num_blocks, block_size, num_kv_heads, head_dim] T; slot s is row s of [num_blocks * block_size, row],
   row = num_kv_heads * head_dim. A negative slot marks a token that is not stored. */
#include "common/overlap.cuh"
#include "common/types.cuh"

/* k_cache[slots[t]] = k[t], v_cache[slots[t]] = v[t]
   k, v [num_tokens, row] T, rows token_stride elements apart; slots [num_tokens] int
   grid (num_tokens), block (up to 256)
   requires row % VEC == 0, token_stride % VEC == 0 and, for VEC > 1, arrays aligned to VEC elements
   bound: memory, 4 * num_tokens * row * sizeof(T) bytes */
template <typename T, int VEC>
__global__ void write_kv(T* k_cache, T* v_cache, const T* k, const T* v, const int* slots, int row, int64 token_stride,
                         int64 num_slots) {
    overlap_launches();
    const int64 slot = slots[blockIdx.x];
    if (slot < 0 || slot >= num_slots) return;
    const int64 from = blockIdx.x * token_stride, to = slot * row;
    for (int i = threadIdx.x * VEC; i < row; i += blockDim.x * VEC) {
        store(k_cache + to + i, load<VEC>(k + from + i));
        store(v_cache + to + i, load<VEC>(v + from + i));
    }
}

/* destination[plane, pairs[i].second] = source[plane, pairs[i].first] for every plane (layer, K or V) and every i
   source [num_planes, source_blocks, block_vecs] of 16 bytes, destination [num_planes, destination_blocks, block_vecs]:
   device memory, or page-locked host memory, which the device reads and writes in place; pairs [num_pairs, 2] int
   grid (num_pairs, num_planes), block (256)
   requires 16-byte alignment; no block both read and written
   bound: memory, 2 * 16 * num_pairs * num_planes * block_vecs bytes, or one PCIe transfer of half of them */
__global__ void copy_blocks(uint4* destination, const uint4* source, const int* pairs, int block_vecs,
                            int source_blocks, int destination_blocks) {
    overlap_launches();
    const int64 from = clamp_index(pairs[2 * blockIdx.x], source_blocks) + (int64)blockIdx.y * source_blocks;
    const int64 to = clamp_index(pairs[2 * blockIdx.x + 1], destination_blocks) + (int64)blockIdx.y * destination_blocks;
    for (int i = threadIdx.x; i < block_vecs; i += blockDim.x)
        destination[to * block_vecs + i] = source[from * block_vecs + i];
}
