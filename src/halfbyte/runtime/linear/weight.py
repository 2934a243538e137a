"""One NF4 weight in our layout: made from bitsandbytes' tensors, several stacked if they share their input, and given back.

Layers that read the same x (q, k, v; gate, up) are stacked by rows: one launch, x read once. Each part keeps its scales as they
were: its 8-bit codes, its nested scales, its map and its offset. What the kernel needs to find them is one entry for each row
group (32 rows, or 16 if a part is no multiple of 32):

    groups[r] = (first, offset, map, 0)     the nested scale of row i of the group, block b of the row, is
                                            nested[(first + i * blocks of a row + b) >> 8]; offset: bits of a float32

That is because bitsandbytes counts blocks through the whole part, row after row, 256 of them to a nested scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from halfbyte.codec import NESTED_BLOCKSIZE
from halfbyte.errors import ShapeMismatch, UsageError
from halfbyte.runtime.kernels.tensors import NAMES, Tensors
from halfbyte.runtime.linear import layout
from halfbyte.runtime.linear.tensors import StoredWeight

#: parts that one weight may be stacked of; the kernel keeps their maps in shared memory
MOST_PARTS = 4


@dataclass(frozen=True)
class Part:
    """What is left of a stacked weight besides its numbers: its rows, its JSON byte for byte, its offset."""

    rows: int
    state: bytes
    offset: float


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A weight [rows, columns] in the layout of `layout`.

    tiles   uint8 [rows, columns / 2], only its size means rows and columns      codes uint8 [rows * columns / blocksize]
    nested  float32, part after part            maps  float32 [parts, 256]
    groups  int32 [rows / (16 * row_tiles), 4], see above
    """

    tiles: torch.Tensor
    codes: torch.Tensor
    nested: torch.Tensor
    groups: torch.Tensor
    maps: torch.Tensor
    rows: int
    columns: int
    blocksize: int
    row_tiles: int
    parts: tuple[Part, ...]

    def to(self, device: torch.device | str) -> Nf4Weight:
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in NAMES})

    def copies(self, count: int) -> list[Nf4Weight]:
        """This one and `count` - 1 more in memory of their own: for timing, so that none is still in the L2 cache."""
        return [self] + [
            replace(self, **{name: getattr(self, name).clone() for name in NAMES}) for _ in range(count - 1)
        ]

    @property
    def tensors(self) -> Tensors:
        """Without what only the way back needs."""
        return Tensors(self.tiles, self.codes, self.nested, self.groups, self.maps)

    def part(self, index: int) -> Nf4Weight:
        """One part of the stack, ready to multiply with: views, nothing is copied."""
        part = self.parts[index]
        row = sum(before.rows for before in self.parts[:index])
        rows, blocks = slice(row, row + part.rows), self.columns // self.blocksize
        height = layout.TILE_ROWS * self.row_tiles
        return replace(
            self,
            tiles=self.tiles[rows],
            codes=self.codes[rows.start * blocks : rows.stop * blocks],
            groups=self.groups[rows.start // height : rows.stop // height],
            rows=part.rows, parts=(part,),
        )  # fmt: skip

    def stored_part(self, index: int) -> StoredWeight:
        """One part as bitsandbytes stores it, bit for bit what it was made from."""
        part, own = self.parts[index], self.part(index)
        sizes = [_nested_groups(p.rows * self.columns // self.blocksize) for p in self.parts]
        first = sum(sizes[:index])
        return StoredWeight(
            layout.untile(own.tiles, part.rows, self.row_tiles),
            layout.untile_codes(own.codes, part.rows, self.row_tiles, layout.TILE_COLUMNS // self.blocksize),
            self.nested[first : first + sizes[index]].clone(), self.maps[index].clone(),
            part.state, part.rows, self.columns, self.blocksize, part.offset,
        )  # fmt: skip

    def to_stored(self) -> list[StoredWeight]:
        """The parts as bitsandbytes stores them, bit for bit what they were made from."""
        return [self.stored_part(index) for index in range(len(self.parts))]


def weight_from(stored: Sequence[StoredWeight]) -> Nf4Weight:
    """Stack weights [rows_i, columns] into one [sum of rows_i, columns].

    raises  UsageError (none, too many, a size the layout cannot have), ShapeMismatch (columns or block sizes differ)
    """
    if not 1 <= len(stored) <= MOST_PARTS:
        raise UsageError(f"{len(stored)} weights to stack", where="weight_from", todo=f"pass 1 to {MOST_PARTS}")
    columns, blocksize = stored[0].columns, stored[0].blocksize
    for part in stored:
        if (part.columns, part.blocksize) != (columns, blocksize):
            raise ShapeMismatch(
                f"columns and block sizes differ: {part.columns}, {part.blocksize} and {columns}, {blocksize}",
                where="weight_from",
            )
        if reason := layout.why_unsupported(part.rows, columns, blocksize):
            raise UsageError(reason, where="weight_from", todo="keep bitsandbytes' layer for it")
    rows, subs = sum(part.rows for part in stored), layout.TILE_COLUMNS // blocksize
    row_tiles = 2 if all(part.rows % 32 == 0 for part in stored) else 1
    device = stored[0].packed.device
    return Nf4Weight(
        tiles=layout.tile(torch.cat([part.packed for part in stored]), rows, row_tiles).view(rows, columns // 2),
        codes=layout.tile_codes(torch.cat([part.absmax for part in stored]), rows, row_tiles, subs),
        nested=torch.cat([part.nested_absmax for part in stored]),
        groups=_groups_of(stored, row_tiles).to(device),
        maps=torch.stack([part.nested_quant_map for part in stored]),
        rows=rows, columns=columns, blocksize=blocksize, row_tiles=row_tiles,
        parts=tuple(Part(part.rows, part.state, part.offset) for part in stored),
    )  # fmt: skip


def _groups_of(stored: Sequence[StoredWeight], row_tiles: int) -> torch.Tensor:
    """int32 [row groups, 4]: (first, bits of the offset, map, 0)."""
    height, rows_of_groups, base = layout.TILE_ROWS * row_tiles, [], 0
    for index, part in enumerate(stored):
        row_blocks = part.columns // part.blocksize
        group = torch.arange(part.rows // height, dtype=torch.int64)
        entry = torch.zeros(len(group), 4, dtype=torch.int64)
        entry[:, 0] = base * NESTED_BLOCKSIZE + group * height * row_blocks
        entry[:, 1] = int(torch.tensor(part.offset, dtype=torch.float32).view(torch.int32))
        entry[:, 2] = index
        rows_of_groups.append(entry)
        base += _nested_groups(part.rows * row_blocks)
    whole = torch.cat(rows_of_groups)
    if int(whole[:, 0].max()) + height * (stored[0].columns // stored[0].blocksize) >= 2**31:
        raise UsageError("more than 2^31 blocks", where="weight_from", todo="split the weight by rows")
    return whole.to(torch.int32)


def _nested_groups(blocks: int) -> int:
    return -(-blocks // NESTED_BLOCKSIZE)
