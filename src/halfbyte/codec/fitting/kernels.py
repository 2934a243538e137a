"""The inner loops of a fit as Triton kernels: one launch a block instead of hundreds.

Rounding column after column is a chain: 64 steps a block, each of some small operations, and on a GPU launching them is nearly all the
time (a 31B model has 3.4 million columns). But rows are independent. So a program takes `TILE` rows of a block, [blocksize, TILE],
into registers and walks the chain there. The search does the same with candidates.

A column is taken out of the registers as a masked sum over the tile (exact: all other terms are 0). Sums and products may be contracted and
ordered otherwise than in torch, so a GPU's codes differ from a CPU's where a weight lies on a midpoint; its own are
the same every time.

`TRITON_INTERPRET=1` runs these very sources on a CPU, slowly: the tests do.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from halfbyte.codec.codebook import nf4_levels, nf4_midpoints

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, CPU-only builds of torch
    triton = None  # type: ignore[assignment]

#: rows per program
TILE = 32


@cache
def _grid(device: torch.device) -> torch.Tensor:
    """Levels, then midpoints: float32 [31]."""
    return torch.cat([nf4_levels(), nf4_midpoints()]).to(device)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def available(tensor: torch.Tensor) -> bool:
    """May these kernels take this tensor?"""
    return triton is not None and tensor.is_cuda


def search(panel: torch.Tensor, importance: torch.Tensor, tried: list[float], refit: int) -> torch.Tensor:
    """search.search_plainly. panel float32 [blocksize, n], importance float32 [blocksize, 1 or n]."""
    size, n = panel.shape
    out = torch.empty(n, device=panel.device)
    factors = torch.tensor(tried, device=panel.device)
    with _current(panel.device):
        _search[(triton.cdiv(n, TILE),)](
            panel.contiguous(), importance.contiguous(), factors, _grid(panel.device), out, n,
            wide=importance.shape[1] > 1, count=len(tried), refit=refit, size=size, tile=TILE,
        )  # fmt: skip
    return out


def walk(
    panel: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor, inverse: torch.Tensor, codes: torch.Tensor
) -> None:
    """descent._choose_codes in units of the rows' scales: gradient `panel` and levels `chosen` [blocksize, n], codes written.

    table    float32 [blocksize, blocksize], contiguous: what a step in one column does to the others
    inverse  float32 [blocksize], 1 / its diagonal
    """
    _launch(panel, chosen, table, inverse, codes, descend=True)


def compensate(panel: torch.Tensor, shares: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor) -> None:
    """The loop of compensation.round_panel, in units of the rows' scales; codes and errors [blocksize, n] are written."""
    _launch(panel, errors, shares, shares[0], codes, descend=False)


def _launch(
    panel: torch.Tensor,
    other: torch.Tensor,
    table: torch.Tensor,
    inverse: torch.Tensor,
    codes: torch.Tensor,
    descend: bool,
) -> None:
    assert all(each.is_contiguous() for each in (panel, other, table, inverse, codes))
    size, n = panel.shape
    with _current(panel.device):
        _walk[(triton.cdiv(n, TILE),)](
            panel, other, table, inverse, codes, _grid(panel.device), n, descend=descend, size=size, tile=TILE
        )


if triton is not None:

    @triton.jit
    def _level(x, grid):
        """The level nearest to x and its code."""
        level = tl.full(x.shape, -1.0, tl.float32)
        code = tl.zeros(x.shape, tl.int32)
        for i in tl.static_range(15):
            above = x > tl.load(grid + 16 + i)
            level = tl.where(above, tl.load(grid + i + 1), level)
            code += above.to(tl.int32)
        return level, code

    @triton.jit
    def _invert(scale):
        return tl.where(scale != 0, 1.0 / tl.where(scale != 0, scale, 1.0), 0.0)

    @triton.jit
    def _search(
        panel, importance, factors, grid, out, n,
        wide: tl.constexpr, count: tl.constexpr, refit: tl.constexpr, size: tl.constexpr, tile: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        column = tl.arange(0, size).to(tl.int64)[:, None]
        here = (row < n)[None, :]
        x = tl.load(panel + column * n + row[None, :], mask=here, other=0.0)
        if wide:
            d = tl.load(importance + column * n + row[None, :], mask=here, other=0.0)
        else:
            d = tl.load(importance + column)
        largest = tl.max(tl.abs(x), axis=0)
        best = tl.zeros((tile,), tl.float32)
        least = tl.full((tile,), float("inf"), tl.float32)
        for i in range(count + refit):
            scale = tl.load(factors + tl.minimum(i, count - 1)) * largest
            if i >= count:
                level, _ = _level(x * _invert(best)[None, :], grid)
                below = tl.sum(level * level * d, axis=0)
                scale = tl.where(below > 0, tl.sum(level * x * d, axis=0) / tl.where(below > 0, below, 1.0), best)
            level, _ = _level(x * _invert(scale)[None, :], grid)
            error = x - level * scale[None, :]
            total = tl.sum(error * error * d, axis=0)
            best = tl.where(total < least, scale, best)
            least = tl.where(total < least, total, least)
        tl.store(out + row, best, mask=row < n)

    @triton.jit
    def _walk(
        panel, other, table, inverse, codes, grid, n,
        descend: tl.constexpr, size: tl.constexpr, tile: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
        column = tl.arange(0, size)
        at = column.to(tl.int64)[:, None] * n + row[None, :]
        x = tl.load(panel + at, mask=(row < n)[None, :], other=0.0)
        for c in range(size):
            mine = tl.sum(tl.where((column == c)[:, None], x, 0.0), axis=0)
            to = tl.full((), c, tl.int64) * n + row
            if descend:
                chosen = tl.load(other + to, mask=row < n, other=0.0)
                level, code = _level(chosen + mine * tl.load(inverse + c), grid)
                step = level - chosen
            else:
                level, code = _level(mine, grid)
                step = mine - level
                tl.store(other + to, step, mask=row < n)
            tl.store(codes + to, code.to(tl.uint8), mask=row < n)
            share = tl.load(table + c * size + column)
            x -= tl.where(column > c, share, 0.0)[:, None] * step[None, :]
