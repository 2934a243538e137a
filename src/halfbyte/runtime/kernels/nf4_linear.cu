// y[M, N] = x[M, K] W^T for an NF4 weight W[N, K] in the tiled layout of halfbyte.runtime.linear.layout. bf16 in and out.
//
// The weight is read once, in 16-byte loads, and everything else is arranged around that:
//   * A warp works on a *unit*: ROW_TILES tiles of 16 rows x 64 columns. All units of a slice of K form one sequence (row group
//     after row group); each warp of the grid takes an equal, contiguous part of it. No warp idles, whatever N and K are.
//   * cp.async brings units into a ring private to the warp; DEPTH - 1 of them are on their way at any time.
//   * A byte of weight is a pair of levels. One look-up in a shared table, replicated for each bank (no conflicts), turns it
//     into the register that mma.m16n8k16 wants: weights are its M side, activations its 8 columns. So M = 1..8 costs the same.
//     ALU_WORDS of the four words of a tile are decoded with byte permutes instead, which takes load off shared memory.
//   * Scales stay one byte a block. A lane expands one of the unit's 32 (map[code] * nested + offset), shuffles hand them
//     around, and they multiply fp32 accumulators. So the weight is never rounded, only the 16 levels are (Params::unit).
//   * What the warps of a block have of the same row group is added up in shared memory; what is not whole then goes to `partial`, and
//     whoever arrives last adds all of that, in the order of K. Which parts there are depends on N, K and the grid only, never on
//     M nor on timing: equal inputs give equal bits, and a row of x gives the same bits in any batch of 1 to 16.
//
// Compiled by NVRTC. The index arithmetic is walked through in Python by tests/runtime/emulation.py, and this very source runs on a
// CPU in tests/runtime/test_host.py.

#include "machine.cuh"

#ifndef WARPS
#define WARPS 16       // warps in a block; a launch has one block a multiprocessor
#endif
#ifndef RESIDENT
#define RESIDENT 1     // blocks that must fit a multiprocessor: 2 lets the next launch get ready beside this one (EARLY)
#endif
#ifndef ROW_TILES
#define ROW_TILES 2    // row tiles in a unit: 1 or 2
#endif
#ifndef GROUPS
#define GROUPS 1       // groups of 8 columns: M <= 8 * GROUPS
#endif
#ifndef DEPTH
#define DEPTH 4        // units in the ring of a warp
#endif
#ifndef ALU_WORDS
#define ALU_WORDS 0    // words of a tile, of 4, that are decoded without the table
#endif
#ifndef TABLE_STRIDE
#define TABLE_STRIDE 256  // bytes from entry to entry: 256 finds an address in one instruction, 128 in two, in half the memory
#endif
#ifndef SUBS
#define SUBS 1         // scales of a row in 64 columns: blocks of 64 or 32
#endif
#ifndef EARLY
#define EARLY 0        // 1: launched with programmatic serialization, weights are read before the previous kernel has ended
#endif
#ifndef PREFETCH
#define PREFETCH 0     // with EARLY: units of each warp that are fetched as far as the L2 cache while the previous kernel still runs
#endif
#define MAPS 4         // parts stacked in one weight, at most

struct Params {
    const u8* weight;     // [row groups][k blocks][ROW_TILES][512]
    const u8* codes;      // [row groups][k blocks][SUBS][8][2 * ROW_TILES]
    const float* nested;  // nested absmax, part after part
    const int4* groups;   // per row group: {first: block number of row 0, k block 0 in `nested` terms; offset's bits; map; 0}
    const float* maps;    // [parts][256]
    const u32* table;     // [256] byte -> bf16 pair, scaled by 1 / unit
    const u16* x;         // [m][64 * k_blocks]
    u16* y;               // [m][n]
    float* partial;
    u32* counters;        // [row groups], zero before and after
    const u32* parts_of;  // [row groups * slices + 1]: number of the first part in `partial`
    u32 m, n, row_groups, k_blocks, slices, slice_warps, maps_count, reserved;
    float unit;
};

static_assert(GROUPS * ROW_TILES <= 8 && DEPTH >= 2 && ALU_WORDS >= 0 && ALU_WORDS <= 4, "variant");

