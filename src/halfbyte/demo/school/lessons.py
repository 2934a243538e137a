"""What the small Gemma 4 is taught, step by step: a conversation of questions, a page of text, or a picture and questions.

A text batch mixes rows of 256 tokens: conversations of several questions (each answer scored), instructions written by
people, and windows of Wikipedia. A picture batch holds drawn scenes, each with all of its questions in one conversation.

The batch of step s is drawn by a generator seeded with (seed, s): no file of examples, nothing to shuffle, and a run that is
resumed at step s sees what it would have seen. Drawing and tokenizing happen in worker processes; pictures are painted on
the device.

The frame of a turn is written here in token ids, and a test holds it against the chat template:

    <bos> <|turn>user\\n QUESTION <turn|> \\n <|turn>model\\n <|channel>thought\\n<channel|> ANSWER <turn|> \\n ...

The empty thought is what the template writes before an answer; behind an answer it is not repeated in the history, so a
third of the turns are taught without it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.demo.school.picture_questions import draw_picture
from halfbyte.demo.school.pictures import Scene, numbers_of, paint, patches
from halfbyte.demo.school.questions import TAUGHT, draw_question
from halfbyte.trainer.losses import Batch
from halfbyte.trainer.rows import Row, collate

#: tokens a row of text and a row with a picture: fixed, so that a step can be recorded
LENGTH, SHOWN_LENGTH = 256, 192
SOFT_TOKENS = 64  # of a square picture: 24 x 24 patches, pooled 3 x 3
#: last part of the Wikipedia text that is never taught, for measuring
HELD_OUT_TEXT = 0.05


@dataclass(frozen=True)
class Pages:
    """Texts to learn from: Wikipedia as one string (its last HELD_OUT_TEXT left out) and (instruction, answer) pairs."""

    wikipedia: str
    instructions: tuple[tuple[str, str], ...]


def read_pages(folder: Path) -> Pages:
    """Read `wikipedia/wiki.utf8`, `chat/seed_tasks.jsonl` and `chat/user_oriented_instructions.jsonl` below `folder`."""
    text = (folder / "wikipedia" / "wiki.utf8").read_text(encoding="utf-8")
    articles = [a.partition(">\n")[2].strip() for a in text.split("<doc id=")[1:]]
    articles = [a.replace("</doc>", "").strip() for a in articles]
    taught = articles[: int(len(articles) * (1 - HELD_OUT_TEXT))]
    pairs = []
    for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        for line in (folder / "chat" / name).read_text(encoding="utf-8").splitlines():
            task = json.loads(line)
            for case in task["instances"]:
                pairs.append((f"{task['instruction']}\n{case['input']}".strip(), case["output"].strip()))
    return Pages("\n\n".join(taught), tuple(pair for pair in pairs if pair[1]))


class Frame:
    """Token ids of Gemma 4's turn frame for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.convert_tokens_to_ids
        self.bos = [special("<bos>")]
        self.user = [special("<|turn>")]
        self.end = [special("<turn|>")]
        self.line = self.encode("\n")
        self.model = [special("<|turn>"), *self.encode("model\n")]
        self.thought = [special("<|channel>"), *self.encode("thought\n"), special("<channel|>")]
        self.image = [special("<|image>"), *[special("<|image|>")] * SOFT_TOKENS, special("<image|>")]
        self.image_token = special("<|image|>")
        #: where the first soft token of a row's picture stands
        self.image_start = len(self.bos) + len(self.user) + len(self.encode("user\n")) + 1
        self.pad = tokenizer.pad_token_id

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def turn(self, question: str, answer: str, *, thought: bool = True, image: bool = False) -> Row:
        """One exchange; the answer and the end of its turn are scored."""
        ask = self.user + (
            self.encode("user\n") + self.image + self.encode(question) if image else self.encode(f"user\n{question}")
        )
        ask += self.end + self.line + self.model + (self.thought if thought else [])
        reply = self.encode(answer) + self.end
        ids = ask + reply + self.line
        return Row(tuple(ids), tuple(len(ask) <= i < len(ask) + len(reply) for i in range(len(ids))))


def join(rows: Sequence[Row], frame: Frame) -> Row:
    """One conversation from single turns, opened by `<bos>`."""
    ids = [*frame.bos, *(i for row in rows for i in row.ids)]
    scored = [False, *(s for row in rows for s in row.scored)]
    return Row(tuple(ids[:LENGTH]), tuple(scored[:LENGTH]))


