"""docs/format.md is held to its own word: every numbered MUST has a test and a check."""

from __future__ import annotations

import re
from pathlib import Path

from halfbyte.verifier.checks import TITLES

HERE = Path(__file__).parent
DOCUMENT = (HERE.parents[1] / "docs" / "format.md").read_text()
NUMBERS = {int(n) for n in re.findall(r"^- \*\*F(\d+)\*\*", DOCUMENT, re.MULTILINE)}


def test_every_must_has_a_test_with_its_number() -> None:
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    tested = {int(n) for n in re.findall(r"^def test_F(\d+)_", tests, re.MULTILINE)}
    assert tested == NUMBERS


def test_every_must_has_a_check_with_its_number() -> None:
    checked: set[int] = set()
    for title in TITLES:
        numbers = [int(n) for n in re.findall(r"F(\d+)", title)]
        checked |= set(range(numbers[0], numbers[-1] + 1)) if "-" in title else set(numbers)
    assert checked == NUMBERS


def test_numbers_have_no_gap_and_every_one_says_must() -> None:
    assert set(range(1, len(NUMBERS) + 1)) == NUMBERS
    rules = re.findall(r"^- \*\*F\d+\*\*(.*?)(?=^- |^\n|^```|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert len(rules) == len(NUMBERS)
    assert all("MUST" in rule for rule in rules)