// Addresses in shared memory. The block's own part begins at 0 or 1024, depending on the architecture; the table at exactly
// TABLE_AT, so that this is an immediate of the load and the rest of an address comes out of one byte permute.
#define TABLE_AT 2048
#define TABLE_BYTES (ALU_WORDS == 4 ? 0 : 256 * TABLE_STRIDE)
#define UNIT_BYTES (512 * ROW_TILES)
#define CODE_BYTES (16 * ROW_TILES * SUBS)
#define STAGE_BYTES (UNIT_BYTES + CODE_BYTES)
#define MAP_AT (TABLE_AT + TABLE_BYTES)
#define RING_AT (MAP_AT + MAPS * 1024)
#define X_AT (RING_AT + WARPS * DEPTH * STAGE_BYTES)

#include "decode.cuh"

// Warp w of a slice has units [first_unit(w), first_unit(w + 1)). The host checks that (units + 1) * warps fits 32 bits.
__device__ __forceinline__ u32 first_unit(u32 w, u32 units, u32 warps) { return w * units / warps; }
__device__ __forceinline__ u32 owner(u32 unit, u32 units, u32 warps) { return ((unit + 1) * warps - 1) / units; }

typedef float Sums[ROW_TILES][GROUPS][4];

__device__ __forceinline__ void write(const Params& p, const Sums& sums, u32 row_group, u32 lane) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int q = 0; q < GROUPS; q++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const u32 row = (row_group * ROW_TILES + i) * 16 + (lane >> 2) + 8 * (c >> 1);
                const u32 column = 8 * q + 2 * (lane & 3) + (c & 1);
                if (column < p.m) p.y[(u64)column * p.n + row] = to_bf16(sums[i][q][c] * p.unit);
            }
}

#define PART (ROW_TILES * GROUPS * 32)  // float4s of a part

// Leaves a block's part of a row group; the last of all parts to arrive adds them up and writes the result. Parts of a row
// group lie one after the other, in the order of K: `first` .. `first + expected`, `mine` among them.
__device__ __forceinline__ void leave(const Params& p, const Sums& sums, u32 row_group, u32 mine, u32 lane) {
    const bool useful = 2 * (lane & 3) < p.m;
    float4* part = reinterpret_cast<float4*>(p.partial) + (u64)mine * PART + lane;
#pragma unroll
    for (int i = 0; i < ROW_TILES * GROUPS; i++) {
        const float(&v)[4] = sums[i / GROUPS][i % GROUPS];
        if (useful && (i % GROUPS == 0 || 8 * (i % GROUPS) + 2 * (lane & 3) < p.m)) __stcg(part + i * 32, make_float4(v[0], v[1], v[2], v[3]));
    }
    const u32 first = p.parts_of[row_group * p.slices], expected = p.parts_of[(row_group + 1) * p.slices] - first;
    __syncwarp();
    u32 before = lane == 0 ? arrive(p.counters + row_group) : 0;
    before = __shfl_sync(~0u, before, 0);
    if (before + 1 != expected) return;
    if (lane == 0) p.counters[row_group] = 0;  // ready for the next launch
    acquire();

    constexpr int BATCH = ROW_TILES * GROUPS <= 2 ? 8 : ROW_TILES * GROUPS <= 4 ? 4 : 2;  // parts on their way at a time
    Sums whole = {};
    const float4* from = reinterpret_cast<const float4*>(p.partial) + (u64)first * PART + lane;
#pragma unroll 1
    for (u32 done = 0; done < expected; done += BATCH, from += BATCH * PART) {
        float4 v[BATCH][ROW_TILES * GROUPS];
#pragma unroll
        for (int e = 0; e < BATCH; e++)
#pragma unroll
            for (int i = 0; i < ROW_TILES * GROUPS; i++) {
                v[e][i] = make_float4(0, 0, 0, 0);
                if (done + e < expected && useful && (i % GROUPS == 0 || 8 * (i % GROUPS) + 2 * (lane & 3) < p.m))
                    v[e][i] = __ldcg(from + e * PART + i * 32);
            }
#pragma unroll
        for (int e = 0; e < BATCH; e++)
#pragma unroll
            for (int i = 0; i < ROW_TILES * GROUPS; i++) {  // adding the zero of a part that is not there changes no bit
                whole[i / GROUPS][i % GROUPS][0] += v[e][i].x;
                whole[i / GROUPS][i % GROUPS][1] += v[e][i].y;
                whole[i / GROUPS][i % GROUPS][2] += v[e][i].z;
                whole[i / GROUPS][i % GROUPS][3] += v[e][i].w;
            }
    }
    write(p, whole, row_group, lane);
}

