"""Planned shards are real safetensors files: the reference reader agrees, aligned, padded, whatever the JSON's length."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from halfbyte.format.headers import read_header
from halfbyte.format.shards import ShardFile, outputs_of, plan_shards

NAMES = ["m.a.weight", "m.b.weight", "m.scalar", "m.norm.weight"]


def groups(shapes: list[tuple[int, ...]], actions: list[str]) -> list:
    return [outputs_of(n, "BF16", s, a, 64) for n, s, a in zip(NAMES, shapes, actions, strict=False)]


def write_all(shards: list, folder: Path, json_length: int) -> dict[str, bytes]:
    written = {}
    (folder / "work").mkdir(exist_ok=True)
    for shard in shards:
        file = ShardFile(shard, folder / "work", folder)
        for tensor in reversed(shard.tensors):
            written[tensor.name] = hashlib.shake_128(tensor.name.encode()).digest(tensor.nbytes)
            file.write(tensor.name, 0, memoryview(written[tensor.name]))
        states = {t.name: b"x" * json_length for t in shard.quant_states}
        written |= states
        assert file.finish(states) == hashlib.sha256((folder / shard.file).read_bytes()).hexdigest()
    return written


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 70), json_length=st.integers(1, 140), limit=st.integers(1, 9000),
    actions=st.lists(st.sampled_from(["nf4", "keep"]), min_size=4, max_size=4),
)  # fmt: skip
def test_the_reference_reader_finds_every_byte(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, json_length: int, limit: int, actions: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards = plan_shards(groups([(rows, columns), (3, 5), (1,), (7,)], actions), limit)
    written = write_all(shards, folder, json_length)
    found = {}
    for shard in shards:
        with safe_open(folder / shard.file, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
        assert {info.name for info in read_header(folder / shard.file)} >= {t.name for t in shard.tensors}
    assert found == written


def test_a_weight_and_its_components_share_a_shard() -> None:
    shards = plan_shards(groups([(64, 64)] * 4, ["nf4"] * 4), 3000)
    assert len(shards) == 4
    for shard in shards:
        assert len(shard.owners) == 1
        assert len(shard.tensors) + len(shard.quant_states) == 6


def test_a_single_shard_has_the_name_without_numbers() -> None:
    assert [s.file for s in plan_shards(groups([(4, 4)], ["keep"]), 10**9)] == ["model.safetensors"]


def test_nothing_stands_under_the_final_name_before_finish(tmp_path: Path) -> None:
    (shard,) = plan_shards(groups([(4, 4)], ["keep"]), 10**9)
    (tmp_path / "work").mkdir()
    file = ShardFile(shard, tmp_path / "work", tmp_path)
    file.write("m.a.weight", 0, memoryview(bytes(32)))
    assert not (tmp_path / "model.safetensors").exists()
    file.finish({})
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    from halfbyte.records import current_umask

    return current_umask()


def test_the_digest_of_a_tensor_sees_one_flipped_bit(tmp_path: Path) -> None:
    (shard,) = plan_shards(groups([(4, 4)], ["keep"]), 10**9)
    file = ShardFile(shard, tmp_path, tmp_path)
    file.write("m.a.weight", 0, memoryview(bytes(32)))
    before = file.digest_of(["m.a.weight"])
    file.write("m.a.weight", 17, memoryview(b"\x01"))
    assert before == hashlib.sha256(bytes(32)).hexdigest() != file.digest_of(["m.a.weight"])
    file.close()
