"""Tensors as bytes in files: what a header says of them, and the one seam through which every worker reads weights.

A `Source` is anything that lists tensors and hands out their bytes in slices: a folder of safetensors shards, or a GGUF
file whose blocks are expanded on the way. Workers never see the difference. Slices, not tensors, because the largest
tensor of a 31B model (the embedding, 2.6 GiB) must pass through a few MiB of memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: safetensors dtype name -> (bytes per element, torch attribute name). https://github.com/huggingface/safetensors (format)
DTYPES: Mapping[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
    "F64": (8, "float64"),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a source, from its header alone.

    name   as on disk, e.g. `model.language_model.layers.0.mlp.gate_proj.weight`
    dtype  safetensors spelling: `BF16`, `F32`, ... (for GGUF: what `read` hands out, not how it is packed)
    shape  row-major, empty for a scalar
    file   file name inside the source
    start  byte offset of the data in that file (absolute, header included)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype][0]


class Source(Protocol):
    """A checkpoint to read: headers known and validated when it exists, weights only in slices.

    kind        `safetensors` or `gguf`
    path        folder (safetensors) or file (gguf)
    label       how a person calls it: the hub id or the path as given
    tensors     every tensor, in file order (the order in which reading is sequential)
    config      parsed config.json of the model (for GGUF: built from its metadata)
    notes       what the source cannot carry into the picture, one sentence each
    companions  files to carry over: name in the output folder -> bytes or the path to copy byte for byte
    lineage     licence and origin as the source states them (`license`, `base_model`, ...), empty if it does not
    left_behind names of files that are neither weights nor carried over
    """

    kind: str
    path: Path
    label: str
    tensors: Sequence[TensorInfo]
    config: dict[str, Any]
    notes: Sequence[str]

    def companions(self) -> Mapping[str, Path | bytes]: ...

    def lineage(self) -> dict[str, Any]: ...

    def left_behind(self) -> list[str]: ...

    def read(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of the flattened tensor as a 1-d CPU tensor of `info.dtype`; the caller owns it.

        raises HeaderError if the file is shorter than its header promised. Safe to call from several threads.
        """
        ...

    def close(self) -> None: ...
