"""Operations on a checkpoint folder, for tests that break one on purpose. Headers are handled as raw JSON, so that they can lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def read_shard(path: Path) -> tuple[dict[str, Entry], bytes]:
    """Header (without __metadata__) and data of one file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return header, raw[8 + size :]


def write_shard(path: Path, header: dict[str, Entry], data: bytes, *, pad: int = 8) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % pad)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    path.chmod(0o644)


def pack(parts: dict[str, tuple[str, list[int], bytes]]) -> tuple[dict[str, Entry], bytes]:
    """Header and data of {name: (dtype, shape, bytes)}, widest elements first so that all are aligned."""
    width = {"U8": 1, "BF16": 2, "F32": 4}
    header, data = {}, b""
    for name, (dtype, shape, raw) in sorted(parts.items(), key=lambda item: -width[item[1][0]]):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def unpack(header: dict[str, Entry], data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}


def write_checkpoint(folder: Path, shards: list[dict[str, tuple[str, list[int], bytes]]]) -> None:
    """One file, or numbered shards with their index."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if len(shards) == 1:
        write_shard(folder / "model.safetensors", *pack(shards[0]))
        return
    weight_map, total = {}, 0
    for k, parts in enumerate(shards, start=1):
        name = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        header, data = pack(parts)
        write_shard(folder / name, header, data)
        weight_map |= dict.fromkeys(header, name)
        total += len(data)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def all_parts(folder: Path) -> list[dict[str, tuple[str, list[int], bytes]]]:
    return [unpack(*read_shard(path)) for path in sorted(folder.glob("*.safetensors"))]


def rewrite(folder: Path, change: Callable[[dict[str, tuple[str, list[int], bytes]]], None]) -> None:
    """Apply `change` to the tensors of every shard and write a structurally sound checkpoint again."""
    shards = all_parts(folder)
    for parts in shards:
        change(parts)
    write_checkpoint(folder, shards)


def replace(
    folder: Path, name: str, edit: Callable[[tuple[str, list[int], bytes]], tuple[str, list[int], bytes]]
) -> None:
    """Replace one tensor, which must exist."""
    hit = []

    def change(parts: dict[str, tuple[str, list[int], bytes]]) -> None:
        if name in parts:
            parts[name] = edit(parts[name])
            hit.append(name)

    rewrite(folder, change)
    assert hit == [name]


def flip(folder: Path, name: str, *, at: int = 0, mask: int = 0x10) -> None:
    """Flip bits of one byte of one tensor."""
    replace(folder, name, lambda t: (t[0], t[1], t[2][:at] + bytes([t[2][at] ^ mask]) + t[2][at + 1 :]))


def drop(folder: Path, *names: str) -> None:
    """Remove tensors, index included."""
    before = {name for parts in all_parts(folder) for name in parts}
    assert set(names) <= before
    rewrite(folder, lambda parts: [parts.pop(name, None) for name in names] and None)


def edit_header(path: Path, change: Callable[[dict[str, Entry]], None]) -> None:
    """Change a header and leave the data alone: the way to make it lie."""
    header, data = read_shard(path)
    change(header)
    write_shard(path, header, data)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body, indent=2))


def edit_state(folder: Path, weight: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the quant state of `weight`, spelled as json.dumps spells it."""

    def edit(tensor: tuple[str, list[int], bytes]) -> tuple[str, list[int], bytes]:
        state = json.loads(tensor[2])
        change(state)
        raw = json.dumps(state).encode()
        return tensor[0], [len(raw)], raw

    replace(folder, f"{weight}.quant_state.bitsandbytes__nf4", edit)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
