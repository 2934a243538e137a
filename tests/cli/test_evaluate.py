"""`halfbyte evaluate` on the tiny Gemma 4: the table, the JSON, the exit codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli.conftest import Refused, Run

from halfbyte.evaluator.job import scoring

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ("--limit", 5, "--max-new-tokens", 4, "--resamples", 200, "--device", "cpu", "--no-layers")


def test_table_and_json_have_the_same_figures(run: Run, tiny_gemma4: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", tiny_gemma4, tiny_gemma4, "uniform", "--out", tmp_path, *FAST)
    words, body = run(*arguments), run(*arguments, "--json")
    assert (words.code, body.code) == (0, 0), words
    record = json.loads(body.out)
    same, nothing = record["protocols"][0]["candidates"]
    assert record == json.loads((tmp_path / "halfbyte" / "evaluate.json").read_text())
    assert "tie (kld mean)" in words.out
    assert "loss (kld mean)" in words.out
    assert "self-KLD exactly 0 in 1 of 1; margin 0.01 nats" in words.out
    assert same["kld_max"] == 0.0
    assert f"{nothing['figures'][0]['value']:.4g} [{nothing['figures'][0]['low']:.4g}, " in words.out
    assert "vectors from" in body.err, "the second run says what it did not compute"
    again = run(*record["command"][1:], "--json")
    assert again.code == 0, "the printed command makes the same record"
    repeated = json.loads(again.out)
    assert repeated["command"] == record["command"]
    assert repeated["settings"] == record["settings"]
    assert repeated["protocols"] == record["protocols"]
    assert (tmp_path / "report.html").is_file()
    assert "Traceback" not in words.err + body.err


def test_a_reference_that_differs_from_itself_is_exit_1(
    run: Run, tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady = scoring.keep_reference
    monkeypatch.setattr(scoring, "keep_reference", lambda *a, **how: replace(steady(*a, **how), self_kld=1e-9))
    outcome = run("evaluate", tiny_gemma4, "uniform", "--out", tmp_path, *FAST)
    assert outcome.code == 1
    assert "self-KLD exactly 0 in 0 of 1" in outcome.out
    assert "against itself is not 0 (reference, kld[assistant,on-policy]: 1e-09)" in outcome.err


def test_refusals_name_the_option(refused: Refused, tiny_gemma4: Path, tmp_path: Path) -> None:
    assert "kld[raw]" in refused("evaluate", tiny_gemma4, "uniform", "--protocol", "kld[raw]", "--out", tmp_path)
    assert "--margin" in refused("evaluate", tiny_gemma4, "uniform", "--margin", -1, "--out", tmp_path)
    assert "absent.jsonl" in refused("evaluate", tiny_gemma4, "uniform", "--data", tmp_path / "absent.jsonl")
    assert "absent" in refused("evaluate", tiny_gemma4, tmp_path / "absent", "--out", tmp_path / "out")
    assert "another base" not in refused("evaluate", tiny_gemma4, "uniform", "--base", "qat=x", "--out", tmp_path)


def test_tasks_are_asked_without_a_protocol_and_the_command_makes_the_same_record(
    run: Run, refused: Refused, tiny_gemma4: Path, tmp_path: Path
) -> None:
    asked = tmp_path / "gsm8k.jsonl"
    asked.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 4)
    only = ("--protocol", "none", "--task", f"gsm8k={asked}", "--task-limit", 3, "--task-max-new-tokens", 3)
    words = run("evaluate", tiny_gemma4, "uniform", "--out", tmp_path / "out", *only, *FAST)
    assert words.code == 0, words
    assert "gsm8k[chat,greedy] v1" in words.out
    assert "3 items from gsm8k.jsonl" in words.out
    assert "self-KLD" not in words.out
    record = json.loads((tmp_path / "out" / "halfbyte" / "evaluate.json").read_text())
    again = json.loads(run(*record["command"][1:], "--json").out)
    assert again["settings"] == record["settings"]
    assert again["tasks"][0]["candidates"][0]["flips"] == record["tasks"][0]["candidates"][0]["flips"]
    assert "--allow-code" in refused("evaluate", tiny_gemma4, "uniform", "--task", f"mbpp={asked}", *FAST)
    assert "--task" in refused("evaluate", tiny_gemma4, "uniform", "--task", "arc=x", *FAST)


def test_without_a_candidate_it_is_usage(run: Run, tiny_gemma4: Path) -> None:
    outcome = run("evaluate", tiny_gemma4)
    assert outcome.code == 2
    assert "CANDIDATES" in outcome.err.upper()


def test_a_pack_is_written_and_scored_against_with_the_same_table(run: Run, tiny_gemma4: Path, tmp_path: Path) -> None:
    file, spec = tmp_path / "reference.pack", f"{tiny_gemma4}@nf4"
    live = run("evaluate", tiny_gemma4, spec, "--out", tmp_path / "a", "--write-reference", file, *FAST)
    assert live.code == 0, live
    assert f"reference pack {file}" in live.err
    fixed = ("--resamples", 200, "--device", "cpu", "--no-layers")
    packed = run("evaluate", file, spec, "--out", tmp_path / "b", *fixed)
    assert packed.code == 0, packed
    table = live.out.partition("\n\nsizes:")[0]
    assert packed.out.partition("\n\nsizes:")[0] == table
    assert f"{tiny_gemma4}: not measured" in packed.out, "the size of a reference that is not there"


def test_a_file_that_is_no_pack_is_refused(refused: Refused, tiny_gemma4: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pack").write_bytes(b"not a pack")
    assert "bad.pack" in refused("evaluate", tmp_path / "bad.pack", f"{tiny_gemma4}@nf4", "--out", tmp_path / "out")
