"""The six tensors that bitsandbytes stores of an NF4 weight, read, checked and kept.

They come from a checkpoint (docs/format.md) or from a live `Linear4bit`, whose `quant_state` holds the same. Everything is
checked here, since what follows computes with raw bytes: sizes, types, the 16 levels. The JSON is kept byte for byte, so that
`to_dict` gives back what came in.

The catch: a weight without double quantization (float32 scales) is valid NF4 but not this format; it is refused with a reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.codec import NESTED_BLOCKSIZE, NF4_LEVELS
from halfbyte.errors import ShapeMismatch, SourceError
from halfbyte.format.nf4_layout import QUANT_STATE_SUFFIX

NAMES = ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE_SUFFIX)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """One weight as bitsandbytes stores it.

    packed            uint8 [rows * columns / 2]
    absmax            uint8 [blocks]
    nested_absmax     float32 [ceil(blocks / 256)]
    nested_quant_map  float32 [256]
    state             the JSON, byte for byte
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_quant_map: torch.Tensor
    state: bytes
    rows: int
    columns: int
    blocksize: int
    offset: float

    def to_dict(self) -> dict[str, torch.Tensor]:
        """The six tensors under bitsandbytes' names (without the weight's own), on the device of `packed`."""
        device = self.packed.device
        state = torch.frombuffer(bytearray(self.state), dtype=torch.uint8).to(device)
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)
        values = (
            self.packed.reshape(-1, 1), self.absmax, levels, self.nested_absmax, self.nested_quant_map, state
        )  # fmt: skip
        return dict(zip(NAMES, values, strict=True))


def read_stored(tensors: dict[str, torch.Tensor], where: str = "weight") -> StoredWeight:
    """Check six tensors, named as in NAMES.

    raises  SourceError (a tensor missing, another quant_type, other levels, no double quantization), ShapeMismatch
    """
    missing = [name for name in NAMES if name not in tensors]
    if missing:
        raise SourceError(f"tensor {missing[0]!r} is missing", where=where, todo="pass a double-quantized NF4 weight")
    state = bytes(tensors[QUANT_STATE_SUFFIX].cpu().contiguous().view(torch.uint8).flatten().tolist())
    shape, blocksize, offset = read_state(state, where)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32)
    if not torch.equal(tensors["quant_map"].detach().cpu().float().flatten(), levels):
        raise SourceError("quant_map does not hold the NF4 levels", where=where, todo="quantize with quant_type nf4")
    rows, columns = shape
    blocks = -(-rows * columns // blocksize)
    sizes = {
        "weight": (torch.uint8, -(-rows * columns // 2)),
        "absmax": (torch.uint8, blocks),
        "nested_absmax": (torch.float32, -(-blocks // NESTED_BLOCKSIZE)),
        "nested_quant_map": (torch.float32, 256),
    }
    flat = {}
    for name, (dtype, size) in sizes.items():
        tensor = tensors[name].detach().contiguous().view(-1)
        if name == "weight" and tensor.dtype != dtype:
            tensor = tensor.view(torch.uint8)  # quant_storage: the same bytes under another type
        if tensor.dtype != dtype or tensor.numel() != size:
            raise ShapeMismatch(
                f"{name} is {tensor.dtype} [{tensor.numel()}], {shape} in blocks of {blocksize} needs {dtype} [{size}]",
                where=where,
            )
        flat[name] = tensor
    return StoredWeight(
        flat["weight"], flat["absmax"], flat["nested_absmax"], flat["nested_quant_map"],
        state, rows, columns, blocksize, offset,
    )  # fmt: skip


def read_state(state: bytes, where: str) -> tuple[tuple[int, int], int, float]:
    """Shape, block size and offset of the JSON. raises SourceError if it says anything this format does not have"""
    try:
        body: Any = json.loads(state)
        kind, blocksize, nested = body["quant_type"], body["blocksize"], body["nested_blocksize"]
        shape, offset = body["shape"], body["nested_offset"]
        rows, columns = shape
        numbers = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in (rows, columns, blocksize))
        offset = float(offset)
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"quant_state cannot be read ({type(error).__name__}: {error})",
            where=where,
            todo="pass a double-quantized NF4 weight of two dimensions",
        ) from None
    if kind != "nf4" or nested != NESTED_BLOCKSIZE or not numbers:
        raise SourceError(
            f"quant_state is {kind}, shape {shape}, blocks of {blocksize} and {nested}",
            where=where,
            todo=f"pass NF4 with nested blocks of {NESTED_BLOCKSIZE}",
        )
    return (rows, columns), blocksize, offset


def stored_of_linear(linear: Any) -> StoredWeight:
    """The weight of a live bitsandbytes `Linear4bit` that has been quantized. raises as `read_stored`"""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        raise SourceError("not quantized yet", where=type(linear).__name__, todo="move it to its device first")
    if not state.nested:
        raise SourceError("scales are not double-quantized", where=type(linear).__name__, todo="keep Linear4bit for it")
    if getattr(state, "packing_format_for_cpu", False):
        raise SourceError(
            "its bytes are in bitsandbytes' CPU order", where=type(linear).__name__, todo="take its state_dict"
        )
    packed = state.as_dict(packed=True)
    return read_stored({"weight": linear.weight.data, **{name: packed[name] for name in NAMES[1:] if name in packed}})
