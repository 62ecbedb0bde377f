/* Activation functions, elementwise, in float32:
       activate_and_mul:  out[t, i] = F(gate_up[t, i]) * gate_up[t, inter + i]
       activate:          out[i] = F(x[i])
   gate_up [num_tokens, 2 * inter] T, out [num_tokens, inter] T; x, out [n] T, may be the same; all contiguous
   grid (ceil(vectors / block)), block (256): a thread computes one vector
   requires inter (n) % VEC == 0, fewer than 2^31 vectors and, for VEC > 1, arrays aligned to VEC elements
   bound: memory, 3 * num_tokens * inter * sizeof(T) bytes (2 * n * sizeof(T)) */
#include "common/activations.cuh"
#include "common/overlap.cuh"
#include "common/types.cuh"

template <typename T, int VEC, typename F>
__global__ void __launch_bounds__(256) activate_and_mul(T* out, const T* gate_up, int inter, uint32 num_vecs) {
    overlap_launches();
    const uint32 vec = blockIdx.x * blockDim.x + threadIdx.x;
    if (vec >= num_vecs) return;
    const uint32 vecs_per_row = inter / VEC;
    const uint32 row = vec / vecs_per_row, column = vec % vecs_per_row * VEC;
    const T* gate = gate_up + (int64)row * 2 * inter + column;
    const Vec<T, VEC> gates = load<VEC>(gate), ups = load<VEC>(gate + inter);
    Vec<T, VEC> result;
#pragma unroll
    for (int j = 0; j < VEC; ++j)
        result.at[j] = from_float<T>(F::apply(to_float(gates.at[j])) * to_float(ups.at[j]));
    store(out + (int64)row * inter + column, result);
}

template <typename T, int VEC, typename F>
__global__ void __launch_bounds__(256) activate(T* out, const T* x, uint32 num_vecs) {
    overlap_launches();
    const uint32 vec = blockIdx.x * blockDim.x + threadIdx.x;
    if (vec >= num_vecs) return;
    const Vec<T, VEC> values = load<VEC>(x + (int64)vec * VEC);
    Vec<T, VEC> result;
#pragma unroll
    for (int j = 0; j < VEC; ++j) result.at[j] = from_float<T>(F::apply(to_float(values.at[j])));
    store(out + (int64)vec * VEC, result);
}
