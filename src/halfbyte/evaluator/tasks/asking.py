"""Every model's answers to every task, kept in files under the digest of all that they depend on.

    key = weights of the model, config and companions (tokenizer, template, processor) of the reference, ids and prompts and images of
          the task, longest answer, batch, device, dtype, versions

What is graded with (right answers, tests, instructions) is no part of it: a mended grade needs no new answers. A file is written when
a model has finished a task, atomically, so a run that was stopped goes on there. A file with another key, with a content that
does not have the digest it states, or to other items, is not believed and the questions are asked again.

One transformers model is built for a base and wears each candidate's weights in turn (`evaluator.answering`); if all answers are
on disk it is never built. The whole model has to fit: unlike scoring, answering is not done layer by layer. Tasks that are forced
(`evaluator.forcing`) generate nothing: they come first, each model opened as the scorer opens it, layer by layer where it does not fit.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from halfbyte.evaluator.answering import Answerer
from halfbyte.evaluator.answers import Answer, answer_questions
from halfbyte.evaluator.forcing import force, forced_rows
from halfbyte.evaluator.tasks.task import Task
from halfbyte.format.shards import hash_file
from halfbyte.layers.model import exact_float32
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import Weights
from halfbyte.progress import note
from halfbyte.records import digest, versions, write_text_atomic
from halfbyte.texts.protocols import load_tokenizer

FORMAT = 1
Maker = Callable[[Weights, Task], list[Answer]]
#: files beside the weights that decide what a model is shown and when it stops
COMPANIONS = ("tokenizer*", "*processor_config.json", "chat_template*", "generation_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.*", "merges.txt")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where models answer, and where their answers are kept."""

    folder: Path
    device: str
    dtype: str
    batch: int


@dataclass(frozen=True)
class Said:
    """One answer: its text and how many tokens it took."""

    id: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Asked:
    """All answers of one model to one task, in the task's order, and the file that holds them."""

    answers: Sequence[Said]
    path: Path
    cached: bool
    seconds: float
    versions: Mapping[str, str]


def ask(
    reference: Weights, candidates: Mapping[str, Weights], tasks: Sequence[Task], place: Place, name: str = "reference"
) -> dict[str, dict[str, Asked]]:
    """Task name -> model -> answers; the reference is the model "", candidates have their ids.

    name    of the base, for the names of files
    raises  what `Answerer` and `answer_questions` raise
    """
    models = {"": reference, **candidates}
    shown = _shown_by(reference)
    keys = {
        (task.name, each): digest(_depends_on(task, weights, shown, place))
        for each, weights in models.items()
        for task in tasks
    }
    found = {(task.name, each): _stored(_path(place, task, f"{name}-{each}", keys[task.name, each]), keys[task.name, each], task)
             for each in models for task in tasks}  # fmt: skip
    for (task_name, each), kept in found.items():
        if kept is not None:
            note(f"{task_name}, {each or name}: answers from {kept.path.name}")
    makers: list[Maker] = [_Forcer(reference, place), _Asker(reference, place)]
    for maker, forced in zip(makers, (True, False), strict=True):
        for each, weights in models.items():
            for task in (task for task in tasks if task.forced is forced and found[task.name, each] is None):
                key = keys[task.name, each]
                path = _path(place, task, f"{name}-{each}", key)
                found[task.name, each] = _write(partial(maker, weights, task), path, key)
    return {
        task.name: {each: asked for each in models if (asked := found[task.name, each]) is not None} for task in tasks
    }


class _Asker:
    """Generated answers; the model is built when the first is wanted."""

    def __init__(self, reference: Weights, place: Place) -> None:
        self.reference, self.place = reference, place
        self.answerer: Answerer | None = None

    def __call__(self, weights: Weights, task: Task) -> list[Answer]:
        if self.answerer is None:
            self.answerer = Answerer(self.reference, device=self.place.device, dtype=self.place.dtype)
        self.answerer.wear(weights)
        with exact_float32():
            return answer_questions(
                self.answerer.model, self.answerer.processor, task.questions(), batch_size=self.place.batch,
                max_new_tokens=task.max_new_tokens, device=self.place.device,
            )  # fmt: skip


class _Forcer:
    """Forced answers; all models read the rows of the reference's tokenizer."""

    def __init__(self, reference: Weights, place: Place) -> None:
        self.reference, self.place = reference, place
        self.rows: dict[str, Rows] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.reference)

    def __call__(self, weights: Weights, task: Task) -> list[Answer]:
        texts, place = task.forced_texts(), self.place
        if task.name not in self.rows:
            self.rows[task.name] = forced_rows(texts, self.tokenizer)
        return force(
            weights,
            texts,
            self.rows[task.name],
            self.tokenizer,
            device=place.device,
            dtype=place.dtype,
            batch=place.batch,
        )


def _write(make: Callable[[], list[Answer]], path: Path, key: str) -> Asked:
    started = time.perf_counter()
    answers = [Said(answer.id, answer.text, len(answer.tokens)) for answer in make()]
    rows = [[said.id, said.text, said.tokens] for said in answers]
    notes = {"seconds": time.perf_counter() - started, "versions": versions()}
    body = {"format": FORMAT, "key": key, "content": digest(rows), **notes, "answers": rows}
    write_text_atomic(path, json.dumps(body) + "\n")
    return Asked(answers, path, False, notes["seconds"], notes["versions"])  # type: ignore[arg-type]


def _stored(path: Path, key: str, task: Task) -> Asked | None:
    """The answers in a file; None if there are none, they are another's, or the file is damaged."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        rows = body["answers"]
        if (body["format"], body["key"], body["content"]) != (FORMAT, key, digest(rows)):
            return None
        answers = [Said(str(id), str(text), int(tokens)) for id, text, tokens in rows]
        kept = Asked(answers, path, True, float(body["seconds"]), dict(body["versions"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return kept if [said.id for said in answers] == [item.id for item in task.items] else None


def _shown_by(reference: Weights) -> dict[str, str]:
    """Hashes of the files that stand between a prompt and the weights."""
    folder = reference.companions_folder()
    names = sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})
    return {path.name: hash_file(path) for path in names} | {"config": digest(reference.config)}


def _depends_on(task: Task, weights: Weights, shown: Mapping[str, str], place: Place) -> dict[str, Any]:
    moving = {name: version for name, version in versions().items() if name in ("halfbyte", "torch", "transformers")}
    return {
        "format": FORMAT, "weights": weights.digest, "shown": dict(shown), "task": task.digest,
        "max_new_tokens": task.max_new_tokens, "batch": place.batch, "device": place.device.partition(":")[0],
        "dtype": place.dtype, "versions": moving,
    }  # fmt: skip


def _path(place: Place, task: Task, name: str, key: str) -> Path:
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[-60:].strip("-.")
    return place.folder / f"{task.name}-{slug}-{key.partition(':')[2][:16]}.json"