// Adds up what the warps of a block have of the row groups that were cut between them, in the order of K; two parts a warp lie at
// `parts`: of the row group in which it began, of the one in which it ended. A warp takes every WARPS-th row group.
__device__ __forceinline__ void combine(const Params& p, u32 parts, u32 slice, u32 blocks, u32 lane) {
    const u32 units = p.row_groups * blocks, number = blockIdx.x / p.slices;
    const u32 first_warp = min(number * WARPS, p.slice_warps), end_warp = min(first_warp + WARPS, p.slice_warps);
    const u32 first = first_unit(first_warp, units, p.slice_warps), end = first_unit(end_warp, units, p.slice_warps);
    for (u32 row_group = first / blocks + (threadIdx.x >> 5); row_group * blocks < end; row_group += WARPS) {
        const u32 begin = row_group * blocks;
        const u32 from = owner(begin, units, p.slice_warps), to = owner(begin + blocks - 1, units, p.slice_warps);
        if (from == to) continue;  // its warp has written or left it
        Sums whole = {};
        for (u32 warp = max(from, first_warp); warp <= min(to, end_warp - 1); warp++) {
            const u32 slot = first_unit(warp, units, p.slice_warps) > begin ? 0 : 1;
            const u32 at = parts + (((warp - first_warp) * 2 + slot) * PART + lane) * 16;
#pragma unroll
            for (int i = 0; i < ROW_TILES * GROUPS; i++) {
                const uint4 v = read16(at + i * 512);
                float(&sum)[4] = whole[i / GROUPS][i % GROUPS];
                sum[0] += __uint_as_float(v.x);
                sum[1] += __uint_as_float(v.y);
                sum[2] += __uint_as_float(v.z);
                sum[3] += __uint_as_float(v.w);
            }
        }
        if (p.slices == 1 && from >= first_warp && to < end_warp) write(p, whole, row_group, lane);
        else leave(p, whole, row_group, p.parts_of[row_group * p.slices + slice] + number - from / WARPS, lane);
    }
}

