// y[M, N] = x[M, K] W^T for an NF4 weight W[N, K] in the tiled layout of halfbyte.runtime.linear.layout. bf16 in and out.
//
// What a multiprocessor runs short of is neither memory nor arithmetic but the pipe to shared memory: a unit of 2,048 weights is 1,056
// bytes, for which memory needs 60 cycles, and 32 of the table's words, one word a bank and cycle. So everything else keeps off it:
//   * A *unit* is ROW_TILES tiles of 16 rows x 64 columns. A warp has one row group of a *row block* (WARPS of them) and walks along K;
//     all warps of a block are at about the same k. A *step* is a row block x 64 columns. All steps form one sequence, row block
//     after row block; each block of the grid takes a contiguous part of it, all about equal. No multiprocessor idles, whatever N and K are.
//   * Weights are read once, by the copy engine, STAGE_UNITS units at a time, into a ring private to the warp; DEPTH stages of them are
//     on their way or in use. Straight to registers would be one pass through shared memory less, but the compiler has one counter
//     for all loads of a loop, so that using the oldest waits for the newest (docs/log.md).
//   * x is shared by the warps of a block and passes by in chunks of CHUNK * 64 columns, X_STAGES of which are kept. The warps take turns
//     in fetching them. So x costs neither time before the first product nor room, however many columns it has, and all warps
//     multiply: 16 of them are four for each quarter of a multiprocessor, and none is done before the others.
//   * A byte of weight is a pair of levels. One look-up in a shared table, replicated for each bank (no conflicts), turns it
//     into the register that mma.m16n8k16 wants: weights are its M side, activations its 8 columns. So M = 1..8 costs the same.
//     ALU_WORDS of the four words of a tile are decoded with byte permutes instead, which takes load off shared memory.
//   * Scales stay one byte a block. A lane expands one of the unit's 32 (map[code] * nested + offset), shuffles hand them
//     around, and they multiply fp32 accumulators. So the weight is never rounded, only the 16 levels are (Params::unit).
//   * Where a row block is cut between blocks, each leaves its part in `partial`, and whoever arrives last adds all of them, in the order
//     of K. Which parts there are depends on N, K and the grid only, never on M nor on timing: equal inputs give equal bits,
//     and a row of x gives the same bits in any batch of 1 to 16.
//
// Compiled by NVRTC. The index arithmetic is walked through in Python by tests/runtime/emulation.py, and this very source runs on a
// CPU in tests/runtime/test_host.py.

#include "machine.cuh"

#ifndef WARPS
#define WARPS 16       // warps in a block
#endif
#ifndef ROW_TILES
#define ROW_TILES 2    // row tiles in a unit: 1 or 2
#endif
#ifndef GROUPS
#define GROUPS 1       // groups of 8 columns: M <= 8 * GROUPS
#endif
#ifndef STAGE_UNITS
#define STAGE_UNITS 2  // units in a stage of the ring: 1, 2 or 4
#endif
#ifndef DEPTH
#define DEPTH 2        // stages in the ring of a warp
#endif
#ifndef X_STAGES
#define X_STAGES 4     // chunks of x that are on their way or in use
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
#ifndef AHEAD
#define AHEAD 1        // with EARLY: stages that are asked for while the previous kernel still runs; more would be in its way
#endif
#define CHUNK 4        // blocks of 64 columns in a chunk of x
#ifndef REGISTERS
#define REGISTERS 128  // a thread; with 16 warps 112 leave room for a small kernel beside a block: with EARLY, the previous one
#endif
#define MOST_BLOCKS 192  // in a grid
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
    float* partial;       // [row groups][most_parts][ROW_TILES][GROUPS][32][4]
    u32* counters;        // [row groups], zero before and after
    const uint2* parts;   // [row blocks]: the first block that has some of it, how many have
    u32 m, n, row_groups, k_blocks, row_blocks, maps_count, most_parts, reserved;
    float unit;
    u32 cuts[MOST_BLOCKS + 1];  // block b has steps cuts[b] .. cuts[b + 1] - 1; an argument, since everything waits for it
};

static_assert(GROUPS * ROW_TILES <= 16 && CHUNK % STAGE_UNITS == 0 && DEPTH >= 2 && AHEAD <= DEPTH && X_STAGES >= 2 && ALU_WORDS >= 0 && ALU_WORDS <= 4, "variant");

