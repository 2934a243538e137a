"""Questions about pictures, from a JSON-lines file and the image files beside it.

    {"id": "c1", "kind": "counting", "prompt": "How many circles?", "image": "c1.png", "answer": "3"}

`id` and `kind` may be left out, and so may `answer`: a reference writes its own, a task that marks answers needs one. A line
without "image" is no question about a picture and is left to the reader of chats (halfbyte.texts.reading), so one file may hold both.

Such files come from strangers: an image lies in the same folder or below it, and is small by its header (halfbyte.images). All of it is
checked when the file is read; every refusal names the line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError
from halfbyte.images import image_beside
from halfbyte.texts.reading import shows_picture


@dataclass(frozen=True)
class PicturePrompt:
    """One question about one picture.

    name    its id, unique in its file; the line's number if it has none
    kind    the group it is counted in
    image   a file that was there, was small enough, and is an image by its header
    answer  the right one, None if the file gives none
    """

    name: str
    kind: str
    prompt: str
    image: Path
    answer: str | None


def read_picture_prompts(path: Path) -> list[PicturePrompt]:
    """The questions about pictures in a JSON-lines file, [] if no line names an image; raises SourceError, naming the line."""
    found: list[PicturePrompt] = []
    seen: set[str] = set()
    for number, line in _lines(path):
        if not shows_picture(line):
            continue  # a chat, or nonsense: the reader of chats says which
        where = f"{path}, line {number}"
        one = _prompt(json.loads(line), path.parent, where, str(number))
        if one.name in seen:
            raise SourceError(f"the id {one.name[:80]!r} is there twice", where=where, todo="give each line its own")
        seen.add(one.name)
        found.append(one)
    return found


def has_other_lines(path: Path) -> bool:
    """Whether a line of the file is none of ours: a chat, or something that the reader of chats refuses."""
    return any(not shows_picture(line) for _, line in _lines(path)) or not _lines(path)


def _lines(path: Path) -> Sequence[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot be read as UTF-8 ({error})", where=str(path), todo="name a text file") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _prompt(body: dict[str, Any], folder: Path, where: str, number: str) -> PicturePrompt:
    for key, kinds in (("prompt", str), ("image", str), ("answer", str | None), ("id", str | int), ("kind", str)):
        missing = key not in body and key in ("answer", "id", "kind")
        if not missing and not isinstance(body.get(key), kinds):
            raise SourceError(f'its "{key}" is {str(body.get(key))[:80]!r}', where=where, todo="write a string")
    if not body["prompt"].strip():
        raise SourceError("its prompt is empty", where=where, todo="ask something")
    image = image_beside(folder, body["image"], where)
    return PicturePrompt(
        str(body.get("id", number)), body.get("kind", "picture"), body["prompt"], image, body.get("answer")
    )
