"""Which block works on which part of a weight, in numbers. The kernel is given them.

`warps` row groups, one for each warp of a block, are a row block; a row block x 64 columns is a step. All steps form one sequence,
row block after row block, and block b of the grid has steps cuts[b] .. cuts[b + 1] - 1. A step of the last row block, which may
have fewer row groups, is less work: the cuts are such that each block has as many row groups x 64 columns as any other, to
a step. A row block that is cut is done in parts, one for each block that has some of it: parts are counted from the first of these
blocks to the last, and added in this order, which is the order of K. There are never more blocks than steps: a block
without a step between them would be waited for.

The catch: warps without a row group idle, and the others do not make good for all of it. `choose_warps` (halfbyte.runtime.kernels.variants)
picks a number that divides well. The kernel counts in 32 bits; `check_fits` says so before anything is launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from halfbyte.errors import UsageError

#: blocks of a grid, at most: their cuts travel with the launch
MOST_BLOCKS = 192


@dataclass(frozen=True)
class Partition:
    """A weight of `row_groups` x `k_blocks` units over `blocks` blocks of `warps` warps."""

    row_groups: int
    k_blocks: int
    warps: int
    blocks: int

    @classmethod
    def over(cls, row_groups: int, k_blocks: int, warps: int, multiprocessors: int) -> Partition:
        """One block a multiprocessor, or fewer: each has a step's work at least."""
        return cls(
            row_groups, k_blocks, warps, max(1, min(multiprocessors, MOST_BLOCKS, row_groups * k_blocks // warps))
        )

    @property
    def row_blocks(self) -> int:
        """Row blocks, the last of which may have fewer row groups."""
        return -(-self.row_groups // self.warps)

    @property
    def steps(self) -> int:
        """Steps of all blocks together."""
        return self.row_blocks * self.k_blocks

    @cached_property
    def cuts(self) -> np.ndarray:
        """Where each block begins, and the end: uint32 [blocks + 1]"""
        full = (self.row_blocks - 1) * self.k_blocks  # steps with a row group for every warp
        last = self.row_groups - (self.row_blocks - 1) * self.warps
        work = np.arange(self.blocks + 1, dtype=np.int64) * (self.row_groups * self.k_blocks) // self.blocks
        cuts = np.where(work < full * self.warps, work // self.warps, full + (work - full * self.warps) // last)
        return cuts.astype(np.uint32)

    @cached_property
    def parts(self) -> np.ndarray:
        """Of each row block: the first block that has some of it, and how many have. uint32 [row_blocks, 2]"""
        begin = np.arange(self.row_blocks, dtype=np.int64) * self.k_blocks
        first = np.searchsorted(self.cuts, begin, side="right") - 1
        last = np.searchsorted(self.cuts, begin + self.k_blocks - 1, side="right") - 1
        return np.stack([first, last - first + 1], axis=1).astype(np.uint32)

    @cached_property
    def most_parts(self) -> int:
        """Parts that a row group has at most."""
        return int(self.parts[:, 1].max())

    def check_fits(self) -> None:
        """Raises UsageError if a number would not fit 32 bits."""
        if self.steps >= 2**32 or self.row_groups * self.most_parts >= 2**32:
            raise UsageError(
                f"{self.row_groups} row groups of {self.k_blocks} blocks are too many for one launch",
                where="nf4_linear",
                todo="split the weight by rows",
            )
