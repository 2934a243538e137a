"""Scales as the file will hold them: 8 bits on a grid that is fixed before the codes are chosen.

    scale[b] = map[code[b]] * nested_absmax[b // 256] + offset                                     (docs/format.md F12)

Rounding scales *after* the codes were chosen for the exact ones would leave codes that are wrong for the scales in the file.
So the second level is fixed first, from a search over the source's weights, and from then on only scales on its grid are chosen.

    offset          unsigned: their mean, as bitsandbytes does. Signed scales lie around -m and +m: their mean is near 0 and
                    means nothing, so the offset is 0
    nested_absmax   the largest |scale - offset| of each 256 blocks, and `HEADROOM` more: compensation changes weights, and
                    with them scales, before their turn comes

The map is the standard one: it holds 64 magnitudes of each sign between 0.1 and 1, a step of 1.4 % of the largest scale of 256.
The catch: blocks are counted along the flattened weight, so 256 of them are 256 / (columns / blocksize) rows, or part of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.codec.codebook import NESTED_BLOCKSIZE, nested_quant_map
from halfbyte.codec.tensors import Nested

#: room above the largest scale found beforehand
HEADROOM = 1.05


@dataclass(frozen=True, eq=False)
class ScaleGrid:
    """The scales that the blocks of one weight may have.

    unit     float32 [blocks], nested_absmax of each block's 256, on the working device
    entries  float32 [256], the map, ascending
    nested   float32 [ceil(blocks / 256)], nested_absmax
    """

    unit: torch.Tensor
    entries: torch.Tensor
    nested: torch.Tensor
    offset: float

    @classmethod
    def around(cls, scales: torch.Tensor, signed: bool) -> ScaleGrid:
        """The grid that covers these provisional scales, float32 [blocks]."""
        offset = 0.0 if signed else float(scales.double().mean().float())
        magnitude = (scales - offset).abs()
        groups = -(-len(scales) // NESTED_BLOCKSIZE)
        padded = torch.nn.functional.pad(magnitude, (0, groups * NESTED_BLOCKSIZE - len(scales)))
        nested = padded.view(groups, NESTED_BLOCKSIZE).amax(dim=1) * HEADROOM
        unit = nested.repeat_interleave(NESTED_BLOCKSIZE)[: len(scales)]
        return cls(unit, nested_quant_map().to(scales.device), nested, offset)

    def snap(self, scales: torch.Tensor, blocks: torch.Tensor | slice) -> torch.Tensor:
        """The code of the grid's scale nearest to each of `scales` (any shape), which belong to `blocks`. int64, 0 to 255."""
        unit = self.unit[blocks]
        ratio = torch.where(unit > 0, (scales - self.offset) / unit, 0.0)
        return torch.bucketize(ratio, (self.entries[:-1] + self.entries[1:]) / 2)

    def values(self, codes: torch.Tensor, blocks: torch.Tensor | slice) -> torch.Tensor:
        """The scales a loader computes, float32, in its order of operations."""
        return self.entries[codes] * self.unit[blocks] + self.offset

    def nest(self, codes: torch.Tensor) -> Nested:
        """What goes into the file, for the codes of all blocks."""
        return Nested(codes.to(torch.uint8).cpu(), self.nested.cpu(), self.offset, nested_quant_map())
