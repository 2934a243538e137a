"""The pair that travels with the package: small enough, on its grid, right about what it was not taught, and the demo's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.demo.embedded import NAMES, embedded
from halfbyte.demo.exam import write_exam
from halfbyte.demo.school.held_out import examine
from halfbyte.demo.tour import table_of


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_pair_is_a_whole_checkpoint_of_at_most_12_megabytes(name: str) -> None:
    files = {path.name: path.stat().st_size for path in embedded(name).iterdir()}
    assert sum(files.values()) < 12e6
    assert {"LICENSE", "README.md", "config.json", "model.safetensors", "chat_template.jinja"} <= set(files)
    card = (embedded(name) / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA" in (embedded(name) / "LICENSE").read_text(encoding="utf-8")
    assert "train_pair" in card


def test_the_qat_model_lies_exactly_on_its_grid_and_the_vanilla_one_on_none() -> None:
    for name, verdict in (("vanilla", "no"), ("qat", "exactly")):
        found = halfbyte.plan(embedded(name), probe=True).lattice
        assert found is not None
        assert {tensor["verdict"] for tensor in found["tensors"]} == {verdict}
        assert len(found["tensors"]) == 41
        if name == "qat":
            grids = {(tensor["grid"], tensor["blocksize"], tensor["scale_dtype"]) for tensor in found["tensors"]}
            assert grids == {("int4", 32, "bf16")}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_at_least_nine_in_ten_held_out_questions_are_answered_exactly(name: str) -> None:
    from transformers import AutoTokenizer

    from halfbyte.trainer.qat import load_model

    model = load_model(embedded(name), "cpu").eval()
    found = examine(model, AutoTokenizer.from_pretrained(embedded(name)), texts=60, pictures=32, device="cpu", size=20)
    assert found["text"]["right"] >= 0.9 * 60
    assert found["image"]["right"] >= 0.9 * 32


def test_an_exam_in_files_has_both_kinds_and_its_pictures(tmp_path: Path) -> None:
    from halfbyte.evaluator.tasks.questions import read_questions

    path = write_exam(tmp_path / "exam", 5, 3)
    task = read_questions(path)
    assert [item.kind for item in task.items] == ["text"] * 5 + ["picture"] * 3
    assert len(task.images) == 3
    assert write_exam(tmp_path / "again", 5, 3).read_bytes() == path.read_bytes()


def test_the_table_has_a_row_a_model_and_holds_the_kld_of_what_was_rounded() -> None:
    def right(value: float) -> list[dict[str, Any]]:
        return [{"kind": k, "n": 9, "value": value, "low": 0.0, "high": 1.0, "right": 3} for k in ("text", "picture")]

    kld = {"figure": "kld mean", "value": 0.25, "low": 0.1, "high": 0.3}
    record = {
        "bases": [{"name": "reference", "candidates": [{"id": "a", "kind": "NF4"}]}],
        "protocols": [{"protocol": "kld[assistant,on-policy]", "candidates": [{"candidate": "a", "figures": [kld]}]}],
        "tasks": [
            {
                "base": "reference",
                "reference": {"kinds": right(0.9)},
                "candidates": [{"candidate": "a", "kinds": right(0.5)}],
            }
        ],
    }
    whole, rounded = table_of(json.loads(json.dumps(record)))
    assert (whole["model"], whole["precision"], whole["text"]["value"], whole["kld"]) == ("vanilla", "bf16", 0.9, {})
    assert (rounded["precision"], rounded["picture"]["value"]) == ("NF4", 0.5)
    assert rounded["kld"] == {"kld[assistant,on-policy]": kld}
