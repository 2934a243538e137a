"""lm-eval's samples of two models -> pairs of the same document -> flips, McNemar, Tango, a verdict.

A sample is one document as one model answered it. What pairing needs of it, by lm-eval's own names:

    doc_id, filter                       which document, and which of the task's ways to read an answer
    doc_hash, prompt_hash, target_hash   of the document, of the prompt as it was shown, of the right answer
    metrics, and one key for each        1 or 0 (right or wrong), or any number
    filtered_resps                       what the filter left of the answer

Two samples are a pair if all three hashes agree: another few-shot draw or another template is another question, and refused, not averaged
over. The prompt's hash is of what lm-eval passed to the model, template included.

A metric whose values are all 0 or 1 is a task's accuracy, and flips are counted. Any other number (F1, BLEU) has no flips: its mean
difference gets a bootstrap over documents and no verdict, because the margin is one of accuracy. Metrics that are no numbers (the
pairs from which lm-eval makes a perplexity) are named as left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import ShapeMismatch
from halfbyte.evaluator.statistics import Cell, bootstrap_documents, difference, verdict, wilson
from halfbyte.evaluator.statistics.paired_tests import mcnemar, paired_difference
from halfbyte.evaluator.tasks.lines import Entry, read_lines
from halfbyte.records import digest

HASHES = ("doc_hash", "prompt_hash", "target_hash")
SEED = 0
Sample = Mapping[str, Any]


def read_samples(path: Path) -> list[Sample]:
    """The samples of a JSON-lines file, with what pairing needs; raises SourceError, naming the line."""
    return [_checked(entry) for entry in read_lines(path)]


def pair_samples(
    reference: Sequence[Sample], candidate: Sequence[Sample], margin: float, resamples: int = 10_000
) -> dict[str, Any]:
    """{"metrics": [...], "left_out": [...]} of one task, as record values.

    margin  accuracy: a difference whose interval lies within it is a tie
    raises  ShapeMismatch unless both are samples of the same documents, prompts and right answers
    """
    mine, others = _by_place(reference), _by_place(candidate)
    if mine.keys() != others.keys():
        place = min(mine.keys() ^ others.keys())
        raise ShapeMismatch(
            f"document {place[1]} (filter {place[0]}) was put to one model only", todo="run both with the same limit"
        )
    for place, sample in mine.items():
        for name in HASHES:
            if sample[name] != others[place][name]:
                raise ShapeMismatch(
                    f"{name} of document {place[1]} differs between the models",
                    todo="ask both the same, in the same template",
                )
    found: dict[str, list[dict[str, Any]]] = {"metrics": [], "left_out": []}
    for name, rows in _filters(mine).items():
        both = [(sample, others[name, sample["doc_id"]]) for sample in rows]
        for metric in rows[0]["metrics"]:
            values = [(_number(a.get(metric)), _number(b.get(metric))) for a, b in both]
            about = {"metric": metric, "filter": name, "n": len(both)}
            if any(value is None for pair in values for value in pair):
                found["left_out"].append(about)
                continue
            plain = [(a, b) for a, b in values if a is not None and b is not None]
            same = sum(a["filtered_resps"] == b["filtered_resps"] for a, b in both)
            found["metrics"].append({**about, **_compared(plain, margin, resamples), "same_answer": same})
    return {
        **found,
        "documents": digest([[place[0], place[1], *(mine[place][h] for h in HASHES)] for place in sorted(mine)]),
    }


def _compared(values: Sequence[tuple[float, float]], margin: float, resamples: int) -> dict[str, Any]:
    """Of one metric: flips if it is right or wrong, else means and their difference."""
    n = len(values)
    if any(value not in (0.0, 1.0) for pair in values for value in pair):
        return _means(values, resamples)
    before, after = (sum(pair[side] for pair in values) for side in (0, 1))
    lost = sum(a > b for a, b in values)
    gained = sum(b > a for a, b in values)
    value, low, high = paired_difference(lost, gained, n)
    return {
        "reference": _share(int(before), n), "candidate": _share(int(after), n),
        "flips": {"only_reference": lost, "only_candidate": gained, "p": mcnemar(lost, gained), "difference": value, "low": low, "high": high},
        "margin": margin, "verdict": verdict(low, high, margin, better="higher"),
    }  # fmt: skip


def _share(right: int, n: int) -> dict[str, Any]:
    low, high = wilson(right, n)
    return {"right": right, "value": right / n, "low": low, "high": high}


def _means(values: Sequence[tuple[float, float]], resamples: int) -> dict[str, Any]:
    import numpy as np

    table = np.array(values)
    places = np.arange(len(table))
    cells = {"reference": Cell(table[:, 0], places), "candidate": Cell(table[:, 1], places)}
    found = bootstrap_documents(cells, [difference("d", "candidate", "reference")], resamples=resamples, seed=SEED)["d"]
    record = found.as_record()
    return {
        "reference": {"value": float(table[:, 0].mean())}, "candidate": {"value": float(table[:, 1].mean())},
        "flips": None, "margin": None, "verdict": None,
        "difference": {"value": record["point"], "low": record["low"], "high": record["high"], "method": found.method},
    }  # fmt: skip


def _by_place(samples: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
    found = {(sample["filter"], sample["doc_id"]): sample for sample in samples}
    if len(found) < len(samples):
        raise ShapeMismatch("a document was answered twice under one filter", todo="give the samples of one run")
    return found


def _filters(samples: Mapping[tuple[str, int], Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for (name, _), sample in samples.items():
        groups.setdefault(name, []).append(sample)
    return groups


def _number(value: Any) -> float | None:
    """A finite number (or a truth value) as float; None for anything else."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def _checked(entry: Entry) -> Sample:
    for name in (*HASHES, "filter"):
        entry.text(name)
    entry.texts("metrics")
    doc_id = entry.body.get("doc_id")
    if not isinstance(doc_id, int) or isinstance(doc_id, bool):
        raise entry.wrong("doc_id is no whole number")
    if "filtered_resps" not in entry.body:
        raise entry.wrong("filtered_resps is missing")
    return entry.body


def slimmed(sample: Sample) -> Iterator[tuple[str, Any]]:
    """What is kept of a sample: all but the prompts, which few-shot examples repeat thousands of times."""
    for name, value in sample.items():
        if name != "arguments":
            yield name, value
