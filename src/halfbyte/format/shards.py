"""Shards as they will be on disk, planned to the byte before the first weight is read.

Knowing every offset beforehand is what lets tensors be written in any order by several threads, and what makes an
interrupted job continue to the same bytes. One thing is not known beforehand: the length of the quant_state JSON
(`nf4_layout`). So each shard is laid out as

    u64 N | header, padded with spaces to the longest it can become | 4- and 2-byte tensors | 1-byte tensors | the JSONs

Wide tensors first keeps every tensor aligned to its element size (the reference reader views bytes as elements, and
torch refuses a misaligned view); the JSONs last means that their lengths move nothing. The padding is the format's own
(a header may end in spaces).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from halfbyte.errors import OutputError, UsageError
from halfbyte.format import nf4_layout
from halfbyte.format.tensors import DTYPES
from halfbyte.records import current_umask

_METADATA = {"format": "pt"}
_HASH_CHUNK = 1 << 22
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output: `owner` is the source tensor it comes from, `offset` its place in the shard's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    owner: str
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][0]

    @property
    def is_quant_state(self) -> bool:
        return self.name.endswith("." + nf4_layout.QUANT_STATE_SUFFIX)


@dataclass(frozen=True)
class Shard:
    """One file of the output.

    tensors       fixed-size tensors with their final offsets, in data order
    quant_states  the JSON tensors, in the order in which they follow the fixed ones
    header_bytes  N: length of the padded header
    fixed_bytes   where the JSONs begin in the data
    """

    file: str
    tensors: tuple[OutputTensor, ...]
    quant_states: tuple[OutputTensor, ...]
    header_bytes: int
    fixed_bytes: int

    @property
    def owners(self) -> list[str]:
        """The source tensors whose results lie in this shard."""
        return list(dict.fromkeys(t.owner for t in (*self.tensors, *self.quant_states)))


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Bytes of `5GB`, `500 MB`, `4GiB` or a plain number; raises UsageError, naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if not match or unit is None or (size := int(float(match.group(1)) * unit)) <= 0:
        raise UsageError(f"{text!r} is not a size", where=option, todo="write it as 5GB, 500MB or 4GiB")
    return size


def outputs_of(name: str, dtype: str, shape: Sequence[int], action: str, blocksize: int) -> list[OutputTensor]:
    """What one source tensor becomes: itself if kept, six tensors if quantized."""
    if action == "keep":
        return [OutputTensor(name, dtype, tuple(shape), name)]
    sizes = nf4_layout.component_sizes(name, shape, blocksize)
    return [OutputTensor(part, part_dtype, part_shape, name) for part, (part_dtype, part_shape) in sizes.items()]


def plan_shards(groups: Iterable[Sequence[OutputTensor]], max_shard_bytes: int) -> list[Shard]:
    """Fill shards in order, never splitting a group (a weight and its components belong together).

    groups           the outputs of each source tensor, in source order
    max_shard_bytes  a shard is closed before it would exceed this (a single larger group gets a shard of its own)
    """
    filled: list[list[OutputTensor]] = [[]]
    size = 0
    for group in groups:
        group_size = sum(t.nbytes for t in group)
        if filled[-1] and size + group_size > max_shard_bytes:
            filled.append([])
            size = 0
        filled[-1].extend(group)
        size += group_size
    count = len(filled)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    return [_lay_out(name, tensors) for name, tensors in zip(names, filled, strict=True)]


def _lay_out(file: str, tensors: Sequence[OutputTensor]) -> Shard:
    fixed = sorted((t for t in tensors if not t.is_quant_state), key=lambda t: -DTYPES[t.dtype][0])
    position, placed = 0, []
    for tensor in fixed:
        placed.append(OutputTensor(tensor.name, tensor.dtype, tensor.shape, tensor.owner, position))
        position += tensor.nbytes
    states = tuple(t for t in tensors if t.is_quant_state)
    longest = {t.name: t.shape[0] + 16 for t in states}  # 16: more than the estimate can be short by
    header = json.dumps(_header(placed, states, position, longest), separators=(",", ":"))
    return Shard(file, tuple(placed), states, -(-len(header.encode()) // 8) * 8, position)


def _header(
    placed: Sequence[OutputTensor], states: Sequence[OutputTensor], fixed_bytes: int, lengths: Mapping[str, int]
) -> dict[str, object]:
    body: dict[str, object] = {"__metadata__": _METADATA}
    for t in placed:
        body[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.offset, t.offset + t.nbytes]}
    position = fixed_bytes
    for t in states:
        end = position + lengths[t.name]
        body[t.name] = {"dtype": "U8", "shape": [lengths[t.name]], "data_offsets": [position, end]}
        position = end
    return body


def beginning(shard: Shard, lengths: Mapping[str, int]) -> bytes:
    """What stands before a shard's data: N and the padded header. lengths: bytes of each quant_state's JSON"""
    header = json.dumps(_header(shard.tensors, shard.quant_states, shard.fixed_bytes, lengths), separators=(",", ":"))
    padded = header.encode().ljust(shard.header_bytes)
    assert len(padded) == shard.header_bytes, "header outgrew its reserve"
    return len(padded).to_bytes(8, "little") + padded


class ShardFile:
    """A shard being written under a temporary name; `finish` gives it its final one. Safe for several writing threads.

    The temporary file lies in `work` (same filesystem as `folder`), so a reader of `folder` never sees half a shard.
    """

    def __init__(self, shard: Shard, work: Path, folder: Path) -> None:
        self.shard = shard
        self.part = work / f"{shard.file}.part"
        self.final = folder / shard.file
        self._offsets = {t.name: t.offset for t in shard.tensors}
        self._descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def write(self, name: str, skip: int, data: memoryview) -> None:
        """Put `data` (bytes) into the tensor `name`, `skip` bytes after its start."""
        position = 8 + self.shard.header_bytes + self._offsets[name] + skip
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], position + done)
        except OSError as error:
            raise _write_failed(error, self.part) from None

    def digest_of(self, names: Iterable[str]) -> str:
        """sha256 over the current bytes of the tensors `names`, in that order: what a resumed job checks."""
        sizes = {t.name: t.nbytes for t in self.shard.tensors}
        total = hashlib.sha256()
        for name in names:
            start = 8 + self.shard.header_bytes + self._offsets[name]
            for position in range(0, sizes[name], _HASH_CHUNK):
                length = min(_HASH_CHUNK, sizes[name] - position)
                total.update(os.pread(self._descriptor, length, start + position))
        return total.hexdigest()

    def finish(self, quant_states: Mapping[str, bytes]) -> str:
        """Write header and JSONs, flush to disk, rename to the final name; returns the file's sha256.

        quant_states  JSON per quant_state tensor name; every tensor of the shard must have been written
        """
        shard = self.shard
        start = beginning(shard, {t.name: len(quant_states[t.name]) for t in shard.quant_states})
        blobs = b"".join(quant_states[t.name] for t in shard.quant_states)
        base = len(start)
        try:
            os.pwrite(self._descriptor, start, 0)
            os.pwrite(self._descriptor, blobs, base + shard.fixed_bytes)
            os.ftruncate(self._descriptor, base + shard.fixed_bytes + len(blobs))
            os.fsync(self._descriptor)
        except OSError as error:
            raise _write_failed(error, self.part) from None
        sha256 = hash_file(self.part)
        self.close()
        os.chmod(self.part, 0o666 & ~current_umask())
        os.replace(self.part, self.final)
        return sha256

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_tensor(path: Path, shard: Shard, name: str) -> bytes:
    """The bytes of the tensor `name` (no quant state) from a shard at `path`, finished or still being written."""
    found = next(t for t in shard.tensors if t.name == name)
    with path.open("rb") as file:
        file.seek(8 + shard.header_bytes + found.offset)
        return file.read(found.nbytes)


def _write_failed(error: OSError, path: Path) -> OutputError:
    return OutputError(
        f"writing failed: {error.strerror}",
        where=str(path),
        todo="free some space and run the command again: it continues",
    )


def hash_file(path: Path) -> str:
    """sha256 of a file, hexadecimal, reading 4 MiB at a time."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def index_json(shards: Sequence[Shard], total_size: int) -> str:
    """`model.safetensors.index.json` as transformers writes it: total_size in bytes of data, names sorted."""
    weight_map = {t.name: shard.file for shard in shards for t in (*shard.tensors, *shard.quant_states)}
    body = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(body, indent=2) + "\n"
