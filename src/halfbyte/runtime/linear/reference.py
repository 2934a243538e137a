"""The product in plain torch: expand the weight, then F.linear. Any device, any float dtype.

It takes the layout's tensors, not bitsandbytes', so the kernels' inputs themselves are tested. The scales are those of
halfbyte.codec bit for bit (product and sum rounded separately), and so are the weights.
"""

from __future__ import annotations

import torch

from halfbyte import codec
from halfbyte.runtime.linear import layout


def sizes(tiles: torch.Tensor, codes: torch.Tensor, groups: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, columns, tiles of a row group, scales in 64 columns: what the tensors' sizes say."""
    rows, columns = tiles.shape[0], 2 * tiles.shape[1]
    return (
        rows,
        columns,
        rows // layout.TILE_ROWS // groups.shape[0],
        codes.numel() * layout.TILE_COLUMNS // (rows * columns),
    )


def scales(
    codes: torch.Tensor, nested: torch.Tensor, groups: torch.Tensor, maps: torch.Tensor, row_tiles: int, subs: int
) -> torch.Tensor:
    """One scale for each block, row after row: float32 [rows * blocks of a row]."""
    rows = groups.shape[0] * layout.TILE_ROWS * row_tiles
    plain = layout.untile_codes(codes, rows, row_tiles, subs).view(groups.shape[0], -1).long()
    first, offset, index = groups[:, :1].long(), groups[:, 1:2].contiguous().view(torch.float32), groups[:, 2:3].long()
    block = first + torch.arange(plain.shape[1], device=codes.device)
    return (maps[index, plain] * nested[block >> 8] + offset).view(-1)


def dequantize(
    tiles: torch.Tensor,
    codes: torch.Tensor,
    nested: torch.Tensor,
    groups: torch.Tensor,
    maps: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """The weights [rows, columns] of `dtype`: the codec's bits."""
    rows, columns, row_tiles, subs = sizes(tiles, codes, groups)
    absmax = scales(codes, nested, groups, maps, row_tiles, subs)
    packed = layout.untile(tiles, rows, row_tiles)
    flat = codec.dequantize_blocks(packed, absmax, rows * columns, layout.TILE_COLUMNS // subs, dtype)
    return flat.view(rows, columns)


def linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    codes: torch.Tensor,
    nested: torch.Tensor,
    groups: torch.Tensor,
    maps: torch.Tensor,
) -> torch.Tensor:
    """x [..., columns] -> [..., rows], in x's dtype."""
    return torch.nn.functional.linear(x, dequantize(tiles, codes, nested, groups, maps, x.dtype))
