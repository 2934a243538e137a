"""From a byte of NF4 to the two bf16 levels that a tensor core multiplies with.

A table of 256 entries gives both at once: `bf16(c * level[high nibble])` in the low half, `bf16(c * level[low nibble])` in the high half
(the high nibble is the even element, and the lower half of a register comes first).

Why c? bf16 keeps 8 bits of a level: with c = 1 the 16 levels are off by 0.136 % (root mean square, weighted by how often a
level occurs in Gaussian weights and by its square). But the levels may be scaled by any c if the result is divided by it,
and some c happen to lie well: of 2^21 values tried between 1 and 2, this one leaves 0.078 %, the largest error of a
level falls from 0.31 % to 0.17 %. It costs one multiplication an output.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halfbyte.codec.codebook import NF4_LEVELS

#: c: found by trying all multiples of 2^-21 between 1 and 2
LEVEL_SCALE = 1.4367132186889648

#: what a sum of products with scaled levels is multiplied by
UNIT = float(np.float32(1 / LEVEL_SCALE))


def bf16_bits(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """float64 or float32 -> bits of the nearest bf16 (ties to even), uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: NDArray[np.unsignedinteger]) -> NDArray[np.float32]:
    """Bits of bf16 -> float32."""
    wide: NDArray[np.uint32] = bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def pair_table() -> NDArray[np.uint32]:
    """Byte -> two scaled levels, uint32 [256]: even element in the low half."""
    levels: NDArray[np.uint32] = bf16_bits(LEVEL_SCALE * np.asarray(NF4_LEVELS, dtype=np.float64)).astype(np.uint32)
    byte = np.arange(256)
    pairs: NDArray[np.uint32] = levels[byte >> 4] | (levels[byte & 15] << np.uint32(16))
    return pairs
