"""Questions of one's own, with or without a picture: JSON lines of {"id", "kind", "prompt", "answer"} and perhaps "image".

    {"id": "7", "kind": "counting", "prompt": "How many circles? Answer with a number.", "answer": "3", "image": "7.png"}

Exact match by `answers.normalise`: case, white space and one full stop are forgiven, nothing else. Ask so that a short answer is
natural.

An image lies in the folder of the file or below it (halfbyte.images). Its sha256 is part of what the answers are kept under.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from halfbyte.evaluator.answers import normalise
from halfbyte.evaluator.tasks.lines import Entry, about, read_lines, unique
from halfbyte.evaluator.tasks.task import Item, Task
from halfbyte.images import image_beside
from halfbyte.records import digest

VERSION, MAX_NEW_TOKENS = 1, 32
RULE = "exact match; case, white space and one full stop are forgiven"


def read_questions(path: Path) -> Task:
    """The task of a JSON-lines file; raises SourceError (naming the line), UnsafeName (an image elsewhere)."""
    entries = read_lines(path)
    items = [_item(entry, path.parent) for entry in entries]
    unique(zip((item.id for item in items), entries, strict=True))
    images = {item.id: hashlib.sha256(item.image.read_bytes()).hexdigest() for item in items if item.image}
    files = [about(path)]
    if images:
        total = sum(item.image.stat().st_size for item in items if item.image)
        all_of_them = {"name": f"{len(images)} images", "sha256": digest(images).partition(":")[2], "bytes": total}
        files.append(all_of_them)
    return Task("questions", VERSION, items, MAX_NEW_TOKENS, RULE, files, grade, images=images)


def grade(item: Item, answer: str) -> bool:
    """Exact match after `normalise`."""
    return bool(normalise(answer) == item.key)


def _item(entry: Entry, folder: Path) -> Item:
    image = entry.body.get("image")
    path = None if image is None else image_beside(folder, image, entry.where)
    return Item(entry.name("id"), entry.name("kind"), entry.text("prompt"), path, normalise(entry.text("answer")))
