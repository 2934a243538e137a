"""Text to rows of tokens: chats scored on the answers, plain text scored everywhere.

A data file is JSON Lines, each line one of

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "response": ...}          one turn of the same
    {"text": ...}                             plain text

or a `.txt` file. A chat is laid out as the model will meet it: the template's own generation prompt (for Gemma 4 with its
empty thought), the answer, and whatever the template writes after an answer. Plain text is cut into windows of the row
length, each opened by `<bos>` where the tokenizer has one. Batches are padded on the right, and the batch of step s is a
function of the seed and s: epoch e visits the rows in the e-th seeded shuffle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import SourceError, UsageError
from halfbyte.trainer.losses import IGNORE, Batch


@dataclass(frozen=True)
class Row:
    """Token ids, and which of them are scored."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


def read_rows(path: str | Path, tokenizer: Any, length: int) -> list[Row]:
    """The rows of a data file, none longer than `length` tokens.

    raises UsageError if there is no such file, SourceError (with the line) for a line that is none of the three forms, or
    for a file that yields no scored token
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("no such data file", where=str(path), todo="name a .jsonl or .txt file")
    if path.suffix == ".txt":
        rows = text_rows(tokenizer, path.read_text(encoding="utf-8"), length)
    else:
        rows = [row for number, line in _lines(path) for row in _line_rows(tokenizer, line, length, f"{path}:{number}")]
    rows = [row for row in rows if any(row.scored[1:])]
    if not rows:
        raise SourceError("holds nothing to learn from", where=str(path), todo="give at least one answer or one text")
    return rows


def text_rows(tokenizer: Any, text: str, length: int) -> list[Row]:
    """Windows of plain text, every token but `<bos>` scored."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = length - len(bos)
    windows = [bos + ids[i : i + step] for i in range(0, len(ids), step)]
    return [Row(tuple(window), tuple(i >= len(bos) for i in range(len(window)))) for window in windows]


def chat_row(tokenizer: Any, messages: Sequence[dict[str, str]], length: int) -> Row:
    """One chat, its last answer scored together with what the template writes after it.

    messages  alternating turns, the last one the assistant's
    """
    prompt = tokenizer.apply_chat_template(list(messages[:-1]), add_generation_prompt=True, tokenize=False)
    answer = messages[-1]["content"].strip()
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    closing = whole[whole.rindex(answer) + len(answer) :] if answer in whole else tokenizer.eos_token
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(answer + closing, add_special_tokens=False)["input_ids"]
    ids = (before + after)[:length]
    return Row(tuple(ids), tuple(i >= len(before) for i in range(len(ids))))


def batches_of(rows: Sequence[Row], size: int, seed: int, pad: int, device: str) -> Any:
    """`Batches` over `rows` (see `loop`): one micro-batch of `size` rows a step."""

    def batches(start: int) -> Iterator[list[tuple[float, Batch]]]:
        step = start
        while True:
            chosen = [rows[_place(step * size + i, len(rows), seed)] for i in range(size)]
            yield [(1.0, {name: value.to(device) for name, value in collate(chosen, pad).items()})]
            step += 1

    return batches


def collate(rows: Sequence[Row], pad: int, multiple: int = 1, room: int | None = None) -> Batch:
    """input_ids int64 [rows, longest, rounded up to `multiple`]; scored and targets int64 [n], or [room] if given.

    room  always so many scored positions: what is missing is filled with IGNORE, what is too much goes unscored
    No attention mask: attention is causal and the padding lies on the right, so no scored position sees it.
    """
    longest = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    ids = [(*row.ids, *[pad] * (longest - len(row.ids))) for row in rows]
    scored = [i * longest + t - 1 for i, row in enumerate(rows) for t in range(1, len(row.ids)) if row.scored[t]]
    targets = [row.ids[t] for row in rows for t in range(1, len(row.ids)) if row.scored[t]]
    if room is not None:
        missing = max(0, room - len(scored))
        scored, targets = [*scored[:room], *[0] * missing], [*targets[:room], *[IGNORE] * missing]
    named = {"input_ids": ids, "scored": scored, "targets": targets}
    return {name: torch.tensor(values) for name, values in named.items()}


_orders: dict[tuple[int, int, int], list[int]] = {}


def _place(position: int, count: int, seed: int) -> int:
    """Which row stands at `position` of the endless seeded reading."""
    epoch, offset = divmod(position, count)
    key = (count, seed, epoch)
    if key not in _orders:
        _orders.clear()
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        _orders[key] = order
    return _orders[key][offset]


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise SourceError(
                        f"not JSON: {error}", where=f"{path}:{number}", todo="write one JSON object a line"
                    ) from None


def _line_rows(tokenizer: Any, line: Any, length: int, where: str) -> list[Row]:
    match line:
        case {"messages": [*messages]} if _is_chat(messages):
            return [chat_row(tokenizer, messages, length)]
        case {"prompt": str(prompt), "response": str(response)} if response.strip():
            turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return [chat_row(tokenizer, turn, length)]
        case {"text": str(text)}:
            return text_rows(tokenizer, text, length)
    raise SourceError(
        "is neither a chat that ends with an answer, nor prompt and response, nor text",
        where=where,
        todo='write {"messages": [...]}, {"prompt": ..., "response": ...} or {"text": ...}',
    )


def _is_chat(messages: list[Any]) -> bool:
    whole = all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)
    return len(messages) > 1 and whole and messages[-1]["role"] == "assistant" and bool(messages[-1]["content"].strip())
