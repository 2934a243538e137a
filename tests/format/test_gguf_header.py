"""A GGUF header is hostile input: every lie is refused with its place and a next step, before memory is spent on it."""

from __future__ import annotations

import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from format.tiny_gguf import write_llama_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.errors import HeaderError
from halfbyte.format.gguf_header import MAX_ITEMS, read_gguf_header

U8, U32, STRING, ARRAY = 0, 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, body: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + body


def tensor(name: str = "a", dims: tuple[int, ...] = (64,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def write(
    path: Path,
    *tensors: bytes,
    keys: tuple[bytes, ...] = (ARCHITECTURE,),
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
    data: int = 4096,
) -> Path:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(data))
    return path


HUGE = 1 << 62
LIES: dict[str, tuple[dict[str, object], tuple[bytes, ...], str]] = {
    "wrong magic": ({"magic": b"GGML"}, (), "not a GGUF file"),
    "version 1": ({"version": 1}, (), "version 1"),
    "big endian": ({"version": 3 << 24}, (), "big-endian"),
    "tensor count": ({"counts": (HUGE, 1)}, (), "tensors need"),
    "key count": ({"counts": (0, HUGE)}, (), "metadata keys need"),
    "key length": ({"keys": (struct.pack("<Q", HUGE),)}, (), "metadata key of"),
    "string length": ({"keys": (key("a", STRING, struct.pack("<Q", HUGE)),)}, (), "value of 'a'"),
    "array length": ({"keys": (key("a", ARRAY, struct.pack("<IQ", U8, HUGE)),)}, (), "items in 'a'"),
    "array of arrays": ({"keys": (key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)}, (), "items of type 9"),
    "unknown value type": ({"keys": (key("a", 77, b""),)}, (), "unknown type 77"),
    "not utf-8": ({"keys": (key("a", STRING, text(b"\xff")),)}, (), "not UTF-8"),
    "same key twice": ({"keys": (ARCHITECTURE, ARCHITECTURE)}, (), "appears twice"),
    "no architecture": ({"keys": ()}, (), "general.architecture is None"),
    "architecture a number": (
        {"keys": (key("general.architecture", U32, struct.pack("<I", 1)),)},
        (),
        "general.architecture is 1",
    ),
    "alignment 0": (
        {"keys": (ARCHITECTURE, key("general.alignment", U32, struct.pack("<I", 0)))},
        (),
        "general.alignment is 0",
    ),
    "part of a split": ({"keys": (ARCHITECTURE, key("split.count", U32, struct.pack("<I", 3)))}, (), "3 parts"),
    "zero dimensions": ({}, (tensor(dims=()),), "0 dimensions"),
    "five dimensions": ({}, (tensor(dims=(1, 1, 1, 1, 1)),), "5 dimensions"),
    "a zero in the shape": ({}, (tensor(dims=(64, 0)),), "has a zero"),
    "a negative dimension": ({}, (tensor(dims=((1 << 64) - 1,)),), "data end at byte"),
    "shape beyond the file": ({}, (tensor(dims=(1 << 40, 1 << 20)),), "data end at byte"),
    "offset beyond the file": ({}, (tensor(offset=1 << 20),), "data end at byte"),
    "offset not aligned": ({}, (tensor(offset=8),), "not a multiple of the alignment 32"),
    "overlapping": ({}, (tensor("a"), tensor("b", offset=128)), "inside 'a'"),
    "same tensor twice": ({}, (tensor("a"), tensor("a", offset=256)), "two tensors of this name"),
    "unsupported type": ({}, (tensor(kind=10, dims=(256,)),), "type Q2_K; supported: F32, F16, Q4_0"),
    "type that is none": ({}, (tensor(kind=999),), "type number 999"),
    "half a block": ({}, (tensor(kind=2, dims=(48, 2)),), "not whole Q4_0 blocks of 32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused_with_what_where_todo(lie: str, tmp_path: Path) -> None:
    options, tensors, message = LIES[lie]
    path = write(tmp_path / "lie.gguf", *tensors, **options)  # type: ignore[arg-type]

    with pytest.raises(HeaderError, match=re.escape(message)) as caught:
        read_gguf_header(path)

    assert str(path) in (caught.value.where or "")
    assert caught.value.todo


@pytest.mark.parametrize("lie", ["tensor count", "key count", "string length", "array length", "shape beyond the file"])
def test_lying_count_costs_no_memory(lie: str, tmp_path: Path) -> None:
    options, tensors, _ = LIES[lie]
    path = write(tmp_path / "lie.gguf", *tensors, **options)  # type: ignore[arg-type]

    tracemalloc.start()
    with pytest.raises(HeaderError):
        read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1 << 20


def test_true_but_absurd_array_is_refused_before_other_readers_choke_on_it(tmp_path: Path) -> None:
    array = key("a", ARRAY, struct.pack("<IQ", U8, MAX_ITEMS + 1) + bytes(MAX_ITEMS + 1))
    path = write(tmp_path / "array.gguf", keys=(ARCHITECTURE, array))

    with pytest.raises(HeaderError, match="more than the 4,000,000"):
        read_gguf_header(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x00" * 23])
def test_file_shorter_than_a_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(content)

    with pytest.raises(HeaderError, match="too few for a GGUF header"):
        read_gguf_header(tmp_path / "short.gguf")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(HeaderError, match="no such GGUF file"):
            read_gguf_header(path)


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()

    for length in [*range(0, 600, 7), *range(600, len(whole), 997), len(whole) - 33]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(HeaderError):
            read_gguf_header(tmp_path / "cut.gguf")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_corrupted_header_never_ends_in_anything_but_header_error(data: st.DataObject, tmp_path: Path) -> None:
    path = write(tmp_path / "f.gguf", tensor("a"), tensor("b", offset=256), keys=(ARCHITECTURE, key("b", 8, text("x"))))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 180))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)

    try:
        header = read_gguf_header(path)
    except HeaderError:
        return

    assert all(t.start + t.nbytes <= header.file_size for t in header.tensors)


def test_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    import gguf

    write_llama_gguf(tmp_path / "a.gguf", tensor_type="Q5_0")
    header, reader = read_gguf_header(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")

    ours = {t.name: (t.kind, t.shape, t.start, t.nbytes) for t in header.tensors}
    theirs = {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist()[::-1]), t.data_offset, t.n_bytes) for t in reader.tensors
    }
    assert ours == theirs
    assert [t.start for t in header.tensors] == sorted(t.start for t in header.tensors)
    assert header.metadata["llama.block_count"] == 2
    assert header.items == 268 + 268 + 10
