"""A GGUF header read as hostile input: magic, counts, metadata and the tensor table, checked before anyone believes it.

    "GGUF" | version u32 | tensors u64 | keys u64
    keys   x { key: string | type u32 | value }          string = length u64 + utf-8; array = type u32, count u64, items
    tensors x { name: string | dims u32 | dim u64 ... | ggml type u32 | offset u64 }
    padding to `general.alignment` (32 unless it says otherwise), then the data; offsets count from there, aligned

Little endian, versions 2 and 3. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Why our own walk, when the `gguf` package has a reader? That reader makes several Python objects for each item of each
array and trusts every count: one 100 MB array of bytes becomes tens of GB, a lying length becomes a numpy error far
from its cause. Here every count is held against the bytes that are really left, before a loop or an allocation starts;
what passes is safe to hand to that reader. Large arrays (a vocabulary) are walked, not kept: only their length is.

The catch: dims are written fastest first, so the row-major shape is the reverse; and a quantized tensor is packed in
blocks of 32 or 256 along its last dimension, so each row must be a whole number of blocks.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from halfbyte.errors import HeaderError

MAGIC = b"GGUF"
#: ggml type number -> (name, weights per block, bytes per block): the types that this version expands
GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
#: metadata type number -> struct code; 8 is a string, 9 an array
SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9
#: far above any published model, far below what would hurt: Gemma's vocabulary and merges are 1.3 million items
MAX_ITEMS = 4_000_000
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME = 1_024
#: one value; the longest in use are whole tokenizer.json files
MAX_TEXT = 1 << 26
#: arrays up to this length are kept (per-layer head counts, stop tokens), longer ones only counted
KEEP_ITEMS = 1_024
DOWNLOAD_AGAIN = "compare the file's size and hash with the publisher's and download it again"


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table.

    name    llama.cpp's name, e.g. `blk.0.attn_q.weight`
    kind    ggml type: a value's name in GGML_TYPES
    shape   row-major (the file's order reversed)
    start   absolute byte offset in the file
    nbytes  packed size
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """All that a GGUF says of itself.

    metadata   key -> scalar, string or short list; a long array is an `ArrayLength`
    tensors    by offset in the file
    items      metadata array items in all: the other GGUF readers spend about a kilobyte of memory on each
    """

    path: Path
    file_size: int
    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    items: int


@dataclass(frozen=True)
class ArrayLength:
    """Stands for a metadata array that was walked and checked but not kept."""

    count: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check the header of the GGUF file `path`; costs no more memory than the header's own text.

    raises HeaderError if the file is not GGUF, is cut short, or says anything of itself that cannot be true
    """
    if not path.is_file():
        raise HeaderError("no such GGUF file", where=str(path), todo="check the path")
    size = path.stat().st_size
    if size < 24:
        raise HeaderError(f"{size} bytes are too few for a GGUF header (24)", where=str(path), todo=DOWNLOAD_AGAIN)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Walk(path, data, size).header()


