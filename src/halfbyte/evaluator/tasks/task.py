"""What a task is: items to ask, a length that an answer may have, and a grade that is a function of the text alone.

A grade must be blind (it sees the item and the answer, never whose answer it is) and total (any text has a grade; one that
cannot be understood is wrong). `parts` splits a grade for the tables by kind: most tasks have one part an item, its kind; IFEval
has one for every instruction of a prompt. Items are taken as independent, parts of one item are not: so accuracies, tests and
verdicts are made of items, and parts are only ever compared within one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.evaluator.answers import Question
from halfbyte.evaluator.forcing import NAME, VERSION, Forced
from halfbyte.records import digest


@dataclass(frozen=True)
class Item:
    """One thing that is asked.

    id     unique in its task
    kind   the group it is counted in
    image  a file whose header was checked, or None
    key    what the grade needs to know (the right answer, tests, instructions); of a forced task the target, as text
    source a longer text that the prompt was cut from, by which text seen in a calibration is known; None: the prompt is whole
    """

    id: str
    kind: str
    prompt: str
    image: Path | None = None
    key: Any = None
    source: str | None = None


@dataclass(frozen=True)
class Task:
    """A named set of items with one way of grading.

    version         raised when prompt or grade change: figures of two versions are not compared
    max_new_tokens  longest answer; 0 of a forced task
    rule            the grade in words, for the report
    files           {"name", "sha256", "bytes"} of what it was read from
    images          item id -> sha256 of its image
    grade           (item, answer) -> right or wrong
    parts           (item, answer) -> [(kind, right or wrong)]; None: the item's kind and grade
    facts           what else a reader of the figures must know, e.g. what the sandbox could enforce
    forced          nothing is generated: prompt and key are one text, laid before the model (halfbyte.evaluator.forcing); raw, no template
    """

    name: str
    version: int
    items: Sequence[Item]
    max_new_tokens: int
    rule: str
    files: Sequence[Mapping[str, Any]]
    grade: Callable[[Item, str], bool]
    parts: Callable[[Item, str], Sequence[tuple[str, bool]]] | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    forced: bool = False

    @property
    def digest(self) -> str:
        """Of what a model is shown: ids, prompts, images, and the targets that are forced. Other keys and grades never reach it."""
        if self.forced:
            return digest([NAME, VERSION, [[item.id, item.prompt, item.key] for item in self.items]])
        return digest([[item.id, item.prompt, self.images.get(item.id)] for item in self.items])

    def questions(self) -> list[Question]:
        """The items as `answer_questions` takes them; their grade comes later."""
        return [Question(item.id, item.kind, item.prompt, item.image, "") for item in self.items]

    def forced_texts(self) -> list[Forced]:
        """The items of a forced task as `forced_rows` takes them."""
        return [Forced(item.id, item.kind, item.prompt, item.key) for item in self.items]

    def first(self, limit: int | None) -> Task:
        """The task with its first `limit` items, in the file's order; None: all of them."""
        return self if limit is None else replace(self, items=self.items[:limit])
