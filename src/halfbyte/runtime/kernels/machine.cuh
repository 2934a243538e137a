// The machine's own instructions, one function each, and nothing else: what the kernels need of PTX. The tests have a second
// set of the same functions in plain C++ (tests/runtime/host_machine.h), with which the kernels' sources run on a CPU.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;

// 16 bytes from global to shared memory, on their way until a barrier says that they are there.
__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Barriers in shared memory, by address: `count` arrivals end a phase; phases have parities 0, 1, 0, ...
__device__ __forceinline__ void init_barrier(u32 at, u32 count) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory"); }
__device__ __forceinline__ void arrive_at(u32 at) { asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(at) : "memory"); }
// Arrives when all copies that this thread has asked for so far have ended.
__device__ __forceinline__ void arrive_when_copied(u32 at) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory"); }
// Other threads, and the copy engine, may use the barriers that this thread has initialised (behind a barrier of threads).
__device__ __forceinline__ void barriers_are_there() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Waits for the end of the phase with this parity.
__device__ __forceinline__ void wait_at(u32 at, u32 parity) {
    u32 ended;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ended) : "r"(at), "r"(parity) : "memory");
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(ended) : "r"(at), "r"(parity) : "memory");
#endif
    } while (!ended);
}

// Two runs of bytes, multiples of 16, from global to shared memory by a warp; `barrier` has FILL_ARRIVALS more arrivals when they are there.
#if __CUDA_ARCH__ >= 900
#define FILL_ARRIVALS 1
__device__ __forceinline__ void copy_run(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void fill(u32 barrier, u32 to, const u8* from, u32 bytes, u32 to2, const u8* from2, u32 bytes2, u32 lane) {
    if (lane != 0) return;
    asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(barrier), "r"(bytes + bytes2) : "memory");
    copy_run(to, from, bytes, barrier);
    copy_run(to2, from2, bytes2, barrier);
}
#else
#define FILL_ARRIVALS 32
__device__ __forceinline__ void fill(u32 barrier, u32 to, const u8* from, u32 bytes, u32 to2, const u8* from2, u32 bytes2, u32 lane) {
    for (u32 i = lane * 16; i < bytes; i += 512) copy16(to + i, from + i);
    for (u32 i = lane * 16; i < bytes2; i += 512) copy16(to2 + i, from2 + i);
    arrive_when_copied(barrier);
}
#endif

// Shared memory, by address.
__device__ __forceinline__ u32 shared_base() {
    extern __shared__ __align__(1024) u8 memory[];
    return (u32)__cvta_generic_to_shared(memory);
}
__device__ __forceinline__ uint4 read16(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
template <int OFFSET> __device__ __forceinline__ u32 read4(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(at), "n"(OFFSET));
    return v;
}
__device__ __forceinline__ u32 read1(u32 at) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ void store_four_times(u32 at, u32 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(v) : "memory");
}
__device__ __forceinline__ void store4(u32 at, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory"); }

// acc[16 x 8] += a[16 x 16] b[16 x 8], spread over the warp as the PTX manual says.
__device__ __forceinline__ void multiply(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To nearest even.
__device__ __forceinline__ u16 to_bf16(float v) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
__device__ __forceinline__ u32 to_bf16_pair(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

// Four bytes chosen from a and b; a nibble of the selector with its top bit set spreads the top bit of its byte (__byte_perm does not).
__device__ __forceinline__ u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selector));
    return v;
}

__device__ __forceinline__ u32 lane_id() {
    u32 lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}
// Count an arrival after everything this warp wrote (a barrier of the warp must come before), and see what others wrote before theirs.
__device__ __forceinline__ u32 arrive(u32* counter) {
    u32 before;
    asm volatile("atom.release.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
__device__ __forceinline__ void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Programmatic serialization: the next launch may begin; the previous one has ended and its writes are there.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
