"""What benchmarks stand on: a checkpoint of random bytes that loaders take, random models that the loop takes, results that go on after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import one another by their names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "runtime"))


def test_a_checkpoint_of_random_bytes_is_what_verify_transformers_and_halfbyte_load_take(tmp_path):
    import load
    from nf4_checkpoint import config_of, planned_bytes, write_checkpoint

    import halfbyte

    config, folder = config_of("tiny"), tmp_path / "nf4"
    total = write_checkpoint(folder, config, shard_bytes=400_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert total == planned_bytes(config)
    assert 0 < sum(shard.stat().st_size for shard in shards) - total < 0.1 * total
    written = [shard.stat().st_mtime_ns for shard in shards]
    write_checkpoint(folder, config, shard_bytes=400_000)
    assert [shard.stat().st_mtime_ns for shard in shards] == written
    record = halfbyte.verify(folder, generate=False)
    assert record["passed"], [check for check in record["checks"] if check["status"] == "failed"]
    assert load.by_stock(folder, "cpu")["seconds"] > 0
    found = load.by_ours(folder, "cpu", True)
    assert "41 by halfbyte" in found["linears"]
    assert found["read_s"] + found["relayout_s"] + found["choice_s"] == pytest.approx(found["seconds"])


def test_a_file_is_read_by_pieces_each_once_and_no_buffer_is_used_twice_at_a_time(tmp_path, monkeypatch):
    import load

    monkeypatch.setattr(load, "CHUNK", 1000)
    file, found, busy = tmp_path / "shard", bytearray(25_300), [0, 0, 0]
    file.write_bytes(bytes(range(256)) * 98 + b"x" * 212)
    buffers = [bytearray(1000) for _ in busy]

    def work(number: int, begin: int, size: int) -> None:
        busy[number] += 1
        assert busy[number] == 1
        found[begin : begin + size] = buffers[number][:size]
        busy[number] -= 1

    load.read_shard_bytes(file, work, buffers, len(busy))
    assert found == file.read_bytes()


def test_the_whole_31b_would_be_19_gigabytes():
    from nf4_checkpoint import config_of, planned_bytes

    assert planned_bytes(config_of("31b")) == pytest.approx(19.081e9, rel=1e-3)


@pytest.mark.parametrize("shape", ["31b", "12b", "e4b"])
def test_a_random_model_of_each_shape_is_taken_by_the_decode_loop(shape):
    from gemma4_shapes import build, text_config

    from halfbyte.runtime.decode.loop import Decoder

    model = build(text_config(shape, tiny=True), "cpu")
    decoder = Decoder(model, 1, 16)
    rows = list(decoder.tokens({"input_ids": torch.tensor([[5, 6, 7]])}, 3, stops=()))
    assert sum(len(new[0]) for new in rows) == 3
    layers = decoder.description.layers
    assert [layer.source != layer.index for layer in layers].count(True) == (6 if shape == "e4b" else 0)
    assert all((layer.per_layer is not None) == (shape == "e4b") for layer in layers)


def test_stock_is_stopped_at_the_first_token_that_is_not_ours(tiny_nf4):
    from greedy import by_stock

    from halfbyte.runtime.generate import Chat

    chat = Chat(tiny_nf4, "cpu", fast=False)
    inputs = chat.inputs("Hello", ())
    eight = chat.model.generate(**inputs, max_new_tokens=8, do_sample=False, top_p=None, top_k=None, temperature=None)
    eight = eight[0, inputs["input_ids"].shape[1] :].tolist()
    assert by_stock(chat, inputs, 8, eight) == eight
    assert by_stock(chat, inputs, 8, eight[:3] + [-1] * 5) == eight[:4]


def test_results_go_on_behind_a_line_that_was_cut_off(tmp_path):
    from greedy import keep, kept_rows

    file = tmp_path / "results.jsonl"
    mine: dict[str, Any] = {"checkpoint": "a", "max_new_tokens": 8}
    assert kept_rows(file, mine) == []
    keep(file, {"prompt": 0} | mine)
    file.write_bytes(file.read_bytes() + b'{"prompt": 1, "che')
    keep(file, {"prompt": 2} | mine)
    keep(file, {"prompt": 3} | mine | {"max_new_tokens": 9})
    assert [row["prompt"] for row in kept_rows(file, mine)] == [0, 2]
    assert json.loads(file.read_text().splitlines()[-1])["prompt"] == 3
