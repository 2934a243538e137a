"""How many bytes a model takes, counted where there are files and computed where there are none.

file_bytes        of the weight files (headers included), or what the plan says would be written
bits_per_weight   8 x file_bytes over the number of weights and buffers
counted           True: files on disk; False: computed from shapes (a candidate that is rounded on the fly)
"""

from __future__ import annotations

from math import prod
from typing import Any

from halfbyte.layers.weights import PlainWeights, Rounded, Weights
from halfbyte.recipe.sizes import nf4_bytes, source_bytes

#: a q4_0 block: 32 weights of 4 bits and an fp16 scale
Q4_0_BYTES, Q4_0_BLOCK = 18, 32


def size_of(weights: Weights, parameters: int | None) -> dict[str, Any]:
    """{"file_bytes", "bits_per_weight", "counted", "parameters"}; None where nothing is known (a uniform mock)."""
    found, counted = _bytes(weights)
    bits = 8 * found / parameters if found is not None and parameters else None
    return {"file_bytes": found, "bits_per_weight": bits, "counted": counted, "parameters": parameters}


def parameters_of(reference: Weights) -> int | None:
    """Weights and buffers of a plain checkpoint, None if it is another kind."""
    if isinstance(reference, PlainWeights) and len(reference.names()) == len(reference.source.tensors):
        return sum(info.numel for info in reference.source.tensors)
    return None


def _bytes(weights: Weights) -> tuple[int | None, bool]:
    if isinstance(weights, PlainWeights):
        root = weights.source.path if weights.source.path.is_dir() else weights.source.path.parent
        files = {info.file for info in weights.source.tensors}
        return sum((root / name).stat().st_size for name in files), True
    if isinstance(weights, Rounded):
        total = 0
        for decision in weights.plan.decisions:
            if decision.action != "nf4":
                total += source_bytes(decision)
            elif weights.rounding == "nf4":
                total += nf4_bytes(decision.shape, weights.blocksize)
            else:
                total += -(-prod(decision.shape) // Q4_0_BLOCK) * Q4_0_BYTES
        return total, False
    return None, False
