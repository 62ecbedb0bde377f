/* Hopper's own instructions (sm_90a): warpgroup matrix products, barriers in shared memory, moving registers between warps.

   A warpgroup is 4 consecutive warps, the first a multiple of 4. wgmma computes D[64, N] += A[64, 16] B[16, N] in the
   background; warp w holds rows 16w..16w+15 of A and D, laid out as mma.cuh says, D as N / 8 tiles side by side.
   Operands in shared memory lie in panels of 64 columns: rows of 128 bytes, whose eight 16-byte chunks are exchanged by
   chunk ^ (row % 8); panels begin at multiples of 1024 bytes. */
#pragma once
#include "memory.cuh"

constexpr int PANEL_COLUMNS = 64, PANEL_ROW_BYTES = 128;

/* Where a chunk of a row lies in an operand of `rows` rows. */
__device__ __forceinline__ uint32 panel_offset(int rows, int row, int chunk) {
    return (chunk / 8 * rows + row) * PANEL_ROW_BYTES + (chunk % 8 ^ row % 8) * 16;
}

/* Describes an operand for wgmma. Along K (columns contiguous): panel_stride is unused. Along M or N (rows are K):
   panel_stride bytes separate panels. 8 rows take 1024 bytes in either case. */
__device__ __forceinline__ uint64 operand(uint32 address, int panel_stride) {
    return (uint64)1 << 62 | (uint64)(1024 / 16) << 32 | (uint64)(panel_stride / 16) << 16 | (address & 0x3ffff) / 16;
}

/* The same operand `bytes` further on, a multiple of 16. */
__device__ __forceinline__ uint64 advanced(uint64 operand, int bytes) { return operand + bytes / 16; }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Waits until at most PENDING groups are under way. */
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Keeps the compiler from moving work on these registers across: from before a wait to behind it, or the reverse. */
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

/* Keeps arithmetic above the wait that follows: the assembler sinks what does not depend on the wait below it. The sleep
   hangs on a result that is never negative, so it never happens. */
__device__ __forceinline__ void finish_before_wait(float result) {
    if (result < 0.0f) asm volatile("nanosleep.u32 0;" ::: "memory");
}

#define D4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define D16(n) D4(n), D4(n + 1), D4(n + 2), D4(n + 3)
#define D32(n) D16(n), D16(n + 4)
#define LIST4 "%0,%1,%2,%3"
#define LIST8 LIST4 ",%4,%5,%6,%7"
#define LIST16 LIST8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST32 LIST16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST64 \
    LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
           "%58,%59,%60,%61,%62,%63"
#define LIST128 \
    LIST64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
           "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112," \
           "%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

/* One asm statement per shape, type and source of A; is_sum says whether D is added to or overwritten. */
#define WGMMA_SHARED(TYPE, N, NAME, LIST, D_REGISTERS, A, B, SUM)                                                       \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma<TYPE>(float (&d)[N / 8][4], uint64 a, uint64 b, bool is_sum) {               \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " SUM ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME  \
                     " {" LIST "}, " A ", " B ", p, 1, 1, 0, 0; }"                                                     \
                     : D_REGISTERS : "l"(a), "l"(b), "r"((int)is_sum));                                                \
    }
#define WGMMA_REGISTERS(TYPE, N, NAME, LIST, D_REGISTERS, A, B)                                                         \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma_transposed<TYPE>(float (&d)[N / 8][4], const uint32 (&a)[4], uint64 b) {     \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME " {" LIST "}, {" A "}, " B ", 1, 1, 1, 1;"  \
                     : D_REGISTERS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                              \
    }

/* D (+)= A B' with A [64, 16] and B [N, 16] in shared memory, both along K. */
template <typename T, int TILES>
__device__ __forceinline__ void wgmma(float (&d)[TILES][4], uint64 a, uint64 b, bool is_sum);

/* D += A B with A [64, 16] in registers and B [16, N] in shared memory, rows K. */
template <typename T, int TILES>
__device__ __forceinline__ void wgmma_transposed(float (&d)[TILES][4], const uint32 (&a)[4], uint64 b);

#define D_OF_8 D4(0)
#define D_OF_16 D4(0), D4(1)
#define D_OF_32 D16(0)
#define D_OF_64 D32(0)
#define D_OF_128 D32(0), D32(8)
#define D_OF_256 D32(0), D32(8), D32(16), D32(24)
WGMMA_SHARED(bf16, 8, "bf16.bf16", LIST4, D_OF_8, "%4", "%5", "%6")
WGMMA_SHARED(fp16, 8, "f16.f16", LIST4, D_OF_8, "%4", "%5", "%6")
WGMMA_SHARED(bf16, 16, "bf16.bf16", LIST8, D_OF_16, "%8", "%9", "%10")
WGMMA_SHARED(fp16, 16, "f16.f16", LIST8, D_OF_16, "%8", "%9", "%10")
WGMMA_SHARED(bf16, 32, "bf16.bf16", LIST16, D_OF_32, "%16", "%17", "%18")
WGMMA_SHARED(fp16, 32, "f16.f16", LIST16, D_OF_32, "%16", "%17", "%18")
WGMMA_SHARED(bf16, 64, "bf16.bf16", LIST32, D_OF_64, "%32", "%33", "%34")
WGMMA_SHARED(fp16, 64, "f16.f16", LIST32, D_OF_64, "%32", "%33", "%34")
WGMMA_SHARED(bf16, 128, "bf16.bf16", LIST64, D_OF_128, "%64", "%65", "%66")
WGMMA_SHARED(fp16, 128, "f16.f16", LIST64, D_OF_128, "%64", "%65", "%66")
WGMMA_SHARED(bf16, 256, "bf16.bf16", LIST128, D_OF_256, "%128", "%129", "%130")
WGMMA_SHARED(fp16, 256, "f16.f16", LIST128, D_OF_256, "%128", "%129", "%130")
WGMMA_REGISTERS(bf16, 64, "bf16.bf16", LIST32, D_OF_64, "%32,%33,%34,%35", "%36")
WGMMA_REGISTERS(fp16, 64, "f16.f16", LIST32, D_OF_64, "%32,%33,%34,%35", "%36")
WGMMA_REGISTERS(bf16, 128, "bf16.bf16", LIST64, D_OF_128, "%64,%65,%66,%67", "%68")
WGMMA_REGISTERS(fp16, 128, "f16.f16", LIST64, D_OF_128, "%64,%65,%66,%67", "%68")

/* Makes finished writes to shared memory that this thread knows of visible to its wgmma. */
__device__ __forceinline__ void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* A barrier whose phases complete after `arrivals` arrivals. Initialize by one thread, then synchronize the block. */
__device__ __forceinline__ void barrier_init(uint32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/* Arrives once this thread's copies so far (cp_async_16) are complete. */
__device__ __forceinline__ void barrier_arrive_after_copies(uint32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Waits until the phase of this parity has completed: 0 for the first, third, ... Before the first, 1 counts as completed. */
__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity) {
    uint32 is_complete;
    do
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(is_complete) : "r"(barrier), "r"(parity) : "memory");
    while (!is_complete);
}

/* Barriers by number, 1 to 15, among `threads` threads: those that wait and those that only arrive. */
__device__ __forceinline__ void named_barrier_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* Registers per thread from here on, for a whole warpgroup: fewer, or more once others have released them. */
template <int COUNT>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
