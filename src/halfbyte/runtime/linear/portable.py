"""The product as a Triton kernel: for GPUs, dtypes and installations that the CUDA C++ kernels are not for. Simple and right, not fast.

A program has one row group (32 or 16 rows of W) and 16 rows of x, and walks through K by 32 columns: 16 bytes of each row,
the even columns from the high nibbles, the odd ones from the low. Levels come from a table by a gather; products are float32;
the scale of the block multiplies the sum of its products, as in nf4_linear.cu. Against the reference it saves the
expanded weight: a quarter of the bytes at float16, an eighth at float32.

The catch: bytes are fetched one by one from where the layout puts them (halfbyte.runtime.linear.layout), so loads are not wide.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch

from halfbyte.codec import nf4_levels
from halfbyte.runtime.kernels.tensors import Tensors

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]

#: rows of x a launch takes: what a dot of Triton has at least
MOST_ROWS = 16


def takes(x: torch.Tensor) -> bool:
    """Whether `linear` can multiply these rows here."""
    return triton is not None and 1 <= x.shape[0] <= MOST_ROWS


def linear(x: torch.Tensor, weight: Tensors) -> torch.Tensor:
    """x [m, columns], contiguous, 1 <= m <= MOST_ROWS -> [m, rows], in x's dtype."""
    tables = torch.cat([weight.maps.reshape(-1), nf4_levels().to(x.device)])
    y = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    _multiply[(weight.groups.shape[0],)](
        x, weight.tiles, weight.codes, weight.nested, weight.groups, tables, y,
        m=x.shape[0], n=weight.rows, k_blocks=weight.k_blocks, row_tiles=weight.row_tiles, subs=weight.subs,
        levels_at=weight.maps.numel(),
    )  # fmt: skip
    return y


if triton is not None:

    @triton.jit
    def _multiply(
        x, tiles, codes, nested, groups, tables, y,
        m: tl.constexpr, n: tl.constexpr, k_blocks: tl.constexpr, row_tiles: tl.constexpr, subs: tl.constexpr,
        levels_at: tl.constexpr,
    ):  # fmt: skip
        group = tl.program_id(0)
        column = tl.arange(0, 16)  # of x's rows
        row = tl.arange(0, 16 * row_tiles)
        pair = tl.arange(0, 16)  # a byte of 32 columns: 4 t + 2 step + u
        which, h, g = row // 16, row // 8 % 2, row % 8
        lane = 4 * g[None, :] + (pair // 4)[:, None]
        in_lane = 4 * (pair // 2 % 2)[:, None] + h[None, :] + 2 * (pair % 2)[:, None]
        first = tl.load(groups + 4 * group)
        offset = tl.load(groups + 4 * group + 1).to(tl.float32, bitcast=True)
        map_at = 256 * tl.load(groups + 4 * group + 2)
        total = tl.zeros((16, 16 * row_tiles), dtype=tl.float32)
        for step in range(2 * k_blocks):
            k, half = step // 2, step % 2
            sub = half if subs == 2 else 0
            place = group.to(tl.int64) * k_blocks + k
            byte = tl.load(tiles + (place * row_tiles + which[None, :]) * 512 + lane * 16 + 8 * half + in_lane).to(
                tl.int32
            )
            even = tl.load(tables + levels_at + (byte >> 4))
            odd = tl.load(tables + levels_at + (byte & 15))
            at = column[:, None] * (64 * k_blocks) + 32 * step + 2 * pair[None, :]
            left = tl.load(x + at, mask=column[:, None] < m, other=0.0).to(tl.float32)
            right = tl.load(x + at + 1, mask=column[:, None] < m, other=0.0).to(tl.float32)
            products = tl.dot(left, even, input_precision="ieee") + tl.dot(right, odd, input_precision="ieee")
            code = tl.load(codes + (place * subs + sub) * 16 * row_tiles + g * 2 * row_tiles + 2 * which + h).to(
                tl.int32
            )
            block = first + row * (k_blocks * subs) + k * subs + sub
            scale = tl.load(tables + map_at + code) * tl.load(nested + (block >> 8)) + offset
            total += products * scale[None, :]
        out = column[:, None].to(tl.int64) * n + group * 16 * row_tiles + row[None, :]
        tl.store(y + out, total.to(y.dtype.element_ty), mask=column[:, None] < m)
