"""Questions of one's own, with or without a picture: JSON lines of {"id", "kind", "prompt", "answer"} and perhaps "image".

    {"id": "7", "kind": "counting", "prompt": "How many circles? Answer with a number.", "answer": "3", "image": "7.png"}

Exact match by `answers.normalise`: case, white space and one full stop are forgiven, nothing else. Ask so that a short answer is
natural.

An image is a plain name relative to the folder of the file: whoever sends a folder of questions must not be able to show a model the
rest of the disk. So no absolute path, no "..", no link that leads out, and the header decides about size before a pixel is decoded: a
10 kB PNG can claim 10^10 of them. Its sha256 is part of what the answers are kept under.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from halfbyte.errors import SourceError, UnsafeName
from halfbyte.evaluator.answers import normalise
from halfbyte.evaluator.tasks.lines import Entry, about, read_lines, unique
from halfbyte.evaluator.tasks.task import Item, Task
from halfbyte.records import digest

VERSION, MAX_NEW_TOKENS = 1, 32
RULE = "exact match; case, white space and one full stop are forgiven"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_IMAGE_BYTES, MAX_PIXELS = 16 << 20, 20_000_000


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
    path = None if image is None else _image(entry, folder, image)
    return Item(entry.name("id"), entry.name("kind"), entry.text("prompt"), path, normalise(entry.text("answer")))


def _image(entry: Entry, folder: Path, name: object) -> Path:
    """The checked file of an image."""
    if not isinstance(name, str) or not name or len(name) > 400 or any(mark in name for mark in "\\\0:"):
        raise UnsafeName(f"{name!r:.120} is not the name of an image", where=entry.where, todo="a file beside it")
    parts = PurePosixPath(name)
    path = (folder / name).resolve()
    if parts.is_absolute() or ".." in parts.parts or not path.is_relative_to(folder.resolve()):
        raise UnsafeName(f"image {name[:120]!r} lies outside its folder", where=entry.where, todo="a file beside it")
    if not path.is_file():
        raise entry.wrong(f"image {name[:120]!r} is not there", "put it beside the questions")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise entry.wrong(f"image {name[:120]!r} is larger than {MAX_IMAGE_BYTES >> 20} MiB", "make it smaller")
    _check_header(entry, path)
    return path


def _check_header(entry: Entry, path: Path) -> None:
    """Raises SourceError unless it is an image of FORMATS and of at most MAX_PIXELS; decodes nothing."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(
            f"image {path.name!r} cannot be read ({error})", where=entry.where, todo=f"use one of {', '.join(FORMATS)}"
        ) from None
    if width * height > MAX_PIXELS:
        raise entry.wrong(
            f"image {path.name!r} of {width} x {height} exceeds {MAX_PIXELS // 10**6} million pixels", "scale it down"
        )
