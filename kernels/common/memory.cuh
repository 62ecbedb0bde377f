/* Shared memory by 32-bit address, and asynchronous copies into it (sm_80). */
#pragma once
#include "types.cuh"

/* The dynamic shared memory of the block, aligned to 16 bytes. */
__device__ __forceinline__ uint8* dynamic_shared() {
    extern __shared__ uint4 dynamic_shared_memory[];
    return reinterpret_cast<uint8*>(dynamic_shared_memory);
}

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

/* Copies 16 bytes, or writes 16 zero bytes and reads nothing if not is_valid. Complete after cp_async_wait. */
__device__ __forceinline__ void cp_async_16(uint32 to, const void* from, bool is_valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_valid ? 16 : 0) : "memory");
}

/* Closes the group of copies issued since the last commit. */
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most PENDING of this thread's groups are under way. Other threads still need a barrier. */
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
