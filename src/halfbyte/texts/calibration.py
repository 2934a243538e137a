"""Calibration: the texts whose activations say which weights matter, as rows of tokens in the model's own frame.

    builtin      prompts and passages that come with the package (built_in/SOURCES.md: whose, under which licence)
    FILE.jsonl   a line is {"prompt"[, "response"]}, {"messages"} or {"text"}
    other FILE   a text, WikiText's raw form article by article

A model is calibrated on what it will see. With a chat template: prompts in the turn frame, each with its answer; an answer
that is not given is written by the source itself (greedy, `traces`), since its own words are what it will read back in use.
Texts stand inside the assistant's turn, as in `ppl[assistant-frame]`. A base model gets texts alone, a <bos> in front if it has one.

Which prompts and windows are taken is drawn from the seed, up to a number of tokens; so a smaller set is a mixture too.

A figure measured on calibration text flatters. So every document's hashes are kept in the record, paragraph by paragraph (the same
article cut elsewhere has other windows, but the same paragraphs), and `halfbyte evaluate` refuses text that it finds among them.

The catch: the source writes answers whole, not layer by layer. Where it does not fit, prompts stand without them, and the record
says so. Pictures are not shown: lines with an image are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import SourceError
from halfbyte.format.shards import hash_file
from halfbyte.layers.rows import Rows
from halfbyte.texts import protocols
from halfbyte.texts.reading import Chat, Document, read_chat, read_documents, shows_picture
from halfbyte.texts.traces import write_answers

if TYPE_CHECKING:
    from halfbyte.layers.weights import Weights

BUILT_IN = "builtin"
#: text tokens of a window, and the longest row (prompt and answer are cut there)
WINDOW, LONGEST = 512, 1024
#: a line shorter than this says too little to be recognised by ("Contents", "Yes.")
_PARAGRAPH = 60
_HASH_DIGITS = 16


@dataclass(frozen=True)
class Calibration:
    """The texts, before a tokenizer has seen them.

    name      `builtin`, or the file's name
    sha256    of the file
    pictures  lines left out because they show one
    """

    name: str
    sha256: str
    chats: Sequence[Chat]
    documents: Sequence[Document]
    pictures: int = 0


@dataclass(frozen=True)
class Writing:
    """How the source writes answers: longest answer, arithmetic, prompts at a time, and the folder where they are kept."""

    max_new_tokens: int
    device: str
    dtype: str
    batch: int
    cache: Path


def read_calibration(data: str | Path) -> Calibration:
    """The texts of `builtin` or a file (see the module); raises SourceError, naming the line."""
    if str(data) == BUILT_IN:
        with resources.as_file(resources.files("halfbyte.texts") / "built_in" / "calibration.jsonl") as path:
            return _read_lines(path, BUILT_IN)
    path = Path(data)
    if path.suffix.lower() == ".jsonl":
        return _read_lines(path, path.name)
    return Calibration(path.name, _hash(path), (), read_documents(path))


def _read_lines(path: Path, name: str) -> Calibration:
    chats: list[Chat] = []
    documents: list[Document] = []
    pictures = 0
    sha256 = _hash(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"cannot be read as UTF-8 ({error})", where=str(path), todo="name a text file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if shows_picture(line):
            pictures += 1
        elif (document := _document(line, number)) is not None:
            documents.append(document)
        else:
            chats.append(read_chat(line, f"{path}, line {number}", str(number)))
    if not chats and not documents:
        raise SourceError("no text in it", where=str(path), todo='give lines of {"prompt": ...} or {"text": ...}')
    return Calibration(name, sha256, chats, documents, pictures)


def _document(line: str, number: int) -> Document | None:
    """The line's {"text"}; None if it is something else (the reader of chats says what is wrong with it)."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = body.get("text") if isinstance(body, dict) else None
    if not isinstance(text, str) or "prompt" in body or "messages" in body:
        return None
    return Document(str(body.get("id", number)), text, len(text.split()), len(text.encode()))


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise SourceError(f"cannot be read ({error})", where=str(path), todo="name a file, or builtin") from None


