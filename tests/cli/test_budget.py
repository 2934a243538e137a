"""Block sizes, sensitivity and budgets as a person asks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.conftest import Refused, Run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_plan_prints_both_block_sizes_and_what_the_finer_one_needs(run: Run, tiny_gemma4: Path) -> None:
    coarse, fine = run("plan", tiny_gemma4), run("plan", tiny_gemma4, "--blocksize", "32")
    for outcome in (coarse, fine):
        assert outcome.code == 0
        assert "block size  64: " in outcome.out
        assert "; 32: " in outcome.out
    needed = "needs       bitsandbytes 0.49.2 or newer"
    assert needed in fine.out
    assert needed not in coarse.out
    assert "(blocks of 32)" in fine.out


def test_measure_then_plan_by_a_budget(run: Run, tiny_gemma4: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "Name a colour.", "response": "Red is one."}))
    how = ("--device", "cpu", "--protocol", "kld[assistant,given]")
    measured = run("sensitivity", tiny_gemma4, tmp_path / "costs", "--data", chats, *how)
    assert measured.code == 0
    assert "24 groups by rtn, " in measured.out
    assert "all at once" in measured.out
    assert f"--sensitivity {tmp_path / 'costs'}" in measured.out
    options = ("--budget", "9.4bpw", "--sensitivity", tmp_path / "costs")
    text, record = run("plan", tiny_gemma4, *options), json.loads(run("plan", tiny_gemma4, *options, "--json").out)
    assert "budget      9.4bpw: at most " in text.out
    assert f"chosen      {record['budget']['tally']['NF4-64']} NF4-64" in text.out
    assert "saves" in text.out
    assert "every loader agrees" in text.out
    assert record["budget"]["at_most"] <= record["budget"]["bytes"]


def test_quantize_says_what_blocks_of_32_need(run: Run, tiny_gemma4: Path, tmp_path: Path) -> None:
    written = run("quantize", tiny_gemma4, tmp_path / "out", "--blocksize", "32")
    assert written.code == 0
    assert "needs bitsandbytes 0.49.2 or newer" in written.out


def test_what_cannot_be_asked_is_refused_in_three_parts(refused: Refused, tiny_gemma4: Path, tmp_path: Path) -> None:
    assert "run halfbyte sensitivity" in refused("plan", tiny_gemma4, "--budget", "20GiB")
    assert "run halfbyte sensitivity" in refused("quantize", tiny_gemma4, tmp_path / "out", "--budget", "20GiB")
    assert "no sensitivity record" in refused("plan", tiny_gemma4, "--budget", "20GiB", "--sensitivity", tmp_path)
    assert "blocksize 48" in refused("quantize", tiny_gemma4, tmp_path / "out", "--blocksize", "48")
    assert "no text to measure on" in refused("sensitivity", tiny_gemma4, tmp_path / "costs")
    assert not (tmp_path / "out").exists()
