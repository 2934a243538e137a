"""What a candidate was calibrated on is refused as evidence, before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.errors import UsageError
from halfbyte.layers import streaming
from halfbyte.texts import traces

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["What does the owl say to the fox at night?", "Count the windows of the old mill by the river."]
PARAGRAPH = "The mill by the river had eleven windows, and the owl who lived above the wheel knew every one of them."


@pytest.fixture(scope="module")
def calibrated(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("calibrated")
    lines: list[dict[str, Any]] = [{"prompt": prompt, "response": "Nothing."} for prompt in PROMPTS]
    lines.append({"id": "mill", "text": f"The mill\n\n{PARAGRAPH}"})
    (place / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    halfbyte.quantize(tiny_gemma4, place / "out", method="scale", calibration=place / "own.jsonl", fit="candidates=2")
    return place / "out"


def ask(tiny_gemma4: Path, calibrated: Path, tmp_path: Path, name: str, content: str, **options: Any) -> None:
    (tmp_path / name).write_text(content)
    halfbyte.evaluate(
        tiny_gemma4, [str(calibrated)], data=[str(tmp_path / name)], out=tmp_path / "out", floor=False, layers=False,
        max_new_tokens=4, resamples=100, **options,
    )  # fmt: skip


def test_prompts_and_paragraphs_of_the_calibration_are_refused(
    tiny_gemma4: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "WholeModel", None)
    monkeypatch.setattr(streaming, "StreamedModel", None)
    seen = json.dumps({"id": "q7", "prompt": f"  {PROMPTS[0].upper()} "})
    with pytest.raises(UsageError, match="calibrated on 1 of the documents to be measured on: q7"):
        ask(tiny_gemma4, calibrated, tmp_path, "asked.jsonl", seen + '\n{"prompt": "Another one?"}')
    with pytest.raises(UsageError, match="calibrated on 1 of the documents"):
        ask(tiny_gemma4, calibrated, tmp_path, "text.txt", f"Other words first.\n{PARAGRAPH}\nAnd more.")


def test_other_text_is_measured_and_the_record_names_the_method(
    tiny_gemma4: Path, calibrated: Path, tmp_path: Path
) -> None:
    ask(tiny_gemma4, calibrated, tmp_path, "asked.jsonl", '{"prompt": "What does the fox say?"}\n{"prompt": "And?"}')
    body = json.loads((tmp_path / "out" / "halfbyte" / "evaluate.json").read_text())
    method = body["bases"][0]["candidates"][0]["method"]
    assert (method["name"], method["calibration"]["name"]) == ("scale", "own.jsonl")
    assert "hashes" not in method["calibration"]


def test_a_last_word_is_known_by_the_paragraph_it_was_cut_from(
    tiny_gemma4: Path, calibrated: Path, tmp_path: Path
) -> None:
    line = {"id": "3.1", "text": PARAGRAPH.partition(",")[0]}

    def asked(**more: str) -> None:
        (tmp_path / "words.jsonl").write_text(json.dumps({**line, **more}))
        halfbyte.evaluate(
            tiny_gemma4, [str(calibrated)], protocol="none", task=f"lastword={tmp_path / 'words.jsonl'}",
            out=tmp_path / "out", layers=False,
        )  # fmt: skip

    with pytest.raises(UsageError, match=r"calibrated on 1 of the documents to be measured on: lastword 3\.1"):
        asked(source=PARAGRAPH)
    asked()  # the piece alone is not known: only exact text is found
