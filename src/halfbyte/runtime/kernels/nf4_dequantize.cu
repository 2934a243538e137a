// The weight itself, [N, K] bf16, from the tiled layout: what a large batch multiplies with through cuBLAS.
//
// Bit for bit what halfbyte.codec computes: scale = map[code] * nested + offset and level * scale, each operation rounded once,
// then rounded to nearest even. A warp expands a unit (ROW_TILES tiles of 16 x 64) at a time. A lane holds two rows of a
// tile, 8 columns from each half, so it stores four times 16 bytes; four lanes together write 64 contiguous bytes.

#ifndef ROW_TILES
#define ROW_TILES 2
#endif
#ifndef SUBS
#define SUBS 1
#endif
#define WARPS 8

#include "machine.cuh"

struct Params {
    const u8* weight;
    const u8* codes;
    const float* nested;
    const int4* groups;
    const float* maps;
    const float* levels;  // [16]
    u16* out;             // [n][64 * k_blocks]
    u32 row_groups, k_blocks;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) nf4_dequantize(const __grid_constant__ Params p) {
    __shared__ float levels[16];
    if (threadIdx.x < 16) levels[threadIdx.x] = p.levels[threadIdx.x];
    __syncthreads();
    const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u32 units = p.row_groups * p.k_blocks, row_blocks = p.k_blocks * SUBS;
    for (u32 unit = blockIdx.x * WARPS + (threadIdx.x >> 5); unit < units; unit += gridDim.x * WARPS) {
        const u32 row_group = unit / p.k_blocks, k = unit % p.k_blocks;
        const int4 group = p.groups[row_group];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
            const uint4 tile = *reinterpret_cast<const uint4*>(p.weight + ((u64)unit * ROW_TILES + i) * 512 + lane * 16);
            const u32 words[4] = {tile.x, tile.y, tile.z, tile.w};
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u32 row = 8 * (2 * i + h) + g, sub = half & (SUBS - 1);
                    const u32 block = group.x + row * row_blocks + k * SUBS + sub;
                    const u8 code = p.codes[((u64)unit * SUBS + sub) * 16 * ROW_TILES + g * 2 * ROW_TILES + 2 * i + h];
                    const float scale = __fadd_rn(__fmul_rn(p.maps[256 * group.z + code], p.nested[block >> 8]), __int_as_float(group.y));
                    u32 out[4];
#pragma unroll
                    for (int pair = 0; pair < 4; pair++) {
                        const u32 byte = words[2 * half + (pair >> 1)] >> (8 * (h + 2 * (pair & 1)));
                        out[pair] = to_bf16_pair(__fmul_rn(levels[(byte >> 4) & 15], scale), __fmul_rn(levels[byte & 15], scale));
                    }
                    const u64 at = ((u64)row_group * 16 * ROW_TILES + row) * p.k_blocks * 64 + k * 64 + half * 32 + t * 8;
                    *reinterpret_cast<uint4*>(p.out + at) = make_uint4(out[0], out[1], out[2], out[3]);
                }
        }
    }
}
