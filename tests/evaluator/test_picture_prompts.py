"""Questions about pictures: what a line may say, and what a stranger's file may not do."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from halfbyte import images
from halfbyte.errors import SourceError
from halfbyte.evaluator.job.material import gather_material
from halfbyte.images import open_image
from halfbyte.texts.vision.prompts import read_picture_prompts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "asked"
    place.mkdir()
    Image.new("RGB", (8, 6), "red").save(place / "red.png")
    Image.new("RGB", (8, 6), "red").save(tmp_path / "outside.png")
    return place


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "asked.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes whose header claims `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_a_line_is_a_question_and_its_defaults_are_named(folder: Path) -> None:
    path = write(
        folder, {"id": "c1", "kind": "colour", "prompt": "Which?", "image": "red.png", "answer": "red"}, "",
        {"prompt": "What is it?", "image": "red.png"},
    )  # fmt: skip
    full, bare = read_picture_prompts(path)
    assert (full.name, full.kind, full.prompt, full.image, full.answer) == (
        "c1", "colour", "Which?", folder / "red.png", "red",
    )  # fmt: skip
    assert (bare.name, bare.kind, bare.answer) == ("3", "picture", None)
    assert open_image(bare.image).getpixel((0, 0)) == (255, 0, 0)


def test_a_file_may_hold_pictures_and_chats_and_each_reader_takes_its_own(folder: Path) -> None:
    seen = {"id": "p", "prompt": "Which?", "image": "red.png"}
    both = gather_material([write(folder, seen, {"id": "c", "prompt": "Hello"})], None)
    assert [one.name for one in both.pictures] == ["p"]
    assert [chat.name for chat in both.chats] == ["c"]
    alone = gather_material([write(folder, seen)], None)
    assert len(alone.pictures) == 1
    assert alone.chat_files[0]["name"] == "built-in prompts"
    assert not gather_material([write(folder, {"id": "c", "prompt": "Hello"})], None).pictures
    with pytest.raises(SourceError, match=r"not JSON.*\n?.*line 2|line 2.*not JSON"):
        gather_material([write(folder, seen, "nonsense")], None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "../outside.png"}, "outside its folder|is not the name"),
        ({"image": "/etc/passwd"}, "outside its folder|is not the name"),
        ({"image": "..\\outside.png"}, "is not the name of an image"),
        ({"image": "http://evil.example/x.png"}, "is not the name of an image"),
        ({"image": ".."}, "outside its folder|is not the name"),
        ({"image": "red.png\0"}, "is not the name of an image"),
        ({"image": ""}, "is not the name of an image"),
        ({"image": "absent.png"}, "no image file 'absent.png'"),
        ({"image": "link.png"}, "outside its folder"),
        ({"image": "text.png"}, "cannot be read"),
        ({"image": "vast.png"}, "million pixels"),
        ({"image": "bomb.png"}, "cannot be read|million pixels"),
        ({"image": "heavy.png"}, "larger than"),
        ({"image": ["red.png"]}, '"image" is'),
        ({"image": "red.png", "prompt": 3}, '"prompt" is'),
        ({"image": "red.png", "prompt": "  "}, "prompt is empty"),
        ({"image": "red.png", "answer": 3}, '"answer" is'),
        ({"image": "red.png", "id": "first"}, "there twice"),
    ],
)
def test_refusals_name_the_line(
    folder: Path, line: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 10_000)
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "text.png").write_text("no image")
    (folder / "vast.png").write_bytes(claimed_png(8_000, 7_000))
    (folder / "bomb.png").write_bytes(claimed_png(100_000, 100_000))
    (folder / "heavy.png").write_bytes((folder / "red.png").read_bytes() + bytes(10_000))
    path = write(folder, {"id": "first", "prompt": "Which?", "image": "red.png"}, {"prompt": "Which?", **line})
    with pytest.raises(SourceError, match=message) as refused:
        read_picture_prompts(path)
    assert "line 2" in str(refused.value)
