"""Calibration: the texts whose activations say which weights matter, as rows of tokens in the model's own frame.

    builtin      prompts and passages that come with the package (built_in/SOURCES.md: whose, under which licence), and drawn pictures
    FILE.jsonl   a line is {"prompt"[, "response"]}, {"messages"}, {"text"} or {"prompt", "image"[, "answer"]}
    other FILE   a text, WikiText's raw form article by article

A model is calibrated on what it will see. With a chat template: prompts in the turn frame, each with its answer; an answer
that is not given is written by the source itself (greedy, `traces`), since its own words are what it will read back in use.
Texts stand inside the assistant's turn, as in `ppl[assistant-frame]`. A base model gets texts alone, a <bos> in front if it has one.

Which prompts and windows are taken is drawn from the seed, up to a number of tokens; so a smaller set is a mixture too.

A figure measured on calibration text flatters. So every document's hashes are kept in the record, paragraph by paragraph (the same
article cut elsewhere has other windows, but the same paragraphs), and `halfbyte evaluate` refuses text that it finds among them.

A model that takes pictures is shown some (halfbyte.texts.vision.shown): a file's in the same lottery, our own up to a share; to any other model lines with an image are
left out and counted. A picture is known by the hash of its pixels, for its question ("What is this?") says nothing.

The catch: the source writes answers whole, not layer by layer. Where it does not fit, prompts stand without them, and the record
says so.
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
from halfbyte.texts.vision.prompts import PicturePrompt, read_picture_prompts
from halfbyte.texts.vision.shown import MixedRows, Pictures, pictures_for

if TYPE_CHECKING:
    from halfbyte.layers.weights import Weights

BUILT_IN = "builtin"
#: pictures in the built-in set, and how much of the tokens they may take. Fitted to text alone, the demo's model lost more on pictures than
#: by rounding (docs/method.md), and a lottery by rows gave them 3 %
DRAWN, PICTURE_SHARE = 64, 0.25
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
    pictures  questions about images
    drawn     pictures of our own to show beside them
    """

    name: str
    sha256: str
    chats: Sequence[Chat]
    documents: Sequence[Document]
    pictures: Sequence[PicturePrompt] = ()
    drawn: int = 0


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
    sha256 = _hash(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"cannot be read as UTF-8 ({error})", where=str(path), todo="name a text file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or shows_picture(line):
            continue
        if (document := _document(line, number)) is not None:
            documents.append(document)
        else:
            chats.append(read_chat(line, f"{path}, line {number}", str(number)))
    pictures = read_picture_prompts(path)
    if not chats and not documents and not pictures:
        raise SourceError("no text in it", where=str(path), todo='give lines of {"prompt": ...} or {"text": ...}')
    return Calibration(name, sha256, chats, documents, pictures, DRAWN if name == BUILT_IN else 0)


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
    tokenizer = protocols.load_tokenizer(weights)
    instruct = protocols.is_instruct(tokenizer)
    shown = (
        pictures_for(weights, texts.pictures, texts.drawn, seed, writing)
        if instruct
        else Pictures(left_out=len(texts.pictures))
    )
    try:
        return _Drawing(texts, weights, tokenizer, instruct, shown, writing).draw(tokens, seed)
    finally:
        shown.close()


@dataclass(frozen=True, eq=False)
class _Drawing:
    """What a calibration is to one model: chats, windows of texts and pictures, in this order, to draw from."""

    texts: Calibration
    weights: Weights
    tokenizer: Any
    instruct: bool
    shown: Pictures
    writing: Writing

    def draw(self, tokens: int, seed: int) -> tuple[Rows, dict[str, Any]]:
        """See `calibration_rows`."""
        from halfbyte.layers.streaming import must_stream

        windows = _windows(self.texts, self.tokenizer, self.instruct)
        asked = self.texts.chats if self.instruct else ()
        prompts = [protocols.prompt_ids(self.tokenizer, chat.messages) for chat in asked]
        first, end = len(prompts), len(prompts) + len(windows)
        costs = [self._cost(len(p), chat.response) for p, chat in zip(prompts, asked, strict=True)]
        costs += [len(ids) for _, ids in windows]
        taken = self._take(costs, tokens, seed)
        chats = [asked[at] for at in taken if at < first]
        texts = [windows[at - first] for at in taken if first <= at < end]
        pictures = [at - end for at in taken if at >= end]
        given = [chat.response for chat in chats] + [self.shown.prompts[at].answer for at in pictures]
        fits = None not in given or not must_stream(self.weights, self.writing.device, self.writing.dtype)
        answers, trace = _answers(self.tokenizer, chats, self.weights, self.writing, fits=fits)
        rows = [[*prompts[at], *answer] for at, answer in zip((at for at in taken if at < first), answers, strict=True)]
        rows += [ids for _, ids in texts]
        names = [chat.name for chat in chats] + [document.name for document, _ in texts]
        plain = [(row[:LONGEST], name, None) for row, name in zip(rows, names, strict=True)]
        seen, inputs, picture_trace = self.shown.rows(pictures, self.weights, self.writing, fits=fits)
        names = [self.shown.prompts[at].name for at in pictures]
        made = _rows([*plain, *zip(seen, names, inputs, strict=True)], self.tokenizer)
        documents = {id(document): document for document, _ in texts}.values()
        hashes = {h for chat in chats for h in chat_hashes(chat)} | {h for d in documents for h in text_hashes(d.text)}
        return made, {
            "name": self.texts.name, "sha256": self.texts.sha256, "rows": len(made.tokens), "tokens": sum(map(len, made.tokens)),
            "rows_digest": made.digest, "chats": len(chats), "texts": len(documents), "instruct": self.instruct, "seed": seed,
            "answers": _whose(given, fits=fits), "trace": trace, "text_only": not pictures,
            "pictures": len(pictures), "picture_tokens": sum(map(len, seen)), "picture_trace": picture_trace,
            "pictures_left_out": self.shown.left_out, "hashes": sorted(hashes | self.shown.hashes(pictures)),
        }  # fmt: skip

    def _take(self, costs: Sequence[int], tokens: int, seed: int) -> list[int]:
        """Places of what is drawn; `costs` are of texts. Pictures of a file are in the same lottery, ours have a share of their own."""
        shown = [self._cost(n, one.answer) for n, one in zip(self.shown.lengths, self.shown.prompts, strict=True)]
        if not self.texts.drawn:
            return _draw([*costs, *shown], tokens, seed)
        first = _draw(shown, int(PICTURE_SHARE * tokens), seed)
        texts = _draw(costs, tokens - sum(shown[at] for at in first), seed)
        return [*texts, *(len(costs) + at for at in first)]

    def _cost(self, prompt: int, answer: str | None) -> int:
        """Tokens that a row will take at most, roughly where the answer is given."""
        return prompt + (self.writing.max_new_tokens if answer is None else len(answer) // 3)


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
    return protocols.answer_ids(tokenizer, [chat.response for chat in chats], written), trace


def _whose(given: Sequence[str | None], *, fits: bool) -> str:
    if not given:
        return "none"
    kinds = {("written by the source" if fits else "left out, the source does not fit") if answer is None else "given"
             for answer in given}  # fmt: skip
    return " and ".join(sorted(kinds))


def _rows(made: Sequence[tuple[list[int], str, Any]], tokenizer: Any) -> Rows:
    """Of (token ids, document, a picture's arguments or None): every position counts but the last."""
    import numpy as np

    kept = [(np.array(row, np.int32), name, inputs) for row, name, inputs in made if len(row) > 1]
    if not kept:
        raise SourceError(
            "nothing to calibrate on", where="--calibration", todo='a base model needs lines of {"text": ...}'
        )
    ids, names, inputs = [k[0] for k in kept], [k[1] for k in kept], [k[2] for k in kept]
    scored = [np.arange(len(row)) < len(row) - 1 for row in ids]
    facts = protocols.tokenizer_facts(tokenizer)
    if all(each is None for each in inputs):
        return Rows("calibration", 1, ids, scored, names, facts)
    return MixedRows("calibration", 1, ids, scored, names, facts, None, inputs)


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
