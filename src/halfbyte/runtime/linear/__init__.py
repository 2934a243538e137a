"""Linear layers that compute with NF4 weights in a layout made for tensor cores, and give the same bytes back.

    layout     where each byte of a weight goes: a permutation, so nothing is lost
    tensors    the six tensors bitsandbytes stores of a weight, checked
    weight     one weight, or several stacked (q, k, v; gate, up), in our layout
    reference  the same product in plain torch: CPU, odd dtypes, and what the kernels are held against
    portable   a Triton kernel for what the CUDA C++ kernels are not for
    op         torch.ops.halfbyte.nf4_linear: picks a path by batch and device
    module     Nf4Linear, in place of bitsandbytes' Linear4bit

Start at `module`.
"""