// Addresses in shared memory. The block's own part begins at 0 or 1024, depending on the architecture; the table at exactly
// TABLE_AT, so that this is an immediate of the load and the rest of an address comes out of one byte permute.
#define FULL_AT 1024                     // a barrier for each stage of x: it is there
#define FREE_AT (FULL_AT + 8 * X_STAGES)  // nobody reads it any more
#define RING_FULL_AT (FREE_AT + 8 * X_STAGES)  // for each stage of each warp: it is there
#define TABLE_AT 2048
#define TABLE_BYTES (ALU_WORDS == 4 ? 0 : 256 * TABLE_STRIDE)
#define UNIT_BYTES (512 * ROW_TILES)
#define CODE_BYTES (16 * ROW_TILES * SUBS)
#define MAP_AT (TABLE_AT + TABLE_BYTES)
#define STAGE_BYTES (STAGE_UNITS * (UNIT_BYTES + CODE_BYTES))
#define RING_AT (MAP_AT + MAPS * 1024)
#define X_AT ((RING_AT + WARPS * DEPTH * STAGE_BYTES + 127) & ~127)
#define X_ROW (CHUNK * 128)              // odd rows have the halves of 128 bytes swapped: two rows lie in different banks
#define LEAD (X_STAGES > 3 ? X_STAGES - 2 : 1)  // chunks of x that are asked for ahead of the one in use

static_assert(RING_FULL_AT + 8 * WARPS * DEPTH <= TABLE_AT, "barriers");

#include "decode.cuh"

// Steps of one row block that lie together: its blocks of 64 columns k .. stop - 1. None: stop = 0.
struct Segment {
    u32 row_block, k, stop;
};
// The part of a row block, from k on, that comes before step `end`.
__device__ __forceinline__ Segment segment_of(const Params& p, u32 row_block, u32 k, u32 end) {
    const u32 first = row_block * p.k_blocks;
    return {row_block, k, first + k < end ? min(p.k_blocks, end - first) : 0};
}

typedef float Sums[ROW_TILES][GROUPS][4];

#include "parts.cuh"

// Fetches a chunk of x: blocks k .. k + CHUNK - 1 of all rows, those that there are. 32 lanes arrive at `full` when it is there.
__device__ __forceinline__ void fetch(const Params& p, u32 k, u32 to, u32 full, u32 lane) {
    const u32 columns = p.k_blocks * 64;
    const u16* from = p.x + k * 64 + lane * 8;
    const bool inside = lane < (p.k_blocks - k) * 8;  // 16 bytes of a row each
    if (inside)
        for (u32 row = 0; row < p.m; row++) copy16(to + row * X_ROW + ((lane ^ (row & 1) * 4) * 16), from + (u64)row * columns);
    arrive_when_copied(full);
}

