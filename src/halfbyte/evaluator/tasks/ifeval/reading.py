"""IFEval's file -> a task: {"key", "prompt", "instruction_id_list", "kwargs"}, one JSON object a line.

An item is right if every instruction of its prompt is followed (the paper's prompt-level strict accuracy); its parts are the single
instructions, so the table by kind shows which of them a candidate no longer follows. An empty answer follows nothing, though it has no
comma either.

Unknown instructions, languages that cannot be told, arguments of the wrong kind: all refused with the line, because a checker that
fails while grading would be counted as the model's fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.evaluator.tasks.ifeval.following import ARGUMENTS, CHECKERS, RELATIONS
from halfbyte.evaluator.tasks.ifeval.languages import KNOWN
from halfbyte.evaluator.tasks.lines import Entry, about, read_lines, unique
from halfbyte.evaluator.tasks.task import Item, Task

VERSION, MAX_NEW_TOKENS = 1, 1280
RULE = "all instructions of the prompt are followed (strict, prompt level); checkers, sentences and languages by rules of our own"
Instruction = tuple[str, Mapping[str, Any]]


def read_ifeval(path: Path) -> Task:
    """The task of an `input_data.jsonl`; raises SourceError, naming the line."""
    entries = read_lines(path)
    items = [_item(entry) for entry in entries]
    unique(zip((item.id for item in items), entries, strict=True))
    return Task("ifeval", VERSION, items, MAX_NEW_TOKENS, RULE, [about(path)], grade, parts)


def grade(item: Item, answer: str) -> bool:
    """Whether every instruction is followed."""
    return all(right for _, right in parts(item, answer))


def parts(item: Item, answer: str) -> list[tuple[str, bool]]:
    """(instruction id, followed), in the prompt's order."""
    there = bool(answer.strip())
    return [(name, there and CHECKERS[name](answer, arguments)) for name, arguments in item.key]


def _item(entry: Entry) -> Item:
    names, kwargs = entry.texts("instruction_id_list"), entry.body.get("kwargs")
    if not names or not isinstance(kwargs, list) or len(kwargs) != len(names):
        raise entry.wrong("instruction_id_list and kwargs are not equally long lists")
    key: Sequence[Instruction] = tuple(
        (name, _arguments(entry, name, given)) for name, given in zip(names, kwargs, strict=True)
    )
    return Item(entry.name("key"), names[0].partition(":")[0], entry.text("prompt"), key=key)


def _arguments(entry: Entry, name: str, given: Any) -> Mapping[str, Any]:
    """What the checker needs, checked; other keys are left out (one mirror of the data writes them all, as null)."""
    if name not in CHECKERS:
        raise entry.wrong(f"unknown instruction {name[:80]!r}", f"known: {', '.join(sorted(CHECKERS))}")
    if not isinstance(given, dict):
        raise entry.wrong(f"the arguments of {name} are not an object")
    found = {}
    for argument, kind in ARGUMENTS.get(name, {}).items():
        value = given.get(argument)
        if not _is(value, kind):
            raise entry.wrong(f"{argument} of {name} is {value!r:.60}, not {kind}")
        found[argument] = value
    return found


def _is(value: Any, kind: str) -> bool:
    if kind == "a whole number":
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 <= value < 10**6
            and value == int(value)
        )
    if kind == "texts":
        return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.strip() for v in value)
    if not isinstance(value, str) or not value.strip():
        return False
    if kind == "a relation":
        return value in RELATIONS
    return value in KNOWN if kind == "a language" else True
