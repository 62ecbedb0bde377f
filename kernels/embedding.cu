/* Embedding lookup: out[t, :] = table[clamp(ids[t]), :]
   ids [num_tokens] I (int or int64); table [vocab, hidden] T, out [num_tokens, hidden] T, rows contiguous
   grid (num_tokens), block (up to 256): threads walk the row by vectors
   requires hidden % VEC == 0 and, for VEC > 1, arrays aligned to VEC elements
   bound: memory, 2 * num_tokens * hidden * sizeof(T) bytes */
#include "common/overlap.cuh"
#include "common/types.cuh"

template <typename T, int VEC, typename I>
__global__ void embedding(T* out, const T* table, const I* ids, int hidden, I vocab) {
    overlap_launches();
    const int64 from = clamp_index(ids[blockIdx.x], vocab) * (int64)hidden, to = blockIdx.x * (int64)hidden;
    for (int i = threadIdx.x * VEC; i < hidden; i += blockDim.x * VEC) store(out + to + i, load<VEC>(table + from + i));
}
