"""`halfbyte qat` as a command."""

from __future__ import annotations

import json
from pathlib import Path

from cli.conftest import Refused, Run

from halfbyte.demo import write_tiny_gemma4
from halfbyte.format.checkpoint import SafetensorsSource


def test_it_trains_and_says_what_changed(tmp_path: Path, run: Run) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "Who?", "response": "Nobody."}\n', encoding="utf-8")
    source = write_tiny_gemma4(tmp_path / "source", layers=1)
    small = ("--data", chats, "--steps", 2, "--batch", 2, "--length", 32, "--device", "cpu")
    done = run("qat", source, tmp_path / "out", *small, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["grid"], record["data"]["rows"], record["training"]["steps"]) == ("q4_0", 1, 2)
    assert SafetensorsSource(tmp_path / "out").config["model_type"] == "gemma4"
    said = run("qat", source, tmp_path / "second", *small, "--grid", "nf4")
    assert "linears on nf4 in" in said.out


def test_missing_data_is_refused(tmp_path: Path, refused: Refused) -> None:
    source = write_tiny_gemma4(tmp_path / "source", layers=1)
    assert "no such data file" in refused("qat", source, tmp_path / "out", "--data", tmp_path / "absent.jsonl")
