// machine.cuh in plain C++, so that the kernels' sources run on a CPU: a thread for each CUDA thread, one block after another, in a random
// order. Slow, and strict: a copy lands when it is waited for and its target is garbage until then; addresses are checked for range and
// alignment; shared memory begins as garbage.

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __shared__ static
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
using std::max;
using std::min;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct int4 { int x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { u32 x; };
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

static void die(const char* what) {
    fprintf(stderr, "host machine: %s\n", what);
    _exit(3);
}

enum { FIRST = 1024, MOST_WARPS = 8 };
static u8 shared_memory[1 << 18];
static u32 shared_end;
static u32 place(u32 at, u32 size) {
    if (at < FIRST || at + size > shared_end || at % size) die("shared memory: out of range or misaligned");
    return at;
}
static struct { const u8 *first, *end; } readable[3];

static const u8* known(const void* from, u32 size) {
    const u8* at = (const u8*)from;
    bool inside = false;
    for (auto& range : readable) inside |= at >= range.first && at + size <= range.end;
    if (!inside || (uintptr_t)at % size) die("global memory: out of range or misaligned");
    return at;
}

struct Copy { u32 to; const void* from; };
static thread_local std::vector<Copy> asked;
static void copy16(u32 to, const void* from) {
    known(from, 16);
    memset(shared_memory + place(to, 16), 0xee, 16);
    asked.push_back({to, from});
}
// Barriers in shared memory lie below TABLE_AT, where `place` lets nobody else write.
struct Run { u32 to; const u8* from; u32 bytes; };
struct Barrier {
    std::atomic<u32> count, pending, phase;
    std::mutex lock;
    std::vector<Run> runs;  // by the copy engine: they land when somebody waits
};
static Barrier barriers[128];
static Barrier& barrier_at(u32 at) {
    if (at < FIRST || at >= FIRST + 8 * 128 || at % 8) die("barrier: out of range or misaligned");
    return barriers[(at - FIRST) / 8];
}
static void init_barrier(u32 at, u32 count) {
    Barrier& barrier = barrier_at(at);
    barrier.count = barrier.pending = count;
    barrier.phase = 0;
    barrier.runs.clear();
}
static void barriers_are_there() {}
static void arrive_at(u32 at) {
    Barrier& barrier = barrier_at(at);
    if (barrier.pending.fetch_sub(1) == 1) {
        barrier.pending = barrier.count.load();
        barrier.phase++;
    }
}
static void arrive_when_copied(u32 at) {
    for (auto& copy : asked) memcpy(shared_memory + copy.to, copy.from, 16);
    asked.clear();
    arrive_at(at);
}
#define FILL_ARRIVALS 1
static void fill(u32 at, u32 to, const u8* from, u32 bytes, u32 to2, const u8* from2, u32 bytes2, u32 lane) {
    if (lane != 0) return;
    for (const Run& run : {Run{to, from, bytes}, Run{to2, from2, bytes2}}) {
        if (run.bytes % 16 || run.bytes == 0) die("copy engine: not a multiple of 16");
        for (u32 i = 0; i < run.bytes; i += 16) memset(shared_memory + place(run.to + i, 16), 0xee, 16), known(run.from + i, 16);
        std::lock_guard<std::mutex> guard(barrier_at(at).lock);
        barrier_at(at).runs.push_back(run);
    }
    arrive_at(at);
}
static void wait_at(u32 at, u32 parity) {
    {
        std::lock_guard<std::mutex> guard(barrier_at(at).lock);
        for (const Run& run : barrier_at(at).runs) memcpy(shared_memory + run.to, run.from, run.bytes);
        barrier_at(at).runs.clear();
    }
    while ((barrier_at(at).phase & 1) == parity) std::this_thread::yield();
}

template <class T> static T read_shared(u32 at) {
    T v;
    memcpy(&v, shared_memory + place(at, sizeof v), sizeof v);
    return v;
}
static u32 shared_base() { return FIRST; }
static uint4 read16(u32 at) { return read_shared<uint4>(at); }
template <int OFFSET> static u32 read4(u32 at) { return read_shared<u32>(at + OFFSET); }
static u32 read1(u32 at) { return read_shared<u8>(at); }
static void store4(u32 at, float v) { memcpy(shared_memory + place(at, 4), &v, 4); }
static void store_four_times(u32 at, u32 v) {
    for (u32 i = place(at, 16); i < at + 16; i += 4) memcpy(shared_memory + i, &v, 4);
}

static pthread_barrier_t warp_barrier[MOST_WARPS], block_barrier;
static u32 lane_id() { return threadIdx.x & 31; }
static void __syncwarp() { pthread_barrier_wait(&warp_barrier[threadIdx.x >> 5]); }
static void __syncthreads() { pthread_barrier_wait(&block_barrier); }
template <class T> static T __shfl_sync(u32, T v, u32 source) {
    static T given[MOST_WARPS][32];
    T(&mine)[32] = given[threadIdx.x >> 5];
    mine[lane_id()] = v;
    __syncwarp();
    const T found = mine[source & 31];
    __syncwarp();
    return found;
}
static float bf16(u32 bits) {
    bits <<= 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
static u16 to_bf16(float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static u32 to_bf16_pair(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
static void multiply(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    static u32 given[MOST_WARPS][32][6];
    auto& all = given[threadIdx.x >> 5];
    const u32 lane = lane_id(), mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(all[lane], mine, sizeof mine);
    __syncwarp();
    auto half = [](u32 pair, int odd) { return bf16(odd ? pair >> 16 : pair & 0xffff); };
    for (int c = 0; c < 4; c++) {
        const int row = (lane >> 2) + 8 * (c >> 1), column = 2 * (lane & 3) + (c & 1);
        double sum = acc[c];
        for (int k = 0; k < 16; k++) {
            const u32 left = all[(row & 7) * 4 + (k & 7) / 2][(row >> 3) + 2 * (k >> 3)];
            const u32 right = all[column * 4 + (k & 7) / 2][4 + (k >> 3)];
            sum += (double)half(left, k & 1) * half(right, k & 1);
        }
        acc[c] = (float)sum;
    }
    __syncwarp();
}
static u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u8 source[8];
    memcpy(source, &a, 4);
    memcpy(source + 4, &b, 4);
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> (4 * i) & 15, byte = source[nibble & 7];
        out |= (nibble & 8 ? (byte >> 7) * 255 : byte) << (8 * i);
    }
    return out;
}
static u32 __byte_perm(u32 a, u32 b, u32 selector) { return permute_bytes(a, b, selector & 0x7777); }  // as on the GPU: no signs

static u32 arrive(u32* counter) { return __sync_fetch_and_add(counter, 1u); }
static void acquire() { __sync_synchronize(); }
static void let_next_begin() {}
static void wait_for_previous() {}
static float __int_as_float(int v) { float f; memcpy(&f, &v, 4); return f; }
static float __uint_as_float(u32 v) { return __int_as_float((int)v); }
template <class T> static T __ldcg(const T* at) { return *at; }
template <class T> static void __stcg(T* at, T v) { *at = v; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { volatile float s = a + b; return s; }

// A launch: `warps` warps a block; the kernel may copy from `ranges`.
template <class Kernel> static void run_blocks(u32 blocks, u32 warps, u32 shared_bytes, const void* const* ranges, Kernel kernel) {
    shared_end = FIRST + shared_bytes;
    gridDim.x = blocks;
    for (int i = 0; i < 3; i++) readable[i] = {(const u8*)ranges[2 * i], (const u8*)ranges[2 * i + 1]};
    std::vector<u32> order(blocks);
    for (u32 i = 0; i < blocks; i++) order[i] = i;
    for (u32 i = blocks; i > 1; i--) std::swap(order[i - 1], order[rand() % i]);
    for (u32 block : order) {
        memset(shared_memory, 0xee, sizeof shared_memory);
        for (u32 w = 0; w < warps; w++) pthread_barrier_init(&warp_barrier[w], nullptr, 32);
        pthread_barrier_init(&block_barrier, nullptr, 32 * warps);
        std::vector<std::thread> threads;
        for (u32 t = 0; t < 32 * warps; t++)
            threads.emplace_back([=] {
                threadIdx.x = t;
                blockIdx.x = block;
                kernel();
            });
        for (auto& thread : threads) thread.join();
    }
}