// A warp's sums, where `combine` looks for them.
__device__ __forceinline__ void put(const Sums& sums, u32 at) {
#pragma unroll
    for (int i = 0; i < ROW_TILES * GROUPS; i++) {
        const float(&v)[4] = sums[i / GROUPS][i % GROUPS];
        store16(at + i * 512, make_float4(v[0], v[1], v[2], v[3]));
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) nf4_linear(const __grid_constant__ Params p) {
    const u32 shared = shared_base() & 0xff000000u;  // 0, or the block's number in a cluster
    const u32 lane = lane_id();
    const u32 g = lane >> 2, t = lane & 3;
    const u32 slice = blockIdx.x % p.slices, warp = blockIdx.x / p.slices * WARPS + (threadIdx.x >> 5);
    const u32 k0 = slice * p.k_blocks / p.slices, blocks = (slice + 1) * p.k_blocks / p.slices - k0;
    const u32 units = p.row_groups * blocks;
    const u32 start = first_unit(min(warp, p.slice_warps), units, p.slice_warps), end = first_unit(min(warp + 1, p.slice_warps), units, p.slice_warps);
    u32 row_group = start / blocks, k = start % blocks;

    // Small things first: behind the weights they would wait for those.
    int4 group = {0, 0, 0, 0};
    if (start < end) group = p.groups[row_group];
    constexpr u32 ENTRIES = ALU_WORDS < 4 ? (256 + WARPS * 4 - 1) / (WARPS * 4) : 0, VALUES = (MAPS * 256 + WARPS * 32 - 1) / (WARPS * 32);
    const u32 first_entry = (threadIdx.x >> 5) * 4 + (lane >> 3);
    u32 pairs[ENTRIES + 1];
    float values[VALUES];
#pragma unroll
    for (u32 i = 0; i < ENTRIES; i++) pairs[i] = p.table[min(first_entry + i * WARPS * 4, 255u)];
#pragma unroll
    for (u32 i = 0; i < VALUES; i++) {
        const u32 at = threadIdx.x + i * WARPS * 32;
        values[i] = at < 256 * p.maps_count ? p.maps[at] : 0;
    }
    Levels levels;
    if (ALU_WORDS > 0) levels = read_levels(p.table);

    // The ring: `ahead` is the next unit to ask for, `ahead_k` its block in the slice.
    const u32 ring = shared + RING_AT + (threadIdx.x >> 5) * (DEPTH * STAGE_BYTES);
    u32 ahead = start, ahead_k = k, ahead_group = row_group, fill = ring;
    const u8* weight = p.weight + ((u64)row_group * p.k_blocks + k0 + k) * UNIT_BYTES + lane * 16;
    const u8* code = p.codes + ((u64)row_group * p.k_blocks + k0 + k) * CODE_BYTES + lane * 16;
    const u32 own_row = 8 * (t & (2 * ROW_TILES - 1)) + g;  // the row whose scales this lane expands
    const u32 row_blocks = p.k_blocks * SUBS;               // scales of a row
    auto ask = [&]() {
        if (ahead < end) {
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) copy16(fill + i * 512 + lane * 16, weight + i * 512);
            if (lane < ROW_TILES * SUBS) copy16(fill + UNIT_BYTES + lane * 16, code);
            weight += UNIT_BYTES;
            code += CODE_BYTES;
            ahead++;
            if (++ahead_k == blocks) {
                weight += (u64)(p.k_blocks - blocks) * UNIT_BYTES;
                code += (u64)(p.k_blocks - blocks) * CODE_BYTES;
                ahead_k = 0;
                if (++ahead_group < p.row_groups) {  // the nested scales of the next row group: 4 bytes for 16,384 weights
                    const u32 first = p.groups[ahead_group].x + own_row * row_blocks + k0 * SUBS;
                    prefetch(p.nested + (first >> 8));
                }
            }
        }
        commit();
        fill = fill + STAGE_BYTES == ring + DEPTH * STAGE_BYTES ? ring : fill + STAGE_BYTES;
    };
#pragma unroll
    for (int d = 0; d < DEPTH - 1; d++) ask();
    if (EARLY && PREFETCH > 0) {  // what lies in one run behind the ring
        const u8* next = weight - lane * 16;
        const u32 lines = min(min((u32)PREFETCH, end - ahead), blocks - ahead_k) * (UNIT_BYTES / 128);
        for (u32 i = lane; i < lines; i += 32) prefetch_far(next + i * 128);
    }

    // Tables, while the first weights are on their way.
#pragma unroll
    for (u32 i = 0; i < ENTRIES; i++) {
        const u32 entry = first_entry + i * WARPS * 4;
        if (entry < 256) store_four_times(shared + TABLE_AT + entry * TABLE_STRIDE + (lane & 7) * 16, pairs[i]);
    }
#pragma unroll
    for (u32 i = 0; i < VALUES; i++) {
        const u32 at = threadIdx.x + i * WARPS * 32;
        if (at < 256 * p.maps_count) store4(shared + MAP_AT + 4 * at, values[i]);
    }

    // Where the walk begins. All of this is constant, so it may be read before the previous launch has ended.
    u32 block = 0;  // number of the scale that this lane expands next; 256 of them share a nested scale
    float nested = 0;
    u32 map = 0;
    const u32 home = shared | lane * 4;
    const u32 weight_at = lane * 16, code_at = UNIT_BYTES + g * 2 * ROW_TILES + (t & (2 * ROW_TILES - 1));
    auto enter = [&]() {
        block = group.x + own_row * row_blocks + (k0 + k) * SUBS;
        nested = p.nested[block >> 8];
        map = shared + MAP_AT + 1024 * group.z;
    };
    if (start < end) enter();
    if (EARLY) {
        let_next_begin();
        wait_for_previous();
    }
    // Activations of the slice: rows of blocks * 128 bytes, 64 more apart so that two rows lie in different banks.
    const u32 x_stride = blocks * 128 + 64;
    for (u32 row = 0; row < p.m; row++)
        for (u32 c = threadIdx.x; c < blocks * 8; c += WARPS * 32)
            copy16(shared + X_AT + row * x_stride + c * 16, p.x + (u64)row * p.k_blocks * 64 + k0 * 64 + c * 8);
    commit();
    wait<0>();
    __syncthreads();

    u32 x_at[GROUPS];  // a column past m reads the last row; nobody looks at its result
#pragma unroll
    for (int q = 0; q < GROUPS; q++) x_at[q] = shared + X_AT + min(8 * q + g, p.m - 1) * x_stride + t * 16 + k * 128;

    Sums sums = {}, begun = {};  // of the row group it is at; of the one in which it began, if that began before
    const bool cut = k != 0;
    bool whole = !cut;
    u32 stage = ring;
    for (u32 unit = start; unit < end; unit++) {
        wait<DEPTH - 2>();
        __syncwarp();
        ask();

        if ((block & 255) == 0) nested = p.nested[block >> 8];
        float scale[SUBS];
#pragma unroll
        for (int sub = 0; sub < SUBS; sub++) {
            const u32 c = read1(stage + code_at + sub * 16 * ROW_TILES);
            scale[sub] = fmaf(__uint_as_float(read4<0>(map + 4 * c)), nested, __int_as_float(group.y));
        }
        block += SUBS;

        uint4 tile[ROW_TILES];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) tile[i] = read16(stage + i * 512 + weight_at);
        float acc[ROW_TILES][GROUPS][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 b[GROUPS];
#pragma unroll
            for (int q = 0; q < GROUPS; q++) b[q] = read16(x_at[q] + half * 64);
            if (SUBS == 2 || half == 0) {
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                    for (int q = 0; q < GROUPS; q++)
#pragma unroll
                        for (int c = 0; c < 4; c++) acc[i][q][c] = 0;
            }
#pragma unroll
            for (int step = 0; step < 2; step++) {
                const int j = 2 * half + step;
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    const u32 word = j == 0 ? tile[i].x : j == 1 ? tile[i].y : j == 2 ? tile[i].z : tile[i].w;
                    u32 a[4];
                    if (j >= 4 - ALU_WORDS) permute(levels, word, a);
                    else look_up(home, word, a);
#pragma unroll
                    for (int q = 0; q < GROUPS; q++) multiply(acc[i][q], a, step ? b[q].z : b[q].x, step ? b[q].w : b[q].y);
                }
            }
            if (SUBS == 2 || half == 1) {
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    const float s0 = __shfl_sync(~0u, scale[half & (SUBS - 1)], (lane & 28) | (2 * i));
                    const float s1 = __shfl_sync(~0u, scale[half & (SUBS - 1)], (lane & 28) | (2 * i + 1));
#pragma unroll
                    for (int q = 0; q < GROUPS; q++) {
                        sums[i][q][0] = fmaf(acc[i][q][0], s0, sums[i][q][0]);
                        sums[i][q][1] = fmaf(acc[i][q][1], s0, sums[i][q][1]);
                        sums[i][q][2] = fmaf(acc[i][q][2], s1, sums[i][q][2]);
                        sums[i][q][3] = fmaf(acc[i][q][3], s1, sums[i][q][3]);
                    }
                }
            }
        }

        stage = stage + STAGE_BYTES == ring + DEPTH * STAGE_BYTES ? ring : stage + STAGE_BYTES;
        k++;
