"""safetensors headers as an attacker writes them; every refusal names the file and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from halfbyte.errors import HalfbyteError, HeaderError, SourceError, UnsafeName
from halfbyte.format.headers import read_checkpoint, read_header, read_index


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_file_of_the_reference_writer_is_read_as_it_reads_itself(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7), "c": torch.tensor(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    infos = {info.name: info for info in read_header(tmp_path / "model.safetensors")}
    assert {name: (info.dtype, info.shape) for name, info in infos.items()} == {
        "a.weight": ("BF16", (3, 5)), "b": ("F32", (7,)), "c": ("I64", ()),
    }  # fmt: skip
    raw = (tmp_path / "model.safetensors").read_bytes()
    start = infos["a.weight"].start
    assert raw[start : start + 30] == tensors["a.weight"].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "length", "says"),
    [
        ({"a": entry(0, 4)}, b"1234", 10**9, "claims 1000000000 bytes"),
        ({"a": entry(0, 4)}, b"1234", 2**63, "claims"),
        ({"a": entry(0, 4)}, b"123", None, "cut short"),
        ({"a": entry(0, 4)}, b"12345", None, "longer"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", None, "overlap"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", None, "overlap"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, b"12345678", None, "hole"),
        ({"a": entry(4, 0, [0])}, b"", None, "span -4 bytes"),
        ({"a": entry(0, 4, [2])}, b"1234", None, "span 4 bytes, dtype and shape need 2"),
        ({"a": entry(0, 4, [-4])}, b"1234", None, "non-negative"),
        ({"a": entry(0, 4, [True, 4])}, b"1234", None, "non-negative"),
        ({"a": entry(0, 4, [2**64])}, b"1234", None, "non-negative"),
        ({"a": entry(0, 4, dtype="F4")}, b"1234", None, "unknown dtype"),
        ({"a": {"dtype": "U8", "shape": [4]}}, b"1234", None, "must hold"),
        ({"a": "x"}, b"", None, "must hold"),
        (b'{"a": 1, "a": 2}', b"", None, "appears twice"),
        (b"[]", b"", None, "not an object"),
        (b'{"a":', b"", None, "not the JSON"),
        (b"\xff\xfe{}", b"", None, "not the JSON"),
        (b"[" * 100_000, b"", None, "not the JSON"),
    ],
)  # fmt: skip
def test_a_lying_header_is_refused(tmp_path: Path, header: object, data: bytes, length: int | None, says: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(HeaderError, match=says) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "next:" in str(caught.value)


@pytest.mark.parametrize("name", ["", "../../x", "a/b", "a\\b", "a\x00b", "a\nb", ".hidden", "a..b", "x" * 2000])
def test_a_tensor_name_like_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeName):
        read_header(write_raw(tmp_path / "model.safetensors", {name: entry(0, 1)}, b"1"))


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "x.bin",
        "",
        7,
        ".h.safetensors",
        "a\n.safetensors",
    ],
)
def test_a_shard_name_that_climbs_out_is_refused(tmp_path: Path, shard: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UnsafeName, match="plain file name"):
        read_index(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(HeaderError, match=r"one\.safetensors and in two\.safetensors"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}}))
    with pytest.raises(HeaderError, match="disagree on 1"):
        read_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(SourceError, match=r"gone\.safetensors"):
        read_checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SourceError, match="pickle runs code"):
        read_index(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_escape_as_another_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except HalfbyteError:
        return
    assert data[:8] == (len(data) - 8).to_bytes(8, "little")
