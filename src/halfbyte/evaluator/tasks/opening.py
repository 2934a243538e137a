"""`NAME=FILE` -> tasks. What can be refused is refused here, before any model is opened.

    gsm8k      openai/grade-school-math's test.jsonl
    ifeval     google-research/instruction_following_eval's input_data.jsonl
    mbpp       google-research/mbpp's sanitized-mbpp.json; runs code, so only with `allow_code`
    questions  JSON lines of one's own, with pictures if wanted
    lastword   JSON lines of texts whose last word is to be guessed; no answers are generated

A limit takes the first items of each file, in the file's order: no draw, so that two people who say `--task-limit 200` ask the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.evaluator.tasks.gsm8k import read_gsm8k
from halfbyte.evaluator.tasks.ifeval import read_ifeval
from halfbyte.evaluator.tasks.lastword import read_lastword
from halfbyte.evaluator.tasks.mbpp import read_mbpp
from halfbyte.evaluator.tasks.questions import read_questions
from halfbyte.evaluator.tasks.task import Task

NAMES = ("gsm8k", "ifeval", "mbpp", "questions", "lastword")


def open_tasks(
    specs: Sequence[str], *, allow_code: bool = False, limit: int | None = None, max_new_tokens: int | None = None
) -> list[Task]:
    """The tasks of "NAME=FILE" each, in the order given.

    limit           the first so many items of each; None: all
    max_new_tokens  instead of each task's own; a task that generates nothing has none
    raises          UsageError (no NAME=FILE, unknown or named twice, mbpp without `allow_code`), SourceError (the file)
    """
    readers: Mapping[str, Callable[[Path], Task]] = {
        "gsm8k": read_gsm8k, "ifeval": read_ifeval, "mbpp": partial(read_mbpp, allow_code=allow_code),
        "questions": read_questions, "lastword": read_lastword,
    }  # fmt: skip
    pairs = [_pair(spec) for spec in specs]
    if len({name for name, _ in pairs}) < len(pairs):
        raise UsageError("a task is named twice", where="--task", todo="join its files into one")
    found = [readers[name](path).first(limit) for name, path in pairs]
    if max_new_tokens is None:
        return found
    return [task if task.forced else replace(task, max_new_tokens=max_new_tokens) for task in found]


def _pair(spec: str) -> tuple[str, Path]:
    name, mark, path = str(spec).partition("=")
    if not mark or not path or name not in NAMES:
        raise UsageError(f"{spec!r} is not NAME=FILE", where="--task", todo=f"names: {', '.join(NAMES)}")
    return name, Path(path)
