"""Texts to be scored, from the files people have: WikiText, plain text, chats as JSON lines.

Every text becomes documents with a name, because documents are what the statistics resample.

WikiText is stored tokenized (" @-@ ", " , "), which no model was trained on; the field scores it detokenized by the rules of
lm-eval, in their order, one article at a time. One of the rules is a known bug, kept because every published figure has it: a lone
" N " becomes " 1 ".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError

ARTICLE = re.compile(r"(?m)^(?= = [^=].* = $)")
HEADING = re.compile(r" = .* = ")
REPLACED_FIRST = {"s '": "s'", " @-@ ": "-", " @,@ ": ",", " @.@ ": "."}
REPLACED_LAST = {
    "= = = =": "====", "= = =": "===", "= =": "==", " ° ": "°", " \n": "\n", "\n ": "\n", " N ": " 1 ", " 's": "'s",
}  # fmt: skip
ENCLOSING = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Document:
    """One text and its name. `words` and `bytes` count what stands in the file, before detokenizing."""

    name: str
    text: str
    words: int
    bytes: int


@dataclass(frozen=True)
class Chat:
    """A conversation up to the answer, and the answer if one is given.

    messages  {"role", "content"} each, the last of them the user's
    response  what the assistant says next; None: the reference has to write it
    """

    name: str
    messages: tuple[Mapping[str, str], ...]
    response: str | None


def detokenize(article: str) -> str:
    """Undo WikiText's tokenization by lm-eval's rules, in its order."""
    for old, new in REPLACED_FIRST.items():
        article = article.replace(old, new)
    for mark in ":;.!?,":
        article = article.replace(f" {mark} ", f"{mark} ")
    for first, last in ENCLOSING:
        inside = rf"{re.escape(first)}\s*([^{re.escape(last)}]*?)\s*{re.escape(last)}"
        article = re.sub(inside, rf"{first}\1{last}", article)
    for old, new in REPLACED_LAST.items():
        article = article.replace(old, new)
    return article


def wikitext_articles(raw: str, where: str = "WikiText") -> list[Document]:
    """The articles of WikiText's raw form, detokenized one by one, in order.

    Joined without a separator they are the whole text. raises SourceError if it does not start with an article's heading
    """
    preamble, *articles = ARTICLE.split(raw)
    if preamble.strip() or not articles:
        raise SourceError("no article heading ` = Title = ` on top", where=where, todo="give WikiText's wiki.test.raw")
    return [_document(f"article {number}", article) for number, article in enumerate(articles, start=1)]


def wikitext_paragraphs(raw: str) -> list[Document]:
    """The paragraphs (lines that are no headings) of WikiText's raw form, detokenized one by one, in order."""
    lines = [line for line in raw.split("\n") if line.strip() and not HEADING.fullmatch(line)]
    return [_document(f"paragraph {number}", line) for number, line in enumerate(lines, start=1)]


def read_paragraphs(path: Path) -> list[Document]:
    """The paragraphs of a WikiText file, [] of any other text: its lines would be none. raises SourceError as above."""
    text = _read(path)
    pieces = ARTICLE.split(text, 1)
    return wikitext_paragraphs(text) if len(pieces) > 1 and not pieces[0].strip() else []


def _document(name: str, raw: str) -> Document:
    return Document(name, detokenize(raw), len(raw.split()), len(raw.encode()))


def read_documents(path: Path) -> list[Document]:
    """Documents of a text file: WikiText's articles if it begins like WikiText, else the whole file as one.

    raises SourceError if it cannot be read
    """
    text = _read(path)
    if len(pieces := ARTICLE.split(text, 1)) > 1 and not pieces[0].strip():
        return wikitext_articles(text, str(path))
    return [Document(path.name, text, len(text.split()), len(text.encode()))]


def read_chats(path: Path, limit: int | None = None) -> list[Chat]:
    """Chats of a JSON-lines file, the first `limit` of them.

    A line is {"prompt": str, "response": str (optional)} or {"messages": [{"role", "content"}, ...]}; of messages that end
    with the assistant's, that one is the response. `id` or `key` becomes the name. A line with an "image" is none of ours
    (halfbyte.texts.vision.prompts).
    raises SourceError, naming the line
    """
    chats: list[Chat] = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if limit is not None and len(chats) >= limit:
            break
        if line.strip() and not shows_picture(line):
            chats.append(read_chat(line, f"{path}, line {number}", str(number)))
    if not chats:
        raise SourceError("no chats in it", where=str(path), todo='give lines of {"prompt": ..., "response": ...}')
    return chats


def shows_picture(line: str) -> bool:
    """Whether a line is a JSON object with an "image"."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body.get("image") is not None


def read_chat(line: str, where: str, number: str) -> Chat:
    try:
        body = json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceError(f"not JSON ({error})", where=where, todo="one JSON object a line") from None
    if not isinstance(body, dict):
        raise SourceError("not a JSON object", where=where, todo='write {"prompt": ..., "response": ...}')
    name = str(body.get("id", body.get("key", number)))
    if isinstance(body.get("prompt"), str):
        response = body.get("response")
        if response is not None and not isinstance(response, str):
            raise SourceError("its response is not a string", where=where, todo="write the answer as one string")
        return Chat(name, ({"role": "user", "content": body["prompt"]},), response)
    messages = _messages(body.get("messages"), where)
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise SourceError("an answer to nothing", where=where, todo="put a user's message before it")
        return Chat(name, messages[:-1], messages[-1]["content"])
    return Chat(name, messages, None)


def _messages(found: Any, where: str) -> tuple[Mapping[str, str], ...]:
    def plain(message: Any) -> bool:
        return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)

    if not isinstance(found, list) or not found or not all(map(plain, found)):
        raise SourceError(
            "neither a prompt nor messages of role and content", where=where, todo=f"roles are {', '.join(ROLES)}"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in found)


def words_and_bytes(documents: Sequence[Document]) -> dict[str, int]:
    """What perplexity per word or byte is normalized by."""
    return {"words": sum(d.words for d in documents), "bytes": sum(d.bytes for d in documents)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot be read as UTF-8 ({error})", where=str(path), todo="name a text file") from None
