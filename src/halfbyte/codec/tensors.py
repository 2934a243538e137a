"""What a quantized tensor is, as values: packed codes, and scales that are themselves quantized.

Per weight 4 bits of code; per block of 64 one byte of scale; per 256 blocks one float32; per tensor one float32 offset and
the map: 0.5 + 1/64 + 4/(64 * 256) = 0.51587 bytes a weight. These are exactly the arrays a bitsandbytes checkpoint holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Nested:
    """Scales in 8 bits: scale[i] = nested_quant_map[absmax[i]] * nested_absmax[i // 256] + nested_offset.

    absmax            uint8 [blocks], indices into the map
    nested_absmax     float32 [ceil(blocks / 256)]
    nested_offset     the mean of the scales, a float32 held in a Python float
    nested_quant_map  float32 [256]
    All on the CPU.
    """

    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_offset: float
    nested_quant_map: torch.Tensor


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A quantized tensor of `n` weights.

    packed     uint8 [ceil(n / 2)], two codes a byte, the earlier weight in the high nibble
    scales     one per block, nested
    """

    packed: torch.Tensor
    scales: Nested
    n: int
    blocksize: int
