"""The lattice probe: is a tensor on a 16-level grid already, and on which? Weights trained for q4_0 are.

Quantization-aware training leaves weights on the grid it trained for. NF4 has other levels, so what such training
certifies is not what NF4 does; and a quantizer that knows the grid could use it. Whoever quantizes should be told which
case it is, from the weights and not from a repository's name.

    grids       int4: d * q, q from -8 to 7 (llama.cpp's q4_0, 16-bit GPTQ-like exports without zero point)
                int4 affine: d * q + m (llama.cpp's Q4_1), q from 0 to 15
                nf4: level * scale (QAT for NF4; a scale that went through double quantization is a scale too)
    blocks      the largest of 128, 64, 32, 16 along a row that holds; then whole rows. NF4's run on over row ends
    judged by   the share of blocks that *one* scale reproduces to the last bit (grid_fit.py), among the blocks that could
                have failed; all of them: exactly, 90 % or more: mostly

Weights of float32 sources are rounded to bf16 first. That loses nothing: bf16 has 16 numbers to every step of a grid, a
float32 weight at d * q still rounds to bf16(d * q), and one yardstick serves all. fp16 weights are judged as fp16.

The catch: "no" means not to the bit. Weights trained on for a few steps after QAT are near their old grid and not on it;
`rms_error` tells them (well below 0.29 steps) from weights that know nothing of it (0.29 = 1/sqrt(12)).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from halfbyte.codec.grid_fit import Fit, fit_affine, fit_scaled
from halfbyte.errors import ShapeMismatch

Verdict = Literal["exactly", "mostly", "no", "undecided"]
MOSTLY = 0.9
#: fewer blocks that can tell than these decide nothing
MIN_BLOCKS = 4
#: blocks of a first look at each grid and block size; only a grid that half of them fit is then measured on all
_SCREENED = 64
#: weights in hand at a time: what fits a core's cache
_CHUNK = 1 << 14
_SCALE_NAMES = ("bf16", "fp16")
_SIZES = (128, 64, 32, 16)
_NF4_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Lattice:
    """What was found. Where the verdict is `no` or `undecided`, the figures are those against q4_0 (int4, blocks of 32).

    verdict         `exactly`, `mostly` (90 % of blocks or more), `no`, or `undecided` (too few blocks that can tell)
    grid            `int4`, `int4 affine`, `nf4`, or None
    blocksize       weights that share a scale; `row` for a whole row
    scale_dtype     `bf16`, `fp16` or `fp32`: the first that can hold the scales (affine: and the offsets); None without grid
    exact_fraction  share of the telling blocks that one scale reproduces to the last bit; None if there are none
    worst_error     largest distance of a weight of theirs to the grid, in steps: bf16 rounding alone gives up to 0.03
    rms_error       the same, root mean square; 0.29 is chance
    blocks          blocks looked at
    degenerate      those among them that cannot tell: fewer than 6 levels in use, or a step near bf16's own
    levels          levels used by the exact blocks together, at most 16
    """

    verdict: Verdict
    grid: Literal["int4", "int4 affine", "nf4"] | None
    blocksize: int | Literal["row"]
    scale_dtype: Literal["bf16", "fp16", "fp32"] | None
    exact_fraction: float | None
    worst_error: float | None
    rms_error: float | None
    blocks: int
    degenerate: int
    levels: int

    def sentence(self) -> str:
        """The finding in one line."""
        telling = self.blocks - self.degenerate
        if self.verdict == "undecided":
            return f"undecided: {telling} of {self.blocks:,} blocks have enough different weights to tell"
        unit = "whole rows" if self.blocksize == "row" else f"blocks of {self.blocksize}"
        share = 100 * (self.exact_fraction or 0.0)
        if self.verdict == "no":
            return (
                f"not on an int4 or NF4 grid: q4_0 has {share:.1f} % of {telling:,} {unit} exactly, "
                f"and its grid is {self.rms_error:.2f} steps away (0.29 is chance)"
            )
        name = {"int4": "an int4 grid", "int4 affine": "an affine int4 grid", "nf4": "the NF4 grid"}[
            self.grid or "int4"
        ]
        how = "exactly" if self.verdict == "exactly" else f"mostly ({share:.1f} %)"
        return f"{how} on {name} ({unit}, {self.scale_dtype} scales): {telling:,} blocks that can tell"


def probe_lattice(weight: torch.Tensor, columns: int | None = None) -> Lattice:
    """Find the grid of one tensor, or of aligned pieces of it put end to end.

    weight   bf16, f16 or f32 [n] on any device; pieces begin at multiples of 128 weights and at row starts
    columns  row length, if the pieces are whole rows; None: rows are not looked at
    returns  Lattice; blocks with NaN or infinity count as degenerate
    raises   ShapeMismatch if not flat, or not whole rows of `columns`
    """
    if weight.dim() != 1 or (columns and weight.numel() % columns):
        raise ShapeMismatch(f"is {list(weight.shape)}, rows of {columns}", where="weight", todo="pass whole rows, flat")
    flat = weight.detach().cpu()
    with _one_thread():
        return _probe(flat if flat.dtype in (torch.bfloat16, torch.float16) else flat.to(torch.bfloat16), columns)


def _probe(flat: torch.Tensor, columns: int | None) -> Lattice:
    """See `probe_lattice`. Grids in the order of what they cost to try."""
    along = [size for size in _SIZES if columns is None or columns % size == 0]
    for grid in ("int4", "nf4", "int4 affine"):
        sizes: list[int] = list(_NF4_SIZES) if grid == "nf4" else along
        size = next((size for size in sizes if _looks_like(flat, grid, size)), None)
        found = _measure(flat, grid, size) if size else None
        if grid != "nf4" and columns and size == next(iter(along), None) and (not along or found):
            rows = _measure(flat, grid, columns, as_row=True)
            found = rows if rows.grid or found is None else found
        if found and found.grid:
            return found
    return _measure(flat, "int4", 32 if 32 in along or not columns else columns, reference=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread: these are hundreds of steps of microseconds, and waking threads for each has cost a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _looks_like(flat: torch.Tensor, grid: str, size: int) -> bool:
    """A first look at 64 blocks from all over; at all of them if too few of those can tell."""
    blocks = _blocks(flat, size)
    # drawn, not every n-th: what is odd about a tensor may well come every n-th block; seeded, so that records repeat
    few = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:_SCREENED]]
    fit = _fit(few, grid)
    if int(fit.tells.sum()) < MIN_BLOCKS and len(few) < len(blocks):
        return _measure(flat, grid, size).grid is not None
    return int((fit.exact & fit.tells).sum()) * 2 > int(fit.tells.sum())


def _blocks(flat: torch.Tensor, size: int) -> torch.Tensor:
    """[B, size]; a ragged end is left out."""
    return flat[: flat.numel() // size * size].view(-1, size)


def _fit(blocks: torch.Tensor, grid: str) -> Fit:
    """The fit of finite blocks; one with NaN or infinity is set to zero, where it tells nothing."""
    finite = torch.isfinite(blocks).all(dim=1, keepdim=True)
    clean = torch.where(finite, blocks, 0)
    return fit_affine(clean) if grid == "int4 affine" else fit_scaled(clean, grid)


def _measure(flat: torch.Tensor, grid: str, size: int, *, as_row: bool = False, reference: bool = False) -> Lattice:
    """All blocks against one grid. `reference`: the grid is not claimed, whatever comes out."""
    blocks = _blocks(flat, size)
    telling, exact, worst, squares = 0, 0, 0.0, 0.0
    stored, levels = torch.zeros(2, dtype=torch.int64), torch.zeros(16, dtype=torch.bool)
    for part in blocks.split(max(1, _CHUNK // size)):
        fit = _fit(part, grid)
        both = fit.tells & fit.exact
        telling, exact = telling + int(fit.tells.sum()), exact + int(both.sum())
        stored += fit.stored[both].sum(dim=0)
        levels[fit.codes[both].reshape(-1)] = True
        error = fit.error[fit.tells]
        if error.numel():
            worst = max(worst, float(error.max()))
            squares += float(error.double().square().sum())
    fraction = exact / telling if telling else None
    verdict = _verdict(telling, exact)
    claimed = verdict in ("exactly", "mostly") and not reference
    if reference and verdict != "undecided":
        verdict = "no"
    # of float32 scales, some 98 % of blocks leave room for an fp16 one by luck: so all of them must, and many be looked at
    held = [name for name, count in zip(_SCALE_NAMES, stored.tolist(), strict=True) if count == exact]
    return Lattice(
        verdict=verdict,
        grid=grid if claimed else None,  # type: ignore[arg-type]
        blocksize="row" if as_row else size,
        scale_dtype=[*held, "fp32"][0] if claimed else None,  # type: ignore[arg-type]
        exact_fraction=None if fraction is None else round(fraction, 6),
        worst_error=round(worst, 4) if telling else None,
        rms_error=round((squares / (telling * size)) ** 0.5, 4) if telling else None,
        blocks=len(blocks),
        degenerate=len(blocks) - telling,
        levels=int(levels.sum()),
    )


def _verdict(telling: int, exact: int) -> Verdict:
    if telling < MIN_BLOCKS:
        return "undecided"
    if exact == telling:
        return "exactly"
    return "mostly" if exact >= MOSTLY * telling else "no"
