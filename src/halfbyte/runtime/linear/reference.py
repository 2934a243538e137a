"""The product in plain torch: expand the weight, then F.linear. Any device, any float dtype.

It takes the layout's tensors, not bitsandbytes', so the kernels' inputs themselves are tested. The scales are those of
halfbyte.codec bit for bit (product and sum rounded separately), and so are the weights.
"""

from __future__ import annotations

import torch

from halfbyte import codec
from halfbyte.runtime.kernels.tensors import Tensors
from halfbyte.runtime.linear import layout


def scales(weight: Tensors) -> torch.Tensor:
    """One scale for each block, row after row: float32 [rows * blocks of a row]."""
    codes, groups = weight.codes, weight.groups
    plain = layout.untile_codes(codes, weight.rows, weight.row_tiles, weight.subs).view(groups.shape[0], -1).long()
    first, offset, index = groups[:, :1].long(), groups[:, 1:2].contiguous().view(torch.float32), groups[:, 2:3].long()
    block = first + torch.arange(plain.shape[1], device=codes.device)
    return (weight.maps[index, plain] * weight.nested[block >> 8] + offset).view(-1)


def dequantize(weight: Tensors, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weights [rows, columns] of `dtype`: the codec's bits."""
    packed = layout.untile(weight.tiles, weight.rows, weight.row_tiles)
    count, blocksize = weight.rows * weight.columns, layout.TILE_COLUMNS // weight.subs
    flat = codec.dequantize_blocks(packed, scales(weight), count, blocksize, dtype)
    return flat.view(weight.rows, weight.columns)


def linear(x: torch.Tensor, weight: Tensors) -> torch.Tensor:
    """x [..., columns] -> [..., rows], in x's dtype."""
    return torch.nn.functional.linear(x, dequantize(weight, x.dtype))
