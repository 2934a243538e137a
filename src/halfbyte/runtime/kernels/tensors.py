"""A weight in our layout as five tensors, and the sizes they imply: what every path that multiplies with it is handed.

An op of torch takes tensors and nothing else, so no size travels with them; each is read off their shapes, here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: the tensors in the order of the op's arguments, and what the kernels call them
NAMES = ("tiles", "codes", "nested", "groups", "maps")
POINTERS = ("weight", *NAMES[1:])


@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of `Nf4Weight` (halfbyte.runtime.linear.weight), all on one device."""

    tiles: torch.Tensor
    codes: torch.Tensor
    nested: torch.Tensor
    groups: torch.Tensor
    maps: torch.Tensor

    @property
    def rows(self) -> int:
        """N."""
        return self.tiles.shape[0]

    @property
    def columns(self) -> int:
        """K."""
        return 2 * self.tiles.shape[1]

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 rows in a row group."""
        return self.rows // 16 // self.groups.shape[0]

    @property
    def subs(self) -> int:
        """Scales of a row in 64 columns."""
        return self.codes.numel() * 64 // (self.rows * self.columns)

    @property
    def k_blocks(self) -> int:
        """Blocks of 64 columns."""
        return self.columns // 64

    def pointers(self) -> dict[str, int]:
        """Addresses, under the names of the kernels' arguments."""
        tensors = (self.tiles, self.codes, self.nested, self.groups, self.maps)
        return {name: tensor.data_ptr() for name, tensor in zip(POINTERS, tensors, strict=True)}
