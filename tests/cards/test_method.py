"""How codes were chosen, in words: a card and a terminal say the same, and round to nearest is called by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cards.paper_checkpoint import write_checkpoint

import halfbyte
from halfbyte.cards.method import method_lines, method_words
from halfbyte.cards.report.words import methods

METHOD: dict[str, Any] = {
    "name": "gptq", "fit": {"damping": 0.01, "signed": True}, "sequential": False, "dtype": "float32", "device": "cpu",
    "calibration_tokens": 4096, "max_new_tokens": 256, "batch": 8, "seed": 3,
    "calibration": {"name": "own.jsonl", "sha256": "ab" * 32, "tokens": 4000, "rows": 31, "answers": "given"},
    "gain": {"tensors": 210, "worse": 2, "error_ratio": 0.412},
}  # fmt: skip


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "tiny-nf4")
    path = folder / "halfbyte" / "quantize.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": METHOD}))
    return folder


def test_a_card_names_method_data_and_gain(fitted: Path) -> None:
    text = halfbyte.card(fitted).read_text()
    assert "Codes: method `gptq`" in text
    assert f"calibrated on `own.jsonl` (sha256 `{'ab' * 8}`, 4,000 tokens in 31 rows" in text
    assert "-58.8 % against round to nearest" in text
    assert "larger in 2" in text
    assert "fitted, of either sign, one per 64 weights" in text


def test_its_command_asks_for_the_same_again(fitted: Path) -> None:
    text = halfbyte.card(fitted).read_text()
    asked = "--method gptq --calibration own.jsonl --calibration-tokens 4096 --max-new-tokens 256 --dtype float32"
    assert f"{asked} --batch 8 --seed 3 --no-sequential --fit damping=0.01 --fit signed=true" in text


def test_round_to_nearest_is_called_so(tmp_path: Path) -> None:
    text = halfbyte.card(write_checkpoint(tmp_path / "tiny-nf4")).read_text()
    assert "Codes: round to nearest" in text
    assert "--method" not in text
    assert "largest magnitude in 64 weights" in text


def test_without_data_the_words_say_so_and_no_weighting_is_claimed() -> None:
    lines = method_lines({**METHOD, "name": "scale", "calibration": None})
    assert lines[0] == "method scale: searched scales, without data"
    assert "weighted" not in lines[1]
    assert "without data" in method_words({"method": {**METHOD, "calibration": None}})
    assert method_lines(None) == []


def test_a_gain_that_was_not_measured_is_not_claimed() -> None:
    assert len(method_lines({**METHOD, "gain": {"tensors": 0, "worse": 0, "error_ratio": None}})) == 1


def test_a_report_lists_fitted_candidates_and_no_others() -> None:
    record = {"bases": [{"candidates": [{"id": "a/gptq", "method": METHOD}, {"id": "b", "method": None}, {"id": "c"}]}]}
    (line,) = methods(record)
    assert line.startswith("gptq: method gptq") or "method gptq" in line
    assert "own.jsonl" in line
