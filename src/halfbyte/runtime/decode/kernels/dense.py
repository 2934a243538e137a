"""y = x W^T with an unquantized weight for few rows: lm_head, and linears that were left in bf16.

cuBLAS takes another kernel for another number of rows, and with it another order of sums: then speculation, which asks for several
rows at once, would not give the bits of plain decoding. Here 1 to 16 rows are always computed as 16, in one order of sums, so a
row does not depend on the rows beside it; the weight is read once, which is all the time it takes.

The final softcap, c tanh(y / c), is applied on the way out and rounded in its three steps as transformers does. More than 16 rows: cuBLAS.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch

from halfbyte.runtime.decode.kernels.where import by_kernel, launch_options, take_turn

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]

#: rows of x that cost the same as one
MOST_ROWS = 16


def dense(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, softcap: float | None = None
) -> torch.Tensor:
    """x [rows, columns], weight [n, columns] -> [rows, n] in x's dtype."""
    few = 1 <= x.shape[0] <= MOST_ROWS and weight.dtype == x.dtype and weight.is_contiguous()
    if few and by_kernel(x):
        return dense_kernel(x.contiguous(), weight, bias, softcap)
    return dense_reference(x, weight, bias, softcap)


def dense_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, softcap: float | None = None
) -> torch.Tensor:
    """The same in plain torch."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if softcap is None else torch.tanh(y / softcap) * softcap


def dense_kernel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, softcap: float | None = None
) -> torch.Tensor:
    """The same by the kernel; all contiguous, at most MOST_ROWS rows."""
    rows, columns = x.shape
    n = weight.shape[0]
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    block_n = 64 if n >= 1 << 15 else 16  # by the weight alone: the order of sums must not follow the batch
    _dense[(triton.cdiv(n, block_n),)](
        x, weight, bias if bias is not None else x, y, rows, n, columns, softcap or 1.0,
        has_bias=bias is not None, capped=softcap is not None, block_m=MOST_ROWS, block_n=block_n,
        block_k=64 if x.dtype == torch.float32 else 128, num_warps=4, num_stages=4,
        **launch_options(x),
    )  # fmt: skip
    return y


if triton is not None:

    @triton.jit
    def _dense(
        x, weight, bias, y, rows, n, columns, cap,
        has_bias: tl.constexpr, capped: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
        early: tl.constexpr,
    ):  # fmt: skip
        take_turn(early)
        row = tl.arange(0, block_m)
        out = tl.program_id(0) * block_n + tl.arange(0, block_n)
        k = tl.arange(0, block_k)
        total = tl.zeros((block_m, block_n), dtype=tl.float32)
        for start in range(0, columns, block_k):
            at = start + k
            left = tl.load(
                x + row[:, None] * columns + at[None, :],
                mask=(row < rows)[:, None] & (at < columns)[None, :],
                other=0.0,
            )
            right = tl.load(
                weight + out[:, None].to(tl.int64) * columns + at[None, :],
                mask=(out < n)[:, None] & (at < columns)[None, :],
                other=0.0,
            )
            total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        dtype: tl.constexpr = y.dtype.element_ty
        if has_bias:
            total += tl.load(bias + out, mask=out < n, other=0.0).to(tl.float32)[None, :]
        if capped:
            total = (total.to(dtype).to(tl.float32) / cap).to(dtype).to(tl.float32)
            total = (2.0 * tl.sigmoid(2.0 * total) - 1.0).to(dtype).to(tl.float32) * cap
        tl.store(y + row[:, None] * n + out[None, :], total.to(dtype), mask=(row < rows)[:, None] & (out < n)[None, :])