#pragma unroll
        for (int q = 0; q < GROUPS; q++) x_at[q] += 128;
        if (k == blocks && unit + 1 < end) {  // the last row group is seen to below
            if (!whole) {
#pragma unroll
                for (int i = 0; i < ROW_TILES * GROUPS * 4; i++) (&begun[0][0][0])[i] = (&sums[0][0][0])[i];
            } else if (p.slices == 1) {
                write(p, sums, row_group, lane);
            } else {
                leave(p, sums, row_group, p.parts_of[row_group * p.slices + slice], lane);
            }
#pragma unroll
            for (int q = 0; q < GROUPS; q++) x_at[q] -= k * 128;
            k = 0;
            whole = true;
            group = p.groups[++row_group];
            enter();
#pragma unroll
            for (int i = 0; i < ROW_TILES * GROUPS * 4; i++) (&sums[0][0][0])[i] = 0;
        }
    }

    // Tables, ring and x are done with, as soon as all warps are: parts of the row groups cut between warps take their place.
    const u32 parts = shared + TABLE_AT, own = parts + ((threadIdx.x >> 5) * 2 * PART + lane) * 16;
    wait<0>();
    __syncthreads();
    if (start < end) {
        if (cut && whole) put(begun, own);
        if (whole && k == blocks) {
            if (p.slices == 1) write(p, sums, row_group, lane);
            else leave(p, sums, row_group, p.parts_of[row_group * p.slices + slice], lane);
        } else {
            put(sums, own + (whole ? PART * 16 : 0));
        }
    }
    __syncthreads();
    combine(p, parts, slice, blocks, lane);
}
