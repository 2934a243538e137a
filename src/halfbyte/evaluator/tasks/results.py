"""Answers -> record values: accuracies with Wilson's interval, flips both ways, McNemar's p, Tango's difference, a verdict.

The verdict asks whether the difference of accuracies is too small to matter, by the margin that was stated before: "tie" if its whole
95 % interval lies within +- margin, "loss" or "win" if it lies on one side of 0 and is no tie, else "undecided". 0.02 is the default:
two answers of a hundred, less than another wording of the prompt moves most models, and still decidable by the files people have (with 5 % of
answers flipping, 1,319 items bound the difference to +- 1.2 points; 200 items to +- 3, which is "undecided" and should be).

Candidates are compared among themselves too, each later one with the first named: whether another way of rounding is worse than the plain
one is not read off two differences from the reference, whose noise it shares.

By kind there are intervals and p but no verdicts: with twenty kinds one p below 0.05 is what chance gives.

Two bases: D, T and I of accuracy over the same items (`evaluator.statistics.figures`), every item a document. D and T are paired
differences of two models and have Tango's interval, as everywhere; I is made of four and comes from the joint bootstrap. Where no item varies
in it the bootstrap would claim a width of 0, so the two D's limits at 97.5 % are added up instead: wide, and true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.evaluator.answers import Answer, Comparison, compare_answers
from halfbyte.evaluator.statistics import Cell, two_by_two, verdict, wilson
from halfbyte.evaluator.statistics.paired_tests import paired_difference
from halfbyte.evaluator.tasks.asking import Asked
from halfbyte.evaluator.tasks.task import Task
from halfbyte.progress import track

SEED = 0
#: flips shown to a reader, and characters of each text
SHOWN, CHARACTERS = 5, 2000


@dataclass(frozen=True)
class Graded:
    """One model's graded answers to one task: item by item, and part by part; and how they came about."""

    items: Sequence[Answer]
    parts: Sequence[Answer]
    asked: Asked


def grade_all(task: Task, asked: Mapping[str, Asked]) -> dict[str, Graded]:
    """Model -> graded answers; code is executed here, if the task has any."""
    with track(f"grade {task.name}", len(task.items) * len(asked), "answers") as advance:
        return {model: _graded(task, found, advance) for model, found in asked.items()}


def _graded(task: Task, asked: Asked, advance: Any) -> Graded:
    items, parts = [], []
    for item, said in zip(task.items, asked.answers, strict=True):
        found = task.parts(item, said.text) if task.parts else [(item.kind, task.grade(item, said.text))]
        right = all(each for _, each in found)
        items.append(Answer(item.id, item.kind, said.text, right, ()))
        parts += [Answer(f"{item.id} {n}", kind, said.text, each, ()) for n, (kind, each) in enumerate(found)]
        advance(1)
    return Graded(items, parts, asked)


def block_of(task: Task, base: str, graded: Mapping[str, Graded], margin: float) -> dict[str, Any]:
    """The record of one task and base; what the job knows of device and template is added there.

    graded  "" the reference's, the others by the candidates' ids
    """
    own = graded[""]
    return {
        "task": task.name, "version": task.version, "base": base, "rule": task.rule, "data": list(task.files),
        "digest": task.digest, "n": len(task.items), "max_new_tokens": task.max_new_tokens, "facts": dict(task.facts),
        "reference": {**_accuracy(task, own), "kinds": [_kind_alone(kind, group) for kind, group in _by_kind(own.parts).items()]},
        "candidates": [
            {"candidate": key, **_candidate(task, own, found, margin)} for key, found in graded.items() if key
        ],
        "comparisons": _comparisons(graded, margin),
    }  # fmt: skip


def _comparisons(graded: Mapping[str, Graded], margin: float) -> list[dict[str, Any]]:
    """Every later candidate against the first: what a better way of rounding gained is a paired difference too."""
    first, *others = [key for key in graded if key] or [""]
    found = {key: compare_answers(graded[first].items, graded[key].items)["all"] for key in others}
    return [
        {
            "candidate": key, "against": first, "flips": _flips(each), "margin": margin,
            "verdict": verdict(each.low, each.high, margin, better="higher"), "same_text": each.same_text,
        }
        for key, each in found.items()
    ]  # fmt: skip


def _accuracy(task: Task, graded: Graded) -> dict[str, Any]:
    """Right answers with Wilson's interval, how many ran into the longest length, and the file."""
    n, right = len(graded.items), sum(answer.correct for answer in graded.items)
    asked = graded.asked
    return {
        **_share(right, n),
        "tokens": sum(said.tokens for said in asked.answers),
        "cut_off": 0 if task.forced else sum(said.tokens >= task.max_new_tokens for said in asked.answers),
        "answers": {"file": f"answers/{asked.path.name}", "cached": asked.cached, "seconds": asked.seconds},
        "versions": dict(asked.versions),
    }


