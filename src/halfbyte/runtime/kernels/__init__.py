"""CUDA C++ kernels for NF4, compiled on the machine they run on (NVRTC), and what is needed to launch them.

    nf4_linear.cu      y = x W^T for 1 to 64 rows of x, the weight read once at memory speed
    nf4_dequantize.cu  the weight in bf16, for larger batches
    levels             the table from a byte to two levels, and why its levels are scaled
    variants           the kernels' compile-time choices, and how a weight is split over a GPU
    partition          which warp works on what: the numbers that make results reproducible
    build              source -> cubin, cached on disk
    driver             cubin -> launch
    launch             one call: variant, workspace, arguments

Nothing here imports CUDA when it is imported: a machine without a GPU can read, test and compile all of it.
"""
