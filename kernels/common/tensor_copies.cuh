/* Copies of boxes of a matrix between global and shared memory by the tensor memory accelerator, and clusters of blocks
   (sm_90). A map, which the host encodes, knows the matrix and the box; what of a box lies outside of the matrix is read
   as zeros and not written. Boxes here have rows of 128 bytes, laid out as hopper.cuh says. */
#pragma once
#include "memory.cuh"

/* CUtensorMap: a kernel parameter, `const __grid_constant__ TensorMap`. */
struct alignas(64) TensorMap {
    uint8 opaque[128];
};

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/* Arrives at a barrier, whose phase also awaits so many bytes of copies that signal it. */
__device__ __forceinline__ void barrier_arrive_expecting(uint32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Starts copying the box at (column, row), which signals the barrier. */
__device__ __forceinline__ void copy_box(uint32 to, const TensorMap& map, int column, int row, uint32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

/* The same of a box in four dimensions, from the innermost to the outermost. */
__device__ __forceinline__ void copy_box(uint32 to, const TensorMap& map, int a, int b, int c, int d, uint32 barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4, %5}], [%6];"
                 ::"r"(to), "l"(&map), "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier) : "memory");
}

/* Starts copying the box at (column, row, plane) to the same place in several blocks of the cluster, and signals the same
   barrier in each of them. blocks: a bit for each. */
__device__ __forceinline__ void copy_box_to_blocks(uint32 to, const TensorMap& map, int column, int row, int plane,
                                                   uint32 barrier, int blocks) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3, %4}], [%5], %6;"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(plane), "r"(barrier), "h"((short)blocks) : "memory");
}

/* Starts writing a box to (column, row), once other threads' writes to it are fenced (fence_for_wgmma) and known of. */
__device__ __forceinline__ void write_box(const TensorMap& map, int column, int row, uint32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(&map), "r"(column), "r"(row), "r"(from) : "memory");
}

/* Closes the group of this thread's writes; waits until its boxes may be overwritten; waits until all is written. */
__device__ __forceinline__ void commit_writes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void await_read_boxes() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void await_writes() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/* Which block of its cluster this is. */
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* Synchronizes all threads of the cluster's blocks, which know of one another's writes afterwards. */
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

/* The same for execution alone, without a fence, which would wait for all of the threads' memory traffic. */
__device__ __forceinline__ void cluster_sync_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed; barrier.cluster.wait;" ::: "memory");
}

/* Makes initialized barriers known to copies and to the cluster's other blocks; cluster_sync comes next. */
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/* Arrives at the barrier that lies at this address in another block of the cluster. Says nothing of ordinary writes: a
   release in the whole cluster would wait for all of the thread's memory traffic. */
__device__ __forceinline__ void barrier_arrive_at(uint32 barrier, int rank) {
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;"
                 " mbarrier.arrive.shared::cluster.b64 _, [there]; }"
                 ::"r"(barrier), "r"(rank) : "memory");
}

/* Sends four floats to this address in a block of the cluster, whose barrier at the other address awaits their bytes. */
__device__ __forceinline__ void send_to_block(uint32 address, const float (&values)[4], uint32 barrier, int rank) {
    asm volatile("{ .reg .b32 there, signal; mapa.shared::cluster.u32 there, %0, %6; mapa.shared::cluster.u32 signal, %5, %6;"
                 " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1,%2,%3,%4}, [signal]; }"
                 ::"r"(address), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier), "r"(rank)
                 : "memory");
}
