// What becomes of a warp's sums of a row group: the result, or a part of it for whoever arrives last. Included by nf4_linear.cu behind
// its Params and Sums.

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

// Leaves a warp's part of a row group, number `mine` of `parts` in the order of K; the last of them to arrive adds all up and
// writes the result.
__device__ __forceinline__ void leave(const Params& p, const Sums& sums, u32 row_group, u32 mine, u32 parts, u32 lane) {
    const bool useful = 2 * (lane & 3) < p.m;
    float4* const first = reinterpret_cast<float4*>(p.partial) + (u64)row_group * p.most_parts * PART + lane;
#pragma unroll
    for (int i = 0; i < ROW_TILES * GROUPS; i++) {
        const float(&v)[4] = sums[i / GROUPS][i % GROUPS];
        if (useful && (i % GROUPS == 0 || 8 * (i % GROUPS) + 2 * (lane & 3) < p.m)) __stcg(first + mine * PART + i * 32, make_float4(v[0], v[1], v[2], v[3]));
    }
    __syncwarp();
    u32 before = lane == 0 ? arrive(p.counters + row_group) : 0;
    before = __shfl_sync(~0u, before, 0);
    if (before + 1 != parts) return;
    if (lane == 0) p.counters[row_group] = 0;  // ready for the next launch
    acquire();

    constexpr int BATCH = ROW_TILES * GROUPS == 1 ? 12 : 24 / (ROW_TILES * GROUPS);  // parts on their way at a time
    Sums whole = {};
    const float4* from = first;
#pragma unroll 1
    for (u32 done = 0; done < parts; done += BATCH, from += BATCH * PART) {
        float4 v[BATCH][ROW_TILES * GROUPS];
#pragma unroll
        for (int e = 0; e < BATCH; e++)
#pragma unroll
            for (int i = 0; i < ROW_TILES * GROUPS; i++) {
                v[e][i] = make_float4(0, 0, 0, 0);
                if (done + e < parts && useful && (i % GROUPS == 0 || 8 * (i % GROUPS) + 2 * (lane & 3) < p.m))
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
