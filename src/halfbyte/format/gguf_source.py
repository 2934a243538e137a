"""A GGUF file as a `Source`: it looks like a plain bf16 Hugging Face checkpoint, and is expanded slice by slice.

    GGUF bytes --gguf.dequantize--> float32 --transformers' processor--> float32 --round to nearest even--> bf16

Every step is the one that `AutoModelForCausalLM.from_pretrained(dir, gguf_file=..., dtype=float32)` takes, so each
tensor equals that model's parameter rounded to bf16, bit for bit; tests/format/test_gguf_source.py says so.
transformers' way needs the whole model in fp32; here a slice costs its own bf16 result and some 10 MiB of scratch,
whatever the size of the tensor, because each of the three things done to weights is local:

    blocks    a slice needs the blocks it touches                  (32 or 256 weights)
    rows      Llama's q and k are reordered within heads           (a head's rows are read, then picked)
    vectors   Gemma's norm offset and the like                     (the vector is expanded whole: one row)

Reading is `os.pread` on one descriptor: no shared position, so threads need no lock.

The catch: the bf16 checkpoint is four times the size of a Q4 file and no better than it. NF4 on top of Q4 rounds twice;
the quality lost against the *original* model is the sum of both, and no figure measured against this source shows it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HeaderError
from halfbyte.format.gguf_header import DOWNLOAD_AGAIN, GGML_TYPES, read_gguf_header
from halfbyte.format.gguf_model import MappedTensor, draw_picture
from halfbyte.format.gguf_tokenizer import companion_files
from halfbyte.format.tensors import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch

#: weights expanded at a time; `gguf.dequantize` needs about five fp32 copies of them
PIECE = 1 << 18
BLOCKS = {name: (block, width) for name, block, width in GGML_TYPES.values()}


class GgufSource:
    """The Source (halfbyte.format.tensors) of one GGUF file.

    path       the file
    label      how a person calls it; the path as given if not told
    tensors    transformers' names and shapes, dtype always BF16, in file order; `start` is the packed data's offset
    config     a complete config.json
    skipped    GGUF tensors without a place in the transformers model (`rope_freqs.weight`, ...)
    notes      what the picture cannot carry, one sentence each
    file_size  bytes of the GGUF; the bf16 checkpoint it stands for is the sum of `nbytes` over `tensors`

    raises HeaderError, SourceError: see read_gguf_header and draw_picture
    """

    kind = "gguf"

    def __init__(self, path: Path | str, label: str | None = None) -> None:
        self.path = Path(path)
        self.label = label if label is not None else str(path)
        self._header = read_gguf_header(self.path)
        picture = draw_picture(self._header)
        self.file_size = self._header.file_size
        self.config: dict[str, Any] = picture.config
        self.skipped = picture.skipped
        self.notes: Sequence[str] = picture.notes
        self._processor = picture.processor
        self._mapped = {tensor.name: tensor for tensor in picture.tensors}
        self.tensors: Sequence[TensorInfo] = [
            TensorInfo(t.name, "BF16", t.stored.shape, self.path.name, t.stored.start) for t in picture.tensors
        ]
        self._descriptor = os.open(self.path, os.O_RDONLY)

    def lineage(self) -> dict[str, Any]:
        """`general.license`, `general.name` and their like from the metadata, without the prefix."""
        keys = ("license", "license.name", "license.link", "name", "organization", "basename", "finetune")
        found = {key.replace(".", "_"): self._header.metadata.get(f"general.{key}") for key in keys}
        return {key: value for key, value in found.items() if isinstance(value, str)}

    def left_behind(self) -> list[str]:
        """A GGUF is one file: tensors without a place in the model are in `skipped` and `notes`."""
        return []

    def companions(self) -> Mapping[str, Path | bytes]:
        """Tokenizer files and generation_config.json; converted once, on the first call (seconds).

        raises SourceError if the GGUF has no tokenizer that transformers can rebuild
        """
        return self._companions

    @cached_property
    def _companions(self) -> dict[str, Path | bytes]:
        return {**companion_files(self._header, self.config)}

    def read(self, info: TensorInfo, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) of the flattened tensor as a 1-d bf16 CPU tensor; the caller owns it.

        memory   2 bytes an element for the result, and PIECE expanded weights (or one head's rows, if that is more)
        raises   HeaderError if the file has become shorter than its header promised
        """
        import torch

        assert 0 <= begin <= end <= info.numel, (info.name, begin, end)
        tensor = self._mapped[info.name]
        result = torch.empty(end - begin, dtype=torch.bfloat16)
        step = _step(tensor)
        at = begin
        while at < end:
            stop = min(end, (at // step + 1) * step)
            # torch rounds fp32 to bf16 to nearest, ties to even
            result[at - begin : stop - begin] = torch.from_numpy(self._expand(tensor, at, stop))
            at = stop
        return result

    def close(self) -> None:
        """Close the file; reading afterwards is a mistake of the caller's."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _expand(self, tensor: MappedTensor, begin: int, end: int) -> np.ndarray:
        """Elements [begin, end) in float32, as transformers would have them."""
        if len(tensor.stored.shape) == 1:
            whole = self._blocks(tensor, 0, tensor.stored.shape[0])
            processed: np.ndarray = self._processor.process(whole, tensor.stored.name).weights
            return processed[begin:end].copy()
        if tensor.row_order is None:
            return self._blocks(tensor, begin, end)
        width = tensor.stored.nbytes // tensor.stored.shape[0]
        cols = _columns(tensor)
        first, last = begin // cols, -(-end // cols)
        wanted = tensor.row_order[first:last]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        packed = self._packed(tensor, low * width, high * width).reshape(-1, width)[wanted - low]
        return _dequantize(packed, tensor.stored.kind)[begin - first * cols : end - first * cols]

    def _blocks(self, tensor: MappedTensor, begin: int, end: int) -> np.ndarray:
        """Stored elements [begin, end) in float32: the blocks they touch, expanded and trimmed."""
        block, width = BLOCKS[tensor.stored.kind]
        first, last = begin // block, -(-end // block)
        packed = self._packed(tensor, first * width, last * width)
        return _dequantize(packed, tensor.stored.kind)[begin - first * block : end - first * block]

    def _packed(self, tensor: MappedTensor, begin: int, end: int) -> np.ndarray:
        """Bytes [begin, end) of a stored tensor, as uint8."""
        import numpy as np

        data = os.pread(self._descriptor, end - begin, tensor.stored.start + begin)
        if len(data) != end - begin:
            raise HeaderError(
                f"{len(data):,} of {end - begin:,} bytes could be read: the file has been cut short",
                where=f"{self.path}, tensor {tensor.stored.name!r}",
                todo=DOWNLOAD_AGAIN,
            )
        return np.frombuffer(data, dtype=np.uint8)


def _dequantize(packed: np.ndarray, kind: str) -> np.ndarray:
    """uint8 bytes of whole blocks of `kind` -> float32, flat and writable."""
    import gguf

    # one row: the library works on 16 rows at a time, and many short ones cost it ten times as long
    expanded: np.ndarray = gguf.dequantize(packed.reshape(1, -1), gguf.GGMLQuantizationType[kind]).reshape(-1)
    return expanded if expanded.flags.writeable else expanded.copy()


def _columns(tensor: MappedTensor) -> int:
    """Elements in one row (all dimensions but the first)."""
    rows = tensor.stored.shape[0]
    block, width = BLOCKS[tensor.stored.kind]
    return tensor.stored.nbytes // width * block // rows


def _step(tensor: MappedTensor) -> int:
    """Elements to expand at a time: about PIECE, in whole rows or blocks, so that no block is expanded twice."""
    cols = _columns(tensor)
    if len(tensor.stored.shape) == 1:
        return cols * tensor.stored.shape[0]
    return max(1, PIECE // cols) * cols