def _share(right: int, n: int) -> dict[str, Any]:
    low, high = wilson(right, n)
    return {"right": right, "value": right / n, "low": low, "high": high}


def _candidate(task: Task, own: Graded, found: Graded, margin: float) -> dict[str, Any]:
    total = compare_answers(own.items, found.items)["all"]
    kinds = compare_answers(own.parts, found.parts)
    return {
        **_accuracy(task, found),
        "flips": _flips(total),
        "margin": margin,
        "verdict": verdict(total.low, total.high, margin, better="higher"),
        "same_text": total.same_text,
        "kinds": [
            {"kind": kind, "n": each.n, **_share(each.candidate, each.n), "flips": _flips(each)}
            for kind, each in kinds.items() if kind != "all"
        ],
        "examples": _examples(task, own, found),
    }  # fmt: skip


def _flips(found: Comparison) -> dict[str, Any]:
    return {
        "only_reference": found.only_reference, "only_candidate": found.only_candidate, "p": found.p,
        "difference": found.difference, "low": found.low, "high": found.high,
    }  # fmt: skip


def _by_kind(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.kind, []).append(answer)
    return groups


def _kind_alone(kind: str, group: Sequence[Answer]) -> dict[str, Any]:
    return {"kind": kind, "n": len(group), **_share(sum(answer.correct for answer in group), len(group))}


def _examples(task: Task, own: Graded, found: Graded) -> list[dict[str, Any]]:
    """The first SHOWN flips in the file's order, lost ones before gained ones: a reader asks what broke."""
    flips = [
        (item, a, b) for item, a, b in zip(task.items, own.items, found.items, strict=True) if a.correct != b.correct
    ]
    flips.sort(key=lambda flip: not flip[1].correct)
    return [
        {
            "id": item.id, "kind": item.kind, "lost": a.correct, "image": item.image is not None,
            "prompt": item.prompt[:CHARACTERS], "reference": a.text[:CHARACTERS], "candidate": b.text[:CHARACTERS],
        }
        for item, a, b in flips[:SHOWN]
    ]  # fmt: skip


def effects_on(
    graded: Sequence[Mapping[str, Graded]], pair: tuple[str, str], resamples: int, margin: float
) -> list[dict[str, Any]]:
    """D(vanilla), D(QAT), T and I of accuracy, as record values.

    graded  the two bases' (model -> graded), the first standing where the design says vanilla; over the same items
    pair    the candidate of each
    """
    import numpy as np

    right = {
        (name, precision): [answer.correct for answer in models[model].items]
        for name, models, candidate in zip(("vanilla", "QAT"), graded, pair, strict=True)
        for precision, model in (("bf16", ""), ("NF4", candidate))
    }
    n = len(graded[0][""].items)
    cells = {key: Cell(np.array(row, np.float64), np.arange(n)) for key, row in right.items()}
    of = {
        "D(vanilla)": (right["vanilla", "bf16"], right["vanilla", "NF4"]),
        "D(QAT)": (right["QAT", "bf16"], right["QAT", "NF4"]),
        "T": (right["vanilla", "bf16"], right["QAT", "bf16"]),
    }
    made = {name: (*paired_difference(*_counts(*rows), n), "tango") for name, rows in of.items()}
    joint = two_by_two(cells, resamples=resamples, seed=SEED)["I"]
    record = joint.as_record()
    made["I"] = (joint.point, record["low"], record["high"], joint.method)
    if joint.low == joint.high:
        vanilla, qat = (paired_difference(*_counts(*of[name]), n, 0.975) for name in ("D(vanilla)", "D(QAT)"))
        made["I"] = (joint.point, qat[1] - vanilla[2], qat[2] - vanilla[1], "tango, both D at 97.5 %")
    return [_effect(name, found, n, margin) for name, found in made.items()]


def _counts(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    pairs = list(zip(before, after, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def _effect(name: str, found: tuple[float, Any, Any, str], n: int, margin: float) -> dict[str, Any]:
    value, low, high, method = found
    bounds = (-float("inf") if low is None else low, float("inf") if high is None else high)
    said = verdict(*bounds, margin, better="higher")
    return {"effect": name, "value": value, "low": low, "high": high, "unit": "accuracy", "n": n, "method": method, "margin": margin, "verdict": said}  # fmt: skip
