"""NF4 weights as bitsandbytes stores them, drawn at random: any codes, any scales, also negative ones."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from halfbyte import codec
from halfbyte.codec import reference
from halfbyte.format.nf4_layout import quant_state_json
from halfbyte.runtime.linear.tensors import StoredWeight
from halfbyte.runtime.linear.weight import Nf4Weight, weight_from


def draw(rows: int, columns: int, seed: int = 0, blocksize: int = 64, device: str = "cpu") -> StoredWeight:
    """A weight [rows, columns] of about unit variance in its sums; a third of the scales are negative, the map is its own."""
    maker = torch.Generator(device=device).manual_seed(seed)
    n = rows * columns
    blocks = n // blocksize

    def rand(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=maker, device=device)

    packed = torch.randint(0, 256, (n // 2,), generator=maker, device=device, dtype=torch.uint8)
    absmax = torch.randint(0, 256, (blocks,), generator=maker, device=device, dtype=torch.uint8)
    nested = (0.5 + rand(-(-blocks // 256))) * columns**-0.5
    entries = codec.nested_quant_map().to(device) * (0.9 + 0.01 * (seed % 7))
    offset = float(torch.tensor(0.31 * columns**-0.5 * (1 + seed % 3), dtype=torch.float32))
    body = {
        "quant_type": "nf4", "blocksize": blocksize, "dtype": "bfloat16", "shape": [rows, columns],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip
    return StoredWeight(packed, absmax, nested, entries, json.dumps(body).encode(), rows, columns, blocksize, offset)


def fitted(rows: int, columns: int, blocksize: int = 64, device: str = "cpu", seed: int = 0) -> StoredWeight:
    """A weight as `halfbyte quantize --method gptq` leaves it: codes and scales fitted to inputs, about half of the scales negative, the
    offset 0. Fitted on `device`, whose bytes are its own."""
    maker = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=maker).to(torch.bfloat16) * columns**-0.5
    inputs = torch.randn(2 * columns, columns, generator=maker) * (0.2 + torch.rand(columns, generator=maker))
    hessian = inputs.T @ inputs / len(inputs)
    nf4 = codec.fit_weight(weight.to(device), codec.Fit(blocksize=blocksize), hessian=hessian.to(device)).nf4
    scales = nf4.scales
    state = quant_state_json((rows, columns), blocksize, scales.nested_offset)
    parts = (nf4.packed, scales.absmax, scales.nested_absmax, scales.nested_quant_map)
    return StoredWeight(*(part.to(device) for part in parts), state, rows, columns, blocksize, scales.nested_offset)


def dense(stored: Sequence[StoredWeight], levels: torch.Tensor | None = None) -> torch.Tensor:
    """The weights exactly: level times scale, float64, from bitsandbytes' layout and the codec's reference alone.

    levels  float64 [16] to use instead of NF4's
    """
    levels = codec.nf4_levels().double() if levels is None else levels
    found = []
    for part in stored:
        nested = codec.Nested(part.absmax.cpu(), part.nested_absmax.cpu(), part.offset, part.nested_quant_map.cpu())
        scale = codec.unnest_absmax(nested).to(part.packed.device, torch.float64)
        codes = reference.unpack(part.packed, part.rows * part.columns).long()
        values = levels.to(part.packed.device)[codes]
        found.append((values.view(-1, part.blocksize) * scale[:, None]).view(part.rows, part.columns))
    return torch.cat(found)


def drawn(parts: Sequence[int], columns: int, blocksize: int = 64, device: str = "cpu", seed: int = 0) -> Nf4Weight:
    """Parts of so many rows, stacked."""
    return weight_from([draw(rows, columns, seed + i, blocksize, device) for i, rows in enumerate(parts)])