def calibration_rows(
    texts: Calibration, weights: Weights, *, tokens: int, seed: int, writing: Writing
) -> tuple[Rows, dict[str, Any]]:
    """Up to `tokens` tokens of rows in the frame of `weights`, and what the quantize record says of them.

    returns  rows whose positions all count but the last of each; {"name", "sha256", "rows", "tokens", "documents", "hashes", ...}
    raises   SourceError if nothing is left (a base model and prompts alone)
    """
    from halfbyte.layers.streaming import must_stream

    tokenizer = protocols.load_tokenizer(weights)
    instruct = protocols.is_instruct(tokenizer)
    windows = _windows(texts, tokenizer, instruct)
    prompts = [protocols.prompt_ids(tokenizer, chat.messages) for chat in texts.chats] if instruct else []
    writes = any(chat.response is None for chat in texts.chats) and instruct
    fits = not writes or not must_stream(weights, writing.device, writing.dtype)
    costs = [
        len(prompt) + (writing.max_new_tokens if chat.response is None else len(chat.response) // 3)
        for prompt, chat in zip(prompts, texts.chats, strict=False)
    ] + [len(ids) for _, ids in windows]
    taken = _draw(costs, tokens, seed)
    chosen = [at for at in taken if at < len(prompts)]
    chats = [texts.chats[at] for at in chosen]
    answers, trace = _answers(tokenizer, chats, weights, writing, fits=fits)
    rows = {at: [*prompts[at], *answer] for at, answer in zip(chosen, answers, strict=True)}
    names = {at: texts.chats[at].name for at in chosen}
    for at in (at for at in taken if at >= len(prompts)):
        document, rows[at] = windows[at - len(prompts)]
        names[at] = document.name
    made = _rows([rows[at] for at in taken], [names[at] for at in taken], tokenizer)
    used = {id(windows[at - len(prompts)][0]): windows[at - len(prompts)][0] for at in taken if at >= len(prompts)}
    facts = {
        "name": texts.name, "sha256": texts.sha256, "rows": len(made.tokens), "tokens": sum(map(len, made.tokens)),
        "rows_digest": made.digest, "chats": len(chats), "texts": len(used), "instruct": instruct, "seed": seed,
        "answers": _whose(chats, fits=fits), "trace": trace, "text_only": True, "pictures_left_out": texts.pictures,
        "hashes": sorted({h for chat in chats for h in chat_hashes(chat)} | {h for d in used.values() for h in text_hashes(d.text)}),
    }  # fmt: skip
    return made, facts


def _windows(texts: Calibration, tokenizer: Any, instruct: bool) -> list[tuple[Document, list[int]]]:
    """Every text in windows behind the assistant's prompt (or <bos>); of a base model also chats with their answers, as text."""
    documents = list(texts.documents)
    if instruct:
        prefix = protocols.prompt_ids(tokenizer, ({"role": "user", "content": protocols.FRAME_REQUEST},))
    else:
        prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        joined = [
            "\n\n".join([*(m["content"] for m in c.messages), c.response or ""]) for c in texts.chats if c.response
        ]
        documents += [Document(f"chat {n}", text, 0, 0) for n, text in enumerate(joined, start=1)]
    found = []
    for document in documents:
        ids = protocols.encode(tokenizer, document.text)
        pieces = [ids[begin : begin + WINDOW] for begin in range(0, len(ids), WINDOW)]
        found += [(document, [*prefix, *piece]) for piece in pieces if len(piece) > 1]
    return found


def _draw(costs: Sequence[int], tokens: int, seed: int) -> list[int]:
    """Places of what is taken, in their own order: drawn without return until `tokens` are full (always one)."""
    order = list(range(len(costs)))
    random.Random(seed).shuffle(order)
    taken: list[int] = []
    room = tokens
    for at in order:
        if costs[at] <= room or not taken:
            taken.append(at)
            room -= costs[at]
    return sorted(taken)


def _answers(
    tokenizer: Any, chats: Sequence[Chat], weights: Weights, writing: Writing, *, fits: bool
) -> tuple[list[list[int]], str | None]:
    """Token ids behind every prompt, and the digest of the trace if the source wrote some of them."""
    asked = [chat for chat in chats if chat.response is None]
    written: list[list[int]] = [[] for _ in asked]
    trace = None
    if asked and fits:
        written, about = write_answers(
            weights, asked, writing.cache,
            max_new_tokens=writing.max_new_tokens, device=writing.device, dtype=writing.dtype, batch=writing.batch,
        )  # fmt: skip
        trace = str(about["trace"])
    end = protocols.end_of_turn(tokenizer) if len(asked) < len(chats) else []
    own = iter(written)
    found = []
    for chat in chats:
        found.append(
            next(own) if chat.response is None else [*protocols.encode(tokenizer, chat.response.strip()), *end]
        )
    return found, trace


def _whose(chats: Sequence[Chat], *, fits: bool) -> str:
    if not chats:
        return "none"
    kinds = {("written by the source" if fits else "left out, the source does not fit") if c.response is None else "given"
             for c in chats}  # fmt: skip
    return " and ".join(sorted(kinds))


def _rows(tokens: Sequence[list[int]], names: Sequence[str], tokenizer: Any) -> Rows:
    import numpy as np

    ids = [np.array(row[:LONGEST], np.int32) for row in tokens]
    kept = [at for at, row in enumerate(ids) if len(row) > 1]
    if not kept:
        raise SourceError(
            "nothing to calibrate on", where="--calibration", todo='a base model needs lines of {"text": ...}'
        )
    scored = [np.arange(len(ids[at])) < len(ids[at]) - 1 for at in kept]
    facts = protocols.tokenizer_facts(tokenizer)
    return Rows("calibration", 1, [ids[at] for at in kept], scored, [names[at] for at in kept], facts)


def text_hashes(text: str) -> set[str]:
    """What a text is recognised by: hashes of its paragraphs, case and spaces apart; of the whole if it has none long enough."""
    whole = _normal(text)
    long = [normal for line in text.splitlines() if len(normal := _normal(line)) >= _PARAGRAPH]
    return {_digest(normal) for normal in long or [whole] if normal}


def chat_hashes(chat: Chat) -> set[str]:
    """What a chat is recognised by: the whole of what its user says last, and its paragraphs."""
    return prompt_hashes(chat.messages[-1]["content"])


def prompt_hashes(prompt: str) -> set[str]:
    """As `chat_hashes`, of the prompt alone."""
    return text_hashes(prompt) | {_digest(_normal(prompt))}


def shared_documents(documents: Iterable[tuple[str, set[str]]], known: Sequence[str]) -> list[str]:
    """Names of those (name, hashes) of which a hash is in `known`."""
    there = set(known)
    return [name for name, hashes in documents if hashes & there]


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _digest(normal: str) -> str:
    return hashlib.sha256(normal.encode()).hexdigest()[:_HASH_DIGITS]
