"""Held-out questions and drawn pictures as files: what `halfbyte evaluate` reads, as `--data` and as `--task questions=FILE`.

One line a question, {"id", "kind", "prompt", "answer"} and perhaps "image"; kind is `text` or `picture`, so the two are counted
apart. The pictures lie beside the file as PNG.
"""

from __future__ import annotations

import json
from pathlib import Path

from halfbyte.demo.school.held_out import SEED
from halfbyte.demo.school.picture_questions import draw_picture_questions
from halfbyte.demo.school.pictures import picture
from halfbyte.demo.school.questions import draw_questions
from halfbyte.records import write_text_atomic


def write_exam(folder: Path, texts: int, pictures: int) -> Path:
    """The first held-out questions as `folder`/questions.jsonl and PNG files; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, item in enumerate(draw_questions(SEED, texts, held_out=True), start=1):
        lines.append({"id": f"{item.kind} {number}", "kind": "text", "prompt": item.prompt, "answer": item.answer})
    for number, (scene, item) in enumerate(draw_picture_questions(SEED, pictures, held_out=True), start=1):
        name = f"picture-{number}.png"
        picture(scene).save(folder / name)
        body = {"id": f"{item.kind} picture {number}", "kind": "picture", "prompt": item.prompt, "answer": item.answer}
        lines.append({**body, "image": name})
    path = folder / "questions.jsonl"
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path
