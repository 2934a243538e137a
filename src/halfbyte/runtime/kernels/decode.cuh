// Bytes of weight -> the registers that mma.m16n8k16 wants, in two ways that give the same bits. Included by nf4_linear.cu behind its
// constants (TABLE_AT, TABLE_STRIDE).

// Four bytes -> the four A registers, through the table. `home` is the lane's column in it.
__device__ __forceinline__ void look_up(u32 home, u32 word, u32 (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 at;
        if (TABLE_STRIDE == 256) {
            at = __byte_perm(word, home, 0x7604 | (i << 4));  // byte i to bits 8..15 of `home`
        } else {
            at = ((i ? word >> (8 * i - 7) : word << 7) & 0x7f80u) | home;
        }
        a[i] = read4<TABLE_AT>(at);
    }
}

// The same without memory. A permute looks up four nibbles in 8 entries; codes 0..7 and 8..15 have a table each, for the high
// and the low bytes of their bf16 values; the top bit of a nibble, spread over a byte, chooses between the two.
struct Levels {
    u32 low[4], high[4];  // 16 low bytes, 16 high bytes, in order of the codes
};
__device__ __forceinline__ void permute(const Levels& levels, u32 word, u32 (&a)[4]) {
    const u32 shifted = word << 4, index = word & 0x77777777u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 upper = permute_bytes(shifted, word, i ? 0xfbea : 0xd9c8);
        const u32 select = i ? index >> 16 : index;
        const u32 l0 = __byte_perm(levels.low[0], levels.low[1], select), l1 = __byte_perm(levels.low[2], levels.low[3], select);
        const u32 h0 = __byte_perm(levels.high[0], levels.high[1], select), h1 = __byte_perm(levels.high[2], levels.high[3], select);
        const u32 low = (l1 & upper) | (l0 & ~upper), high = (h1 & upper) | (h0 & ~upper);
        a[2 * i] = __byte_perm(low, high, 0x4051);
        a[2 * i + 1] = __byte_perm(low, high, 0x6273);
    }
}
__device__ __forceinline__ Levels read_levels(const u32* table) {
    Levels levels;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 low = 0, high = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 pair = table[(4 * i + j) * 17];  // both nibbles the same code
            low |= (pair & 0xff) << (8 * j);
            high |= ((pair >> 8) & 0xff) << (8 * j);
        }
        levels.low[i] = low;
        levels.high[i] = high;
    }
    return levels;
}