// sums += a unit; `scale`: of the row that this lane expands; x: where the lane's 16 bytes of columns 0 .. 31 are; those of 32 .. 63
// lie in the other half of the 128 bytes.
__device__ __forceinline__ void multiply_unit(Sums& sums, const uint4 (&tile)[ROW_TILES], const float (&scale)[SUBS], const u32 (&x)[GROUPS], u32 home, const Levels& levels, u32 lane) {
    constexpr bool HALVES = SUBS == 2 || GROUPS > 2;  // scale each half by itself: with many groups, to hold fewer sums at a time
    float acc[ROW_TILES][GROUPS][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 b[GROUPS];
#pragma unroll
        for (int q = 0; q < GROUPS; q++) b[q] = read16(x[q] ^ half * 64);
#pragma unroll
        for (int n = 0; n < 2 * ROW_TILES; n++) {  // tile after tile, or word after word, which needs more registers and waits less
            const int i = HALVES ? n / 2 : n % ROW_TILES, odd = HALVES ? n % 2 : n / ROW_TILES;
            if (odd == 0 && (HALVES || half == 0)) {
#pragma unroll
                for (int c = 0; c < GROUPS * 4; c++) (&acc[i][0][0])[c] = 0;
            }
            const u32 word = half == 0 ? (odd ? tile[i].y : tile[i].x) : (odd ? tile[i].w : tile[i].z);
            u32 a[4];
            if (2 * half + odd >= 4 - ALU_WORDS) permute(levels, word, a);
            else look_up(home, word, a);
#pragma unroll
            for (int q = 0; q < GROUPS; q++) multiply(acc[i][q], a, odd ? b[q].z : b[q].x, odd ? b[q].w : b[q].y);
            if (odd == 1 && (HALVES || half == 1)) {
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
}

extern "C" __global__ void __maxnreg__(REGISTERS) nf4_linear(const __grid_constant__ Params p) {
    const u32 shared = shared_base() & 0xff000000u;  // 0, or the block's number in a cluster
    const u32 lane = lane_id(), warp = threadIdx.x >> 5;
    const u32 g = lane >> 2, t = lane & 3;
    const u32 begin = p.cuts[blockIdx.x], end = p.cuts[blockIdx.x + 1];
    Segment at = segment_of(p, begin / p.k_blocks, begin % p.k_blocks, end);
    auto row_group_of = [&](const Segment& s) { return s.stop ? s.row_block * WARPS + warp : p.row_groups; };
    u32 row_group = row_group_of(at);  // a warp of the last row block may have none: it keeps the others company

    // Small things first: behind the weights they would wait for those.
    int4 group = {0, 0, 0, 0};
    if (row_group < p.row_groups) group = p.groups[row_group];
    constexpr u32 THREADS = WARPS * 32;
    constexpr u32 ENTRIES = ALU_WORDS < 4 ? (256 + WARPS * 4 - 1) / (WARPS * 4) : 0, VALUES = (MAPS * 256 + THREADS - 1) / THREADS;
    const u32 first_entry = warp * 4 + (lane >> 3);
    u32 pairs[ENTRIES + 1];
    float values[VALUES];
#pragma unroll
    for (u32 i = 0; i < ENTRIES; i++) pairs[i] = p.table[min(first_entry + i * WARPS * 4, 255u)];
#pragma unroll
    for (u32 i = 0; i < VALUES; i++) {
        const u32 value = threadIdx.x + i * THREADS;
        values[i] = value < 256 * p.maps_count ? p.maps[value] : 0;
    }
    Levels levels;
    if (ALU_WORDS > 0) levels = read_levels(p.table);

    // The ring: `ahead` is what to ask for next. All of it is known beforehand, so it may be read while the previous kernel runs.
    const u32 ring = shared + RING_AT + warp * (DEPTH * STAGE_BYTES), ring_full = shared + RING_FULL_AT + warp * (DEPTH * 8);
    Segment ahead = at;
    u32 filled = 0;
    if (row_group >= p.row_groups) ahead.stop = 0;
    auto ask = [&]() {
        if (ahead.stop == 0) return;
        const u32 skip = ahead.k % STAGE_UNITS, units = min(STAGE_UNITS - skip, ahead.stop - ahead.k), to = ring + filled * STAGE_BYTES;
        const u64 unit = (u64)(ahead.row_block * WARPS + warp) * p.k_blocks + ahead.k;
        fill(ring_full + 8 * filled, to + skip * UNIT_BYTES, p.weight + unit * UNIT_BYTES, units * UNIT_BYTES,
             to + STAGE_UNITS * UNIT_BYTES + skip * CODE_BYTES, p.codes + unit * CODE_BYTES, units * CODE_BYTES, lane);
        if (++filled == DEPTH) filled = 0;
        ahead.k += units;
        if (ahead.k == ahead.stop) {
            ahead = segment_of(p, ahead.row_block + 1, 0, end);
            if (row_group_of(ahead) >= p.row_groups) ahead.stop = 0;
        }
    };
    if (lane == 0) {
        for (u32 i = 0; i < DEPTH; i++) init_barrier(ring_full + 8 * i, FILL_ARRIVALS);
        barriers_are_there();
    }
    __syncwarp();
    for (int i = 0; i < (EARLY ? AHEAD : DEPTH); i++) ask();

    // Tables and barriers, while the first weights are on their way.
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < X_STAGES; i++) {
            init_barrier(shared + FULL_AT + 8 * i, 32);
            init_barrier(shared + FREE_AT + 8 * i, WARPS);
        }
    }
#pragma unroll
    for (u32 i = 0; i < ENTRIES; i++) {
        const u32 entry = first_entry + i * WARPS * 4;
        if (entry < 256) store_four_times(shared + TABLE_AT + entry * TABLE_STRIDE + (lane & 7) * 16, pairs[i]);
    }
#pragma unroll
    for (u32 i = 0; i < VALUES; i++) {
        const u32 value = threadIdx.x + i * THREADS;
        if (value < 256 * p.maps_count) store4(shared + MAP_AT + 4 * value, values[i]);
    }
    if (EARLY) let_next_begin();
    __syncthreads();

    // Chunks of x, one warp after another. What the previous kernel may write or still read is touched behind the first of them only.
    const u32 stage_bytes = p.m * X_ROW;
    Segment x_at = at;
    u32 x_to = 0, x_turn = 0, x_warp = 0;
    auto fetch_next = [&]() {
        if (x_at.stop == 0) return;
        if (x_warp == warp) {
            if (x_turn > 0) wait_at(shared + FREE_AT + 8 * x_to, (x_turn - 1) & 1);
            fetch(p, x_at.k & ~(CHUNK - 1), shared + X_AT + x_to * stage_bytes, shared + FULL_AT + 8 * x_to, lane);
        }
        if (++x_warp == WARPS) x_warp = 0;
        if (++x_to == X_STAGES) x_to = 0, x_turn++;
        x_at.k = (x_at.k | (CHUNK - 1)) + 1;
        if (x_at.k >= x_at.stop) x_at = segment_of(p, x_at.row_block + 1, 0, end);
    };
    if (EARLY && warp < LEAD) wait_for_previous();
    for (int i = 0; i < LEAD; i++) fetch_next();

    const u32 own_row = 8 * (t & (2 * ROW_TILES - 1)) + g;  // the row whose scales this lane expands
    const u32 row_scales = p.k_blocks * SUBS, home = shared | lane * 4;
    u32 x_row[GROUPS];  // a column past m reads the last row; nobody looks at its result
#pragma unroll
    for (int q = 0; q < GROUPS; q++) {
        const u32 row = min(8 * q + g, p.m - 1);
        x_row[q] = shared + X_AT + row * X_ROW + (row & 1) * 64 + t * 16;
    }

    const u32 weight_lane = lane * 16, code_lane = STAGE_UNITS * UNIT_BYTES + g * 2 * ROW_TILES + (t & (2 * ROW_TILES - 1));
    if (EARLY && at.stop) {
        wait_at(shared + FULL_AT, 0);  // x is there: the previous kernel has ended
        for (int i = AHEAD; i < DEPTH; i++) ask();
    }
    constexpr int UNITS_AT_ONCE = GROUPS == 1 ? CHUNK : GROUPS == 2 ? 2 : 1;  // more need more registers than there are
    const bool aligned = p.k_blocks % CHUNK == 0;  // then 256 scales, which share one of the second level, end with a chunk
    u32 stage = 0, parity = 0, x_stage = 0, x_parity = 0;
    while (at.stop) {
        const bool active = row_group < p.row_groups;
        u32 block = group.x + own_row * row_scales + at.k * SUBS;  // number of the scale that this lane expands next
        const u32 map = shared + MAP_AT + 1024 * group.z;
        float nested = 0;  // 256 scales share one
        if (active) nested = p.nested[block >> 8];
        const uint2 parts = p.parts[at.row_block];  // wanted in the end only, when nothing would hide its way
        Sums sums = {};
        auto add_unit = [&](u32 k) {  // block k of this row group, where it lies in the ring and in the chunk of x
            const u32 unit = ring + stage * STAGE_BYTES, here = k % STAGE_UNITS;
            float scale[SUBS];
#pragma unroll
            for (int sub = 0; sub < SUBS; sub++) {
                const u32 code = read1(unit + code_lane + here * CODE_BYTES + sub * 16 * ROW_TILES);
                scale[sub] = fmaf(__uint_as_float(read4<0>(map + 4 * code)), nested, __int_as_float(group.y));
            }
            block += SUBS;
            uint4 tile[ROW_TILES];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) tile[i] = read16(unit + weight_lane + here * UNIT_BYTES + i * 512);
            u32 x[GROUPS];
#pragma unroll
            for (int q = 0; q < GROUPS; q++) x[q] = x_row[q] + x_stage * stage_bytes + k % CHUNK * 128;
            multiply_unit(sums, tile, scale, x, home, levels, lane);
        };
        auto next_stage = [&]() {
            __syncwarp();
            ask();
            if (++stage == DEPTH) stage = 0, parity ^= 1;
        };
#pragma unroll 1
        for (u32 k = at.k & ~(CHUNK - 1); k < at.stop; k += CHUNK) {
            fetch_next();
            wait_at(shared + FULL_AT + 8 * x_stage, x_parity);
            if (aligned && active && k >= at.k && k + CHUNK <= at.stop) {  // nearly always: nothing to ask between the units
                if ((block & 255) == 0) nested = p.nested[block >> 8];
#pragma unroll UNITS_AT_ONCE
                for (int d = 0; d < CHUNK; d++) {
                    if (d % STAGE_UNITS == 0) wait_at(ring_full + 8 * stage, parity);
                    add_unit(d);
                    if ((d + 1) % STAGE_UNITS == 0) next_stage();
                }
            } else if (active) {
                const u32 first = max(k, at.k), end_of_chunk = min(k + CHUNK, at.stop);
#pragma unroll 1
                for (u32 one = first; one < end_of_chunk; one++) {
                    if (one % STAGE_UNITS == 0 || one == at.k) wait_at(ring_full + 8 * stage, parity);
                    if ((block & 255) == 0) nested = p.nested[block >> 8];
                    add_unit(one);
                    if ((one + 1) % STAGE_UNITS == 0 || one + 1 == at.stop) next_stage();
                }
            }
            __syncwarp();
            if (lane == 0) arrive_at(shared + FREE_AT + 8 * x_stage);
            if (++x_stage == X_STAGES) x_stage = 0, x_parity ^= 1;
        }
        if (active) {
            if (parts.y == 1) write(p, sums, row_group, lane);
            else leave(p, sums, row_group, blockIdx.x - parts.x, parts.y, lane);
        }
        at = segment_of(p, at.row_block + 1, 0, end);
        row_group = row_group_of(at);
        if (row_group < p.row_groups) group = p.groups[row_group];
    }
}
