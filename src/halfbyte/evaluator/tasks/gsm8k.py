"""GSM8K: word problems of grade school whose answer is one number (Cobbe et al. 2021, openai/grade-school-math, `test.jsonl`).

The rule, the whole of it: the last number in the answer, compared with the number behind `####` in the file. Commas between
thousands, a dollar sign, and zeros behind the decimal point are forgiven: "$1,200.00" is 1200. Numbers are compared as decimals,
never as floats. An answer without a number is wrong.

Zero-shot and through the chat template, so figures are not those of the 8-shot tables: here they only have to be the same for
both models. The catch: a model that goes on talking after its answer ("that leaves 3 of 12") is graded by what it said last; and an
answer cut off by `max_new_tokens` is graded by the last number before the cut, which is nearly always wrong.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

from halfbyte.evaluator.tasks.lines import Entry, about, read_lines
from halfbyte.evaluator.tasks.task import Item, Task

VERSION, MAX_NEW_TOKENS = 1, 512
RULE = (
    "the last number in the answer equals the file's; commas between thousands and zeros behind the point are forgiven"
)
ASKED = "\n\nThink step by step. End with the number that is the answer."
#: a sign counts only where it is no minus between two numbers; groups of three digits may have commas; "18." ends a sentence
NUMBER = re.compile(
    r"(?<![\d.,])(?:(?<![\w)])[-−])?\$?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|(?:(?<![\w)\d.])[-−])?\$?\d+(?:\.\d+)?|\.\d+"
)


def read_gsm8k(path: Path) -> Task:
    """The task of a `test.jsonl`: lines of {"question", "answer": "... #### NUMBER"}; raises SourceError, naming the line."""
    items = [_item(number, entry) for number, entry in enumerate(read_lines(path), start=1)]
    return Task("gsm8k", VERSION, items, MAX_NEW_TOKENS, RULE, [about(path)], grade)


def grade(item: Item, answer: str) -> bool:
    """Whether the last number of the answer is the item's."""
    return bool(last_number(answer) == item.key)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, None without one. "1,200.50" is 1200.5, "$-3" and "-$3" are -3."""
    found = NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def _decimal(word: str) -> Decimal:
    return Decimal(word.replace(",", "").replace("$", "").replace("−", "-")).normalize()


def _item(number: int, entry: Entry) -> Item:
    question, answer = entry.text("question"), entry.text("answer")
    _, mark, right = answer.rpartition("####")
    key = last_number(right) if mark else None
    if key is None or len(right) > 100:
        raise entry.wrong("its answer has no number behind ####")
    return Item(str(number), "word problem", question + ASKED, key=key)
