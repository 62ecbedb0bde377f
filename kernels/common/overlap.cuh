/* Kernels that follow one another on a stream overlap (programmatic dependent launch, sm_90 and later): blocks of the next
   one start, and do what does not depend on others, as soon as there is room for them.

   Every block of every kernel awaits its predecessors, before it writes anything or reads what kernels have written.
   As all do, everything before it on the stream is complete then, and not only the last kernel. Weights and a step's
   integers, which copies have brought, may be read earlier. */
#pragma once

/* Lets the next kernel's blocks start once all of this kernel's have come here or ended. */
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void await_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* For kernels that have nothing to do before. */
__device__ __forceinline__ void overlap_launches() {
    release_successor();
    await_predecessors();
}
