"""One tensor from source to shard, in slices: the inner loop of `quantize`.

Each worker thread takes one tensor at a time and walks it in slices of SLICE_ELEMENTS: read, hash, quantize (or pass
on), write. Reading, hashing, the codec and writing all release the interpreter lock, so with one worker a core the
workers overlap each other's phases; that is the pipeline, with no queue to size and nothing to hand over. Memory is
`workers x (slice + its codes)` and does not depend on the model: of an NF4 tensor only its scales (1/16 byte a weight)
are held until the last slice, because the second level needs their mean.

The weight is rounded to bfloat16 first if it is not (as stock transformers does when it loads with dtype bfloat16), so
codes are a function of the bf16 weight alone. The mean is taken on one thread: torch's sum order depends on its number
of threads, and a file must not depend on the number of cores (docs/format.md).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.errors import NonFiniteWeight
from halfbyte.format import nf4_layout
from halfbyte.format.shards import ShardFile
from halfbyte.format.tensors import Source, TensorInfo
from halfbyte.progress import Advance
from halfbyte.recipe.decisions import Decision

if TYPE_CHECKING:
    import torch

    from halfbyte.codec import Nested

#: elements a slice; a multiple of every blocksize and of 2, so that slices quantize as the whole would
SLICE_ELEMENTS = 1 << 24
_INF_BITS = {"BF16": (0x7F80, "uint16"), "F16": (0x7C00, "uint16"), "F32": (0x7F800000, "uint32")}


class Stopped(Exception):
    """Raised inside a worker when the job is being interrupted."""


@dataclass
class TensorWork:
    """What every tensor of a job shares; `blocksize` is that of a decision which names no other."""

    source: Source
    blocksize: int
    device: str
    stop: threading.Event
    advance: Advance

    def run(self, info: TensorInfo, decision: Decision, target: ShardFile) -> dict[str, Any]:
        """Write everything that `info` becomes into `target`; returns the journal entry.

        raises NonFiniteWeight, HeaderError (source cut short), OutputError (disk full)
        """
        source_hash = hashlib.sha256()
        if decision.action == "nf4":
            output_sha256, state = self._quantize(info, decision.blocksize or self.blocksize, target, source_hash)
        else:
            self._copy(info, target, source_hash)
            output_sha256, state = source_hash.hexdigest(), None
        return {
            "tensor": info.name,
            "source_sha256": source_hash.hexdigest(),
            "output_sha256": output_sha256,
            "quant_state": state,
        }

    def _slices(self, info: TensorInfo, source_hash: Any) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, slice) pairs; hashes each and reports it as done once the consumer asks for the next."""
        for begin in range(0, info.numel, SLICE_ELEMENTS):
            if self.stop.is_set():
                raise Stopped
            piece = self.source.read(info, begin, min(begin + SLICE_ELEMENTS, info.numel))
            source_hash.update(memoryview(as_bytes(piece)))
            yield begin, piece
            self.advance(piece.numel() * piece.element_size())

    def _copy(self, info: TensorInfo, target: ShardFile, source_hash: Any) -> None:
        for begin, piece in self._slices(info, source_hash):
            check_finite(piece, info)
            target.write(info.name, begin * piece.element_size(), memoryview(as_bytes(piece)))

    def _quantize(self, info: TensorInfo, blocksize: int, target: ShardFile, source_hash: Any) -> tuple[str, str]:
        import torch

        from halfbyte import codec

        output_hash, scales = hashlib.sha256(), []
        for begin, piece in self._slices(info, source_hash):
            weight = piece.to(self.device).to(torch.bfloat16)
            try:
                packed, absmax = codec.quantize_blocks(weight, blocksize, threads=1)
            except NonFiniteWeight as error:
                raise _non_finite(info) from error
            codes = memoryview(as_bytes(packed.cpu()))
            output_hash.update(codes)
            target.write(info.name, begin // 2, codes)
            scales.append(absmax.cpu())
        try:
            nested = codec.nest_absmax(torch.cat(scales), threads=1)
        except NonFiniteWeight as error:  # finite scales whose mean overflows float32
            raise _non_finite(info, error.what) from error
        state = write_scales(info, blocksize, nested, target, output_hash)
        return output_hash.hexdigest(), state


def write_scales(info: TensorInfo, blocksize: int, nested: Nested, target: ShardFile, output_hash: Any) -> str:
    """Write what belongs to the codes of one NF4 weight; returns its quant_state JSON. `output_hash` goes on from the codes."""
    import torch

    from halfbyte import codec

    parts = {
        "absmax": nested.absmax,
        "quant_map": torch.tensor(codec.NF4_LEVELS, dtype=torch.float32),
        "nested_absmax": nested.nested_absmax,
        "nested_quant_map": nested.nested_quant_map,
    }
    for component, tensor in parts.items():
        data = memoryview(as_bytes(tensor))
        output_hash.update(data)
        target.write(f"{info.name}.{component}", 0, data)
    return nf4_layout.quant_state_json(info.shape, blocksize, nested.nested_offset).decode()


def as_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's memory as a flat numpy uint8 array (no copy for contiguous CPU tensors)."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def check_finite(piece: torch.Tensor, info: TensorInfo) -> None:
    """Raises NonFiniteWeight if a floating slice holds NaN or infinity (read off the exponent bits: one pass).

    A tensor of one element may be infinite, never NaN: Gemma's clip bounds are (docs/format.md F21).
    """
    if info.dtype not in _INF_BITS or piece.numel() == 0:
        return
    inf_bits, integer = _INF_BITS[info.dtype]
    bits = as_bytes(piece).view(integer)
    largest = int((bits & ((1 << (8 * bits.itemsize - 1)) - 1)).max())
    if largest > inf_bits or (largest == inf_bits and info.numel > 1):
        raise _non_finite(info)


def _non_finite(info: TensorInfo, what: str = "holds NaN or infinity") -> NonFiniteWeight:
    return NonFiniteWeight(
        what,
        where=f"{info.file}: tensor {info.name}",
        todo="the checkpoint is damaged: download that shard again",
    )
