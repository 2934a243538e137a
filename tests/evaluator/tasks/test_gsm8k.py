"""The rule of GSM8K is what it says: the last number, with commas and trailing zeros forgiven."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from halfbyte.errors import SourceError
from halfbyte.evaluator.tasks.gsm8k import last_number, read_gsm8k


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,200.00", "1200"), ("**1,234,567**.", "1234567"), ("so 5 - 3 = 2", "2"), ("10-5", "5"), ("it is -5", "-5"),
        ("-$3", "-3"), ("$-3", "-3"), ("−4", "-4"), ("3.", "3"), ("0.50", "0.5"), (".5", "0.5"), ("18%", "18"), ("1,2,3", "3"),
        ("x=18 (eighteen)", "18"), ("no number", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_the_file_s_own_solutions_are_all_right_and_one_more_is_wrong(shared_data: Path) -> None:
    path = shared_data / "gsm8k" / "test.jsonl"
    task = read_gsm8k(path)
    solutions = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(task.items) == 1319
    assert all(task.grade(item, solution) for item, solution in zip(task.items, solutions, strict=True))
    assert not any(task.grade(item, f"{item.key + 1}") for item in task.items)
    assert task.items[0].prompt.startswith("Janet")
    assert "####" not in "".join(item.prompt for item in task.items), "the answer is not shown"
    assert len(task.first(7).items) == 7
    assert task.first(7).digest != task.digest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"), ("[]", "not a JSON object"), ('{"question": "a", "answer": 3}', "answer is 3"),
        ('{"answer": "#### 3"}', "question is missing"), ('{"question": "a", "answer": "3"}', "no number behind"),
        ('{"question": "a", "answer": "#### three"}', "no number behind"), ('{"question": NaN, "answer": ""}', "NaN is no JSON"),
        ("[" * 100_000, "not JSON"), ('{"question": "' + "x" * (1 << 20) + '"}', "a line of"),
    ],
)  # fmt: skip
def test_damaged_lines_are_refused_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "a", "answer": "#### 3"}\n\n' + line + "\n")
    with pytest.raises(SourceError, match=message) as caught:
        read_gsm8k(path)
    assert "line 3" in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "giant").open("wb") as file:
        file.truncate((64 << 20) + 1)
    for name, message in (
        ("empty", "nothing in it"),
        ("bytes", "UTF-8"),
        ("absent", "no such file"),
        ("giant", "too large"),
    ):
        with pytest.raises(SourceError, match=message):
            read_gsm8k(tmp_path / name)