class _Walk:
    """One pass over the bytes; `at` only moves forward, and only over bytes that exist."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.at = 0
        self.items = 0

    def header(self) -> GgufHeader:
        version, tensor_count, key_count = self._preamble()
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string("metadata key")
            if key in metadata:
                self._refuse(f"metadata key {key!r} appears twice")
            metadata[key] = self._value(self._scalar("<I", f"type of {key!r}"), key)
        rows = [self._tensor_row() for _ in range(tensor_count)]
        tensors = self._place(rows, self._alignment(metadata))
        self._check_metadata(metadata)
        return GgufHeader(self.path, self.size, version, metadata, tensors, self.items)

    def _preamble(self) -> tuple[int, int, int]:
        if self._take(4, "magic") != MAGIC:
            self._refuse(
                f"not a GGUF file: it starts with {bytes(self.data[:4])!r}, not {MAGIC!r}",
                todo="give a .gguf file, or a folder with a Hugging Face checkpoint",
            )
        version = self._scalar("<I", "version")
        if version & 0xFFFF == 0:
            self._refuse("a big-endian GGUF file", todo="convert it to little endian with gguf_convert_endian.py")
        if version not in (2, 3):
            self._refuse(
                f"GGUF version {version}; this reads 2 and 3", todo="convert it again with a current llama.cpp"
            )
        tensor_count, key_count = self._scalar("<Q", "tensor count"), self._scalar("<Q", "key count")
        self._affordable(tensor_count, 33, MAX_TENSORS, "tensors")
        self._affordable(key_count, 13, MAX_KEYS, "metadata keys")
        return version, tensor_count, key_count

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._string(f"value of {key!r}", MAX_TEXT)
        if kind in SCALARS:
            return self._scalar(SCALARS[kind], f"value of {key!r}")
        if kind != ARRAY:
            self._refuse(f"metadata key {key!r} has the unknown type {kind}")
        item = self._scalar("<I", f"item type of {key!r}")
        count = self._scalar("<Q", f"length of {key!r}")
        if item not in SCALARS and item != STRING:
            self._refuse(f"metadata array {key!r} has items of type {item}, which cannot be")
        width = struct.calcsize(SCALARS[item]) if item in SCALARS else 8
        self._affordable(count, width, MAX_ITEMS - self.items, f"items in {key!r}")
        self.items += count
        if count <= KEEP_ITEMS:
            return [self._value(item, key) for _ in range(count)]
        if item == STRING:
            for _ in range(count):
                self._string(f"item of {key!r}", MAX_TEXT)
        else:
            self._take(count * width, key)
        return ArrayLength(count)

    def _tensor_row(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self._string("tensor name", MAX_NAME)
        dims = self._scalar("<I", f"dimensions of {name!r}")
        if not 1 <= dims <= 4:
            self._refuse(f"{dims} dimensions; GGUF has 1 to 4", tensor=name)
        shape = tuple(self._scalar("<Q", f"shape of {name!r}") for _ in range(dims))[::-1]
        kind = self._scalar("<I", f"type of {name!r}")
        offset = self._scalar("<Q", f"offset of {name!r}")
        if 0 in shape:
            self._refuse(f"shape {list(shape)} has a zero", tensor=name)
        if kind not in GGML_TYPES:
            known = ", ".join(entry[0] for entry in GGML_TYPES.values())
            self._refuse(
                f"weights of type {_type_name(kind)}; supported: {known}",
                tensor=name,
                todo="use a GGUF of one of these types, best Q8_0, BF16 or the source checkpoint itself",
            )
        label, block, _ = GGML_TYPES[kind]
        if shape[-1] % block:
            self._refuse(f"rows of {shape[-1]} weights are not whole {label} blocks of {block}", tensor=name)
        return name, label, shape, offset

    def _place(self, rows: list[tuple[str, str, tuple[int, ...], int]], alignment: int) -> tuple[GgufTensor, ...]:
        """Offsets to absolute positions, held against the file's size and against each other."""
        base = -(-self.at // alignment) * alignment
        sizes = {label: (block, width) for label, block, width in GGML_TYPES.values()}
        tensors: list[GgufTensor] = []
        names: set[str] = set()
        end = base
        for name, label, shape, offset in sorted(rows, key=lambda row: row[3]):
            block, width = sizes[label]
            start, nbytes = base + offset, prod(shape) // block * width
            if name in names:
                self._refuse("two tensors of this name", tensor=name)
            if offset % alignment:
                self._refuse(f"offset {offset} is not a multiple of the alignment {alignment}", tensor=name)
            if start + nbytes > self.size:
                self._refuse(f"data end at byte {start + nbytes:,}, the file at {self.size:,}", tensor=name)
            if start < end:
                self._refuse(f"data start at byte {start:,}, inside {tensors[-1].name!r}", tensor=name)
            names.add(name)
            end = start + nbytes
            tensors.append(GgufTensor(name, label, shape, start, nbytes))
        return tuple(tensors)

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
            self._refuse(f"general.alignment is {value!r}, not a power of two from 8 on")
        return value

    def _check_metadata(self, metadata: Mapping[str, Any]) -> None:
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            self._refuse(f"general.architecture is {architecture!r}, not a name")
        if metadata.get("split.count", 0) not in (0, 1):
            self._refuse(
                f"one of {metadata['split.count']!r} parts of a split GGUF",
                todo="join the parts first: llama-gguf-split --merge FIRST_PART OUTPUT",
            )

    def _affordable(self, count: int, width: int, limit: int, noun: str) -> None:
        """Refuse a count that the rest of the file cannot hold, or that no real model comes near."""
        left = self.size - self.at
        if count * width > left:
            self._refuse(f"{count:,} {noun} need {count * width:,} bytes or more, {left:,} are left")
        if count > limit:
            self._refuse(f"{count:,} {noun} are more than the {limit:,} that this version reads")

    def _string(self, noun: str, limit: int = MAX_NAME) -> str:
        length = self._scalar("<Q", f"length of {noun}")
        if length > limit:
            self._refuse(f"{noun} of {length:,} bytes; at most {limit:,}")
        raw: bytes = self._take(length, noun)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self._refuse(f"{noun} is not UTF-8 ({error.reason} at byte {error.start})")

    def _scalar(self, code: str, noun: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code), noun))[0]

    def _take(self, count: int, noun: str) -> bytes:
        if count > self.size - self.at:
            self._refuse(f"the file ends at byte {self.size:,}, inside its header ({noun})", todo=DOWNLOAD_AGAIN)
        self.at += count
        return self.data[self.at - count : self.at]

    def _refuse(self, what: str, *, tensor: str | None = None, todo: str = DOWNLOAD_AGAIN) -> NoReturn:
        where = f"{self.path}, tensor {tensor!r}" if tensor else f"{self.path}, byte {self.at:,}"
        raise HeaderError(what, where=where, todo=todo)


def _type_name(kind: int) -> str:
    """The name of a ggml type that GGML_TYPES lacks, for an error message only."""
    try:
        from gguf.constants import GGMLQuantizationType

        return str(GGMLQuantizationType(kind).name)
    except ValueError:
        return f"number {kind}, which ggml does not have"
