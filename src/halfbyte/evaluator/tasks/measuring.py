"""All tasks of an evaluation: every base answers, then its candidates; graded, compared, and set against another base's.

    blocks    one a task and base: accuracies, flips, verdicts               the record's `tasks`
    effects   of the first base and each other, task by task, kind by kind   the record's `task_effects`

Two bases always answer the same items (they come from one file), each through its own template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halfbyte.errors import UsageError
from halfbyte.evaluator.answering import takes_images
from halfbyte.evaluator.packed import PackedReference
from halfbyte.evaluator.tasks.asking import Place, ask
from halfbyte.evaluator.tasks.results import Graded, block_of, effects_on, grade_all
from halfbyte.evaluator.tasks.task import Task
from halfbyte.texts.protocols import tokenizer_facts

if TYPE_CHECKING:
    from halfbyte.evaluator.job.bases import Base
    from halfbyte.evaluator.job.settings import Settings

#: (first base, second base) -> (kind, candidate of the first, candidate of the second)
Pairs = Callable[["Base", "Base"], Sequence[tuple[str, str, str]]]


def refuse_blind(bases: Sequence[Base], tasks: Sequence[Task]) -> None:
    """Raises UsageError if a task shows images and a base's reference takes none, or if it is a pack and cannot answer at all."""
    for base in bases if tasks else ():
        if isinstance(base.reference, PackedReference):
            raise UsageError(
                "a reference pack cannot answer",
                where=f"--task {tasks[0].name}",
                todo="name the model it was made from",
            )
    shown = [task for task in tasks if any(item.image for item in task.items)]
    for base in bases if shown else ():
        if not takes_images(base.reference):
            raise UsageError(
                f"{shown[0].name} has images, and {base.reference.label} takes none",
                where=f"--task {shown[0].name}",
                todo="leave that task out, or name a checkpoint with its processor",
            )


def measure_tasks(
    bases: Sequence[Base],
    tasks: Sequence[Task],
    place: Place,
    settings: Settings,
    pairs: Pairs,
    tokenizers: Mapping[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """{"tasks": blocks, "task_effects": effects} as record values; empty lists without tasks.

    tokenizers  base name -> its tokenizer
    raises      what asking raises
    """
    blocks: list[dict[str, Any]] = []
    graded: dict[tuple[str, str], Mapping[str, Graded]] = {}
    for base in bases if tasks else ():
        asked = ask(base.reference, {entry.id: entry.weights for entry in base.candidates}, tasks, place, base.name)
        facts = tokenizer_facts(tokenizers[base.name])
        for task in tasks:
            graded[base.name, task.name] = grade_all(task, asked[task.name])
            block = block_of(task, base.name, graded[base.name, task.name], settings.task_margin)
            blocks.append({**block, **_frame(task, facts)})
    return {"tasks": blocks, "task_effects": _effects(bases, tasks, graded, settings, pairs)}


def _frame(task: Task, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The metric's name and the template's digest: forced tasks have none, whatever the model has."""
    if task.forced:
        return {"metric": f"{task.name}[raw,forced]", "template": None}
    frame = "chat" if facts["instruct"] else "raw"
    return {"metric": f"{task.name}[{frame},greedy]", "template": facts["template"]}


def _effects(
    bases: Sequence[Base], tasks: Sequence[Task], graded: Mapping[tuple[str, str], Mapping[str, Graded]], settings: Settings,
    pairs: Pairs,
) -> list[dict[str, Any]]:  # fmt: skip
    found = []
    for task in tasks:
        for second in bases[1:]:
            both = [graded[base.name, task.name] for base in (bases[0], second)]
            for kind, left, right in pairs(bases[0], second):
                about = {
                    "task": task.name, "precision": kind, "cells": {"vanilla": left, "QAT": right},
                    "bases": {"vanilla": bases[0].name, "QAT": second.name},
                }  # fmt: skip
                made = effects_on(both, (left, right), settings.resamples, settings.task_margin)
                found += [{**about, **effect} for effect in made]
    return found
