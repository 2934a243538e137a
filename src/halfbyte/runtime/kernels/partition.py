"""Which block works on which part of a weight, in numbers. The kernel computes the same (`first_step`, `owner`).

`warps` row groups, one for each warp of a block, are a row block; a row block x 64 columns is a step. All steps form one sequence,
row block after row block, and block b of the `blocks` of the grid has steps

    [b * steps // blocks, (b + 1) * steps // blocks)

so loads differ by one step at most. A row block that is cut is done in parts, one for each block that has some of it: parts are counted from the
first of these blocks to the last, and added in this order, which is the order of K. There are never more blocks than
steps: a block without a step between them would be waited for.

The catch: the last row block may have fewer row groups than warps, so some warps idle. `choose_warps` (halfbyte.runtime.kernels.variants)
picks a number that divides well. The kernel computes in 32 bits; `check_fits` says so before anything is launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from halfbyte.errors import UsageError


@dataclass(frozen=True)
class Partition:
    """A weight of `row_groups` x `k_blocks` units over `blocks` blocks of `warps` warps."""

    row_groups: int
    k_blocks: int
    warps: int
    blocks: int

    @classmethod
    def over(cls, row_groups: int, k_blocks: int, warps: int, multiprocessors: int) -> Partition:
        """One block a multiprocessor, or one a step where those are fewer."""
        return cls(row_groups, k_blocks, warps, min(multiprocessors, -(-row_groups // warps) * k_blocks))

    @property
    def row_blocks(self) -> int:
        """Row blocks, the last of which may have fewer row groups."""
        return -(-self.row_groups // self.warps)

    @property
    def steps(self) -> int:
        """Steps of all blocks together."""
        return self.row_blocks * self.k_blocks

    def first_step(self, block: int) -> int:
        """The step at which a block begins."""
        return block * self.steps // self.blocks

    def owner(self, step: np.ndarray) -> np.ndarray:
        """The block that has a step."""
        return ((step + 1) * self.blocks - 1) // self.steps

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each row block: the first block that has some of it, and how many have. int64 [row_blocks] each"""
        begin = np.arange(self.row_blocks, dtype=np.int64) * self.k_blocks
        first = self.owner(begin)
        return first, self.owner(begin + self.k_blocks - 1) - first + 1

    @cached_property
    def most_parts(self) -> int:
        """Parts that a row group has at most."""
        return int(self.parts()[1].max())

    def check_fits(self) -> None:
        """Raises UsageError if a number would not fit 32 bits."""
        if (self.steps + 1) * (self.blocks + 1) >= 2**32:
            raise UsageError(
                f"{self.row_groups} row groups of {self.k_blocks} blocks are too many for one launch",
                where="nf4_linear",
                todo="split the weight by rows",
            )
