"""Keys and values, allocated once: a slot for every position in full layers, a ring in sliding ones.

A sliding layer needs the last `window` positions. transformers' static cache rolls the whole window by one at every step (3.4 GB a token on
the 31B); here position p lives in slot p mod slots and nothing moves. The ring has SPARE slots more than the window: a step of T tokens writes
T positions before its first query reads, and what it overwrites must be out of that query's sight: slots >= window + T - 1. For the same reason
drafts that were rejected do no harm: their slots read as positions too old to be seen, until they are written again.

    bytes = 2 (keys, values) * rows * kv_heads * slots * head_dim * bytes an element, summed over the layers that have their own

Gemma 4 31B in bf16: a sliding layer of 1,040 slots 17 MB a row (50 of them 0.85 GB), a full one 8 KiB a position (10 of them 82 kB a token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfbyte.runtime.decode.description import Description, Layer

#: the most new tokens of a step, and the slots of a ring beyond its window
SPARE = 16


@dataclass(frozen=True)
class Cache:
    """keys[i], values[i]: [rows, kv_heads, slots, head_dim] of layer i; layers that share have those of their source."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    rows: int
    capacity: int


def slots_of(layer: Layer, capacity: int) -> int:
    """Slots of a layer's cache for sequences of up to `capacity` tokens: a multiple of 16."""
    most = capacity + SPARE
    slots = min(layer.window + SPARE, most) if layer.window else most
    return -(-slots // 16) * 16


def cache_bytes(description: Description, rows: int, capacity: int) -> int:
    """Bytes that `new_cache` will take."""
    size = torch.empty(0, dtype=description.dtype).element_size()
    own = (layer for layer in description.layers if layer.source == layer.index)
    return sum(2 * rows * layer.kv_heads * slots_of(layer, capacity) * layer.head_dim * size for layer in own)


def new_cache(description: Description, rows: int, capacity: int) -> Cache:
    """An empty cache for `rows` sequences of up to `capacity` tokens each, prompt included."""
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for layer in description.layers:
        if layer.source < layer.index:
            keys.append(keys[layer.source])
            values.append(values[layer.source])
            continue
        shape = (rows, layer.kv_heads, slots_of(layer, capacity), layer.head_dim)
        # zeros, not empty: a masked slot is multiplied by zero, and NaN times zero is NaN
        keys.append(torch.zeros(shape, dtype=description.dtype, device=description.device))
        values.append(torch.zeros(shape, dtype=description.dtype, device=description.device))
    return Cache(tuple(keys), tuple(values), rows, capacity)
