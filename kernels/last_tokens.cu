/* Token ids that only the device knows: a negative id, -1 - slot, becomes the token last drawn in that slot
   token_ids [num_tokens] int, in place; last_tokens [num_slots] int
   grid (ceil(num_tokens / 256)), block (256)
   bound: launch */
#include "common/overlap.cuh"
#include "common/types.cuh"

__global__ void take_last_tokens(int* token_ids, const int* last_tokens, int num_tokens, int num_slots) {
    overlap_launches();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_tokens || token_ids[i] >= 0) return;
    token_ids[i] = last_tokens[clamp_index(-1 - token_ids[i], num_slots)];
}
