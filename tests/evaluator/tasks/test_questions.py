"""Questions with pictures: graded by exact match; a file of questions cannot show a model the rest of the disk."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from halfbyte.errors import SourceError, UnsafeName, UsageError
from halfbyte.evaluator.tasks.opening import open_tasks
from halfbyte.evaluator.tasks.questions import read_questions

GOOD: dict[str, Any] = {"id": "1", "kind": "colour", "prompt": "Which colour?", "answer": "Red."}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_case_and_full_stop_are_forgiven_and_nothing_else(tmp_path: Path) -> None:
    task = read_questions(written(tmp_path, GOOD, {**GOOD, "id": 2, "kind": "text"}))
    assert [(item.id, item.kind) for item in task.items] == [("1", "colour"), ("2", "text")]
    assert [task.grade(task.items[0], text) for text in ("red", " RED. ", "It is red", "blue", "")] == [True, True] + [
        False
    ] * 3


def test_another_picture_is_another_question(tmp_path: Path) -> None:
    (tmp_path / "drawn").mkdir()
    path = written(tmp_path, {**GOOD, "image": "drawn/1.png"})
    Image.new("RGB", (8, 8), "red").save(tmp_path / "drawn" / "1.png")
    first = read_questions(path)
    assert first.items[0].image == (tmp_path / "drawn" / "1.png").resolve()
    assert first.files[1]["name"] == "1 images"
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "drawn" / "1.png")
    second = read_questions(path)
    assert (first.digest, first.files[1]["sha256"]) != (second.digest, second.files[1]["sha256"])


@pytest.mark.parametrize(
    "name", ["../out.png", "/etc/hostname", "a/../../out.png", "link.png", "linked/out.png", "http://x/1.png", "C:\\1.png", "", 7, "a\0"]
)  # fmt: skip
def test_a_picture_outside_the_folder_is_never_opened(tmp_path: Path, name: object) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(UnsafeName, match=r"outside its folder|not the name of an image") as caught:
        read_questions(written(folder, GOOD, {**GOOD, "id": 2, "image": name}))
    assert "line 2" in str(caught.value)


def test_pictures_are_judged_by_their_header(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    Image.new("1", (8000, 7000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "8.tiff")
    with (tmp_path / "heavy.png").open("wb") as file:
        file.truncate((64 << 20) + 1)
    named = {
        "bomb.png": "cannot be read|million",
        "large.png": "50 million",
        "text.png": "cannot be read",
        "8.tiff": "cannot be read",
    }
    for name, message in {**named, "heavy.png": "larger than 64 MiB", "absent.png": "there is no image file"}.items():
        with pytest.raises(SourceError, match=message):
            read_questions(written(tmp_path, {**GOOD, "image": name}))


@pytest.mark.parametrize(
    ("row", "message"),
    [({"id": "1"}, "used before"), ({"id": None}, "id is missing"), ({"id": True}, "id is True"), ({"id": "x" * 201}, "not a name"),
     ({"id": 2, "prompt": " "}, "prompt is ' '"), ({"id": 2, "answer": 3}, "answer is 3"), ({"id": 2, "kind": []}, "kind is")],
)  # fmt: skip
def test_damaged_questions_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read_questions(written(tmp_path, GOOD, {**GOOD, **row}))
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("spec", ["questions", "questions=", "=x", "arc=x", "GSM8K=x"])
def test_a_task_is_a_known_name_and_a_file(spec: str) -> None:
    with pytest.raises(UsageError, match="is not NAME=FILE"):
        open_tasks([spec])


def test_a_task_is_named_once_and_cut_from_the_front(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, {**GOOD, "id": 2}, {**GOOD, "id": 3})
    with pytest.raises(UsageError, match="named twice"):
        open_tasks([f"questions={path}", f"questions={path}"])
    (task,) = open_tasks([f"questions={path}"], limit=2, max_new_tokens=5)
    assert ([item.id for item in task.items], task.max_new_tokens) == (["1", "2"], 5)