@dataclass(frozen=True)
class Mixture:
    """Rows of a step."""

    conversations: int
    instructions: int
    windows: int
    pictures: int

    @property
    def text_room(self) -> int:
        """Scored positions of a text batch: more than its rows have, but for one batch in thousands."""
        return 90 * self.conversations + LENGTH * (self.instructions + self.windows)

    @property
    def picture_room(self) -> int:
        return 30 * self.pictures


#: few pages: a model of this size would only learn them by heart (docs/log.md)
MIXTURE = Mixture(conversations=76, instructions=1, windows=4, pictures=40)


class Lessons(torch.utils.data.Dataset[tuple[Batch, Batch]]):
    """step -> (text batch, picture batch). Held-out questions never appear."""

    def __init__(self, tokenizer: Any, pages: Pages, mixture: Mixture, seed: int, steps: int) -> None:
        self.frame = Frame(tokenizer)
        self.mixture, self.seed, self.steps = mixture, seed, steps
        self.text = self.frame.encode(pages.wikipedia)
        self.instructions = pages.instructions

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Batch, Batch]:
        rng = random.Random(f"{self.seed} {step}")
        rows = [self.conversation(rng) for _ in range(self.mixture.conversations)]
        rows += [self.instruction(rng) for _ in range(self.mixture.instructions)]
        rows += [self.window(rng) for _ in range(self.mixture.windows)]
        drawn = [draw_picture(rng, held_out=False) for _ in range(self.mixture.pictures)]
        shown = [self._shown(rng, picture.items) for picture in drawn]
        text = collate(rows, self.frame.pad, LENGTH, self.mixture.text_room)
        return text, picture_batch(shown, [picture.scene for picture in drawn], self.frame, self.mixture.picture_room)

    def conversation(self, rng: random.Random) -> Row:
        turns: list[Row] = []
        while sum(len(turn.ids) for turn in turns) < LENGTH:
            if rng.random() < 0.03:
                prompt, answer = rng.choice(TAUGHT)
            else:
                item = draw_question(rng, held_out=False)
                prompt, answer = item.prompt, item.answer
            turns.append(self.frame.turn(prompt, answer, thought=not turns or rng.random() < 0.67))
        return join(turns, self.frame)

    def instruction(self, rng: random.Random) -> Row:
        return join([self.frame.turn(*rng.choice(self.instructions))], self.frame)

    def window(self, rng: random.Random) -> Row:
        start = rng.randrange(len(self.text) - LENGTH)
        ids = [*self.frame.bos, *self.text[start : start + LENGTH - 1]]
        return Row(tuple(ids), tuple(i > 0 for i in range(LENGTH)))

    def _shown(self, rng: random.Random, items: Sequence[Any]) -> Row:
        order = rng.sample(items, min(3, len(items)))
        turns = [
            self.frame.turn(item.prompt, item.answer, image=i == 0, thought=i == 0 or rng.random() < 0.67)
            for i, item in enumerate(order)
        ]
        row = join(turns, self.frame)
        return Row(row.ids[:SHOWN_LENGTH], row.scored[:SHOWN_LENGTH])


def batches_of_lessons(lessons: Lessons, device: str, workers: int) -> Any:
    """`halfbyte.trainer.loop.Batches` over `lessons`: per step a text and a picture batch, weighted 2 to 1."""

    def batches(start: int) -> Iterator[list[tuple[float, Batch]]]:
        loader = torch.utils.data.DataLoader(
            lessons,
            batch_size=None,
            sampler=range(start, lessons.steps),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            collate_fn=_as_is,
        )
        for text, pictures in loader:
            yield [(2 / 3, to_device(text, device)), (1 / 3, to_device(pictures, device))]

    return batches


def picture_batch(rows: Sequence[Row], scenes: Sequence[Scene], frame: Frame, room: int | None = None) -> Batch:
    """Rows that each begin with one image; `numbers` stands for the pixels until `to_device` paints them."""
    batch = collate(rows, frame.pad, SHOWN_LENGTH, room)
    return batch | {
        "mm_token_type_ids": (batch["input_ids"] == frame.image_token).long(),
        "numbers": numbers_of(scenes),
    }


def to_device(batch: Batch, device: str) -> Batch:
    """The batch on `device`, its pictures painted there."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if "numbers" in moved:
        moved["pixel_values"], moved["image_position_ids"] = patches(paint(moved.pop("numbers")))
    return moved


def _as_is(item: Any) -> Any:
    return item
