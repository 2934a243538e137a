"""The small kernels of a decode step: each a Triton kernel and a plain torch reference of the same signature.

    norm        residual add, norm behind a sublayer, the layer's scalar, and the next norm: one launch
    rotary      norms of q, k, v, rotary embedding, and the write into the cache: one launch
    attention   decode attention split over the keys: two launches
    gate        act(gate) * up: one launch
    append      what is kept of a step, appended to the text: one launch
    dense       x W^T with unquantized weights for up to 16 rows: lm_head and what was left in bf16

On a GPU the Triton kernel runs, elsewhere the reference (`where.by_kernel` decides). Nothing here looks at values on the host, so
all of it can be recorded in a CUDA graph. What a row gives does not depend on the other rows: block sizes follow
from the model and from constants, never from the batch or from the number of new tokens.

Intermediate results are rounded where transformers rounds them (a norm's output, the sum of a residual, each product of a
rotation), so that bf16 decoding differs from it only by the order of sums.
"""
