// act(gate) * up for two bf16 at a time, rounded as transformers rounds: act(gate) first, then the product. The same formulas as
// halfbyte.runtime.decode.kernels.gate, which does it where x is not read by this kernel.

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + fast_exp(-z)); }

template <int WHICH> __device__ __forceinline__ float activated(float g) {
    if (WHICH == 1) return g * sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
    if (WHICH == 2) return g * sigmoid(g);
    return 0.5f * g * (1.0f + erff(g * 0.7071067811865476f));
}

template <int WHICH> __device__ __forceinline__ u32 gated_pair(u32 gate, u32 up) {
    const u32 act = to_bf16_pair(activated<WHICH>(__uint_as_float(gate << 16)), activated<WHICH>(__uint_as_float(gate & 0xffff0000u)));
    return to_bf16_pair(__uint_as_float(act << 16) * __uint_as_float(up << 16), __uint_as_float(act & 0xffff0000u) * __uint_as_float(up & 0xffff0000u));
}
