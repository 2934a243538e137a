"""safetensors headers, read as hostile input.

A safetensors file is `u64 little-endian N | N bytes of JSON | data`. The JSON maps each tensor name to its dtype, shape
and [begin, end) offsets into the data. The reference reader trusts more than we can: version 0.8 takes any tensor name,
and transformers follows `../` in `model.safetensors.index.json`. Everything here is decided from sizes and the
header alone, before one byte of data is read or one byte of memory is taken for it:

    length   8 + N <= file size, N <= 100 MB, the JSON is one object without repeated keys
    entry    known dtype, shape of non-negative integers, end - begin = numel * itemsize
    layout   sorted by begin the tensors follow each other without overlap or hole and end where the file ends
    names    tensor names: visible characters, no path separators; shard names: one file name inside the folder

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import re
from math import prod
from pathlib import Path
from typing import Any

from halfbyte.errors import HeaderError, SourceError, UnsafeName
from halfbyte.format.tensors import DTYPES, TensorInfo

#: upper bound of a header, the limit of the reference implementation
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 1024
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,250}\.safetensors")


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return body


def parse_json_object(text: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object without repeated keys; raises HeaderError naming `where` on anything else."""
    try:
        body = json.loads(text, object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as error:
        raise HeaderError(
            f"not the JSON object it must be ({error})", where=where, todo="download the file again"
        ) from None
    if not isinstance(body, dict):
        raise HeaderError(f"JSON holds {type(body).__name__}, not an object", where=where, todo="download it again")
    return body


def check_tensor_name(name: str, where: str) -> None:
    """Raises UnsafeName for names that are empty, very long, invisible or could be read as a path."""
    bad = not name or len(name) > MAX_NAME_LENGTH or not name.isprintable() or "/" in name or "\\" in name
    if bad or ".." in name or name.startswith("."):
        raise UnsafeName(
            f"tensor name {name[:80]!r} is not a dotted name", where=where, todo="do not use this file: it is malformed"
        )


def check_shard_name(name: object, where: str) -> str:
    """`name` if it is one plain file name ending in .safetensors, else UnsafeName."""
    if not isinstance(name, str) or not _SHARD.fullmatch(name):
        raise UnsafeName(
            f"shard name {str(name)[:120]!r} is not a plain file name inside the checkpoint",
            where=where,
            todo="do not use this checkpoint: its index points outside its own folder",
        )
    return name


def _parse_entry(name: str, entry: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    here = f"{where}: tensor {name}"
    todo = "the header contradicts itself: download the file again"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError("entry must hold dtype, shape and data_offsets", where=here, todo=todo)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"unknown dtype {dtype!r}", where=here, todo=f"known: {', '.join(DTYPES)}")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else None
    if numbers is None or len(offsets) != 2 or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise HeaderError("shape and data_offsets must be lists of non-negative integers", where=here, todo=todo)
    begin, end = offsets
    size = prod(shape) * DTYPES[dtype][0]
    if end - begin != size:
        raise HeaderError(f"offsets span {end - begin} bytes, dtype and shape need {size}", where=here, todo=todo)
    return dtype, tuple(shape), begin, end


def read_header(path: Path) -> list[TensorInfo]:
    """Every tensor of one safetensors file, in data order; reads the header only.

    raises HeaderError (any lie about sizes, a truncated file), UnsafeName (a tensor name like a path)
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, MAX_HEADER_BYTES):
                raise HeaderError(
                    f"header claims {length} bytes, the file has {total}",
                    where=where,
                    todo="the file is cut short or not safetensors: download it again",
                )
            text = file.read(length)
    except OSError as error:
        raise SourceError(
            f"cannot be read: {error.strerror}", where=where, todo="check the path and its rights"
        ) from None
    body = parse_json_object(text, where)
    body.pop("__metadata__", None)
    base = 8 + length
    spans = []
    for name, entry in body.items():
        check_tensor_name(name, where)
        spans.append((name, *_parse_entry(name, entry, where)))
    spans.sort(key=lambda span: (span[3], span[4]))
    _check_layout(spans, total - base, where)
    return [TensorInfo(name, dtype, shape, path.name, base + begin) for name, dtype, shape, begin, _ in spans]


def _check_layout(spans: list[tuple[str, str, tuple[int, ...], int, int]], size: int, where: str) -> None:
    """Tensors must tile the data exactly: an overlap is an attack, a hole hides bytes, a short file is truncated."""
    position, previous = 0, "the header"
    for name, _, _, begin, end in spans:
        if begin != position:
            kind = "overlap" if begin < position else "leave a hole"
            raise HeaderError(
                f"{previous} and {name} {kind}: data expected at {position}, found at {begin}",
                where=where,
                todo="the header lies: download the file again",
            )
        position, previous = end, name
    if position != size:
        verb = "cut short" if position > size else "longer than its header says"
        raise HeaderError(
            f"file is {verb}: tensors need {position} bytes of data, there are {size}",
            where=where,
            todo="download the file again",
        )


def read_index(folder: Path) -> dict[str, str]:
    """tensor name -> shard file name, from the index or, without one, from `model.safetensors` itself.

    raises UnsafeName if a shard name is not a plain file name, HeaderError if the index is malformed, SourceError if the
    folder holds no safetensors at all (weights as pickle are refused: loading one runs its code).
    """
    path = folder / INDEX_NAME
    if path.is_file():
        weight_map = parse_json_object(path.read_bytes(), str(path)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HeaderError("index has no weight_map", where=str(path), todo="download the file again")
        for name in weight_map:
            check_tensor_name(name, str(path))
        return {name: check_shard_name(shard, str(path)) for name, shard in weight_map.items()}
    single = folder / SINGLE_NAME
    if single.is_file():
        return {info.name: SINGLE_NAME for info in read_header(single)}
    pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
    todo = (
        "convert it to safetensors first: pickle runs code on loading, so it is refused"
        if pickles
        else (f"expected {SINGLE_NAME}, {INDEX_NAME} or one .gguf file")
    )
    raise SourceError("no safetensors weights here", where=str(folder), todo=todo)


def read_checkpoint(folder: Path) -> list[TensorInfo]:
    """Every tensor of a checkpoint folder, shard by shard in data order, index and headers held against each other."""
    weight_map = read_index(folder)
    tensors = [info for shard in sorted(set(weight_map.values())) for info in read_header(folder / shard)]
    where = str(folder / INDEX_NAME)
    found: dict[str, str] = {}
    for info in tensors:
        if info.name in found:
            raise HeaderError(
                f"{info.name} is in {found[info.name]} and in {info.file}", where=where, todo="download it again"
            )
        found[info.name] = info.file
    if found != weight_map:
        wrong = sorted(name for name in found.keys() | weight_map.keys() if found.get(name) != weight_map.get(name))
        name = wrong[0]
        raise HeaderError(
            f"index and shards disagree on {len(wrong)} tensors, first {name}: index says {weight_map.get(name)}, "
            f"shards say {found.get(name)}",
            where=where,
            todo="download the checkpoint again",
        )
    return tensors
