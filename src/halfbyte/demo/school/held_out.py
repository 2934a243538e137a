"""How many held-out answers a model in memory gets exactly right: the examination after training.

A greedy answer equals the expected one exactly when every token of the expected answer (and the end of the turn) is the
most probable one given those before it. So one forward pass over the expected answers decides what generation would, up to
the arithmetic of a cached step. `halfbyte evaluate` generates; this is the trainer's quick look, and it says so in its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from halfbyte.demo.school.lessons import Frame, join, picture_batch, to_device
from halfbyte.demo.school.picture_questions import APART, EXAMINED, draw_picture_questions
from halfbyte.demo.school.questions import draw_questions
from halfbyte.trainer.losses import Batch, scored_logits
from halfbyte.trainer.rows import Row, collate

SEED = 7


def examine(model: Any, tokenizer: Any, *, texts: int, pictures: int, device: str, size: int = 64) -> dict[str, Any]:
    """{"text": {"n", "right", "kinds": {kind: [right, n]}}, "image": ..., "apart": ...} over the first held-out questions.

    apart  what is taught and was not learned (`picture_questions`), over a quarter as many pictures
    """
    frame = Frame(tokenizer)
    asked = draw_questions(SEED, texts, held_out=True)
    rows = [join([frame.turn(item.prompt, item.answer)], frame) for item in asked]
    right: list[bool] = []
    for at in range(0, texts, size):
        part = rows[at : at + size]
        right += _exact(model, part, collate(part, frame.pad), device)
    found = {"text": _tally(right, [item.kind for item in asked])}
    for area, families, n in (("image", EXAMINED, pictures), ("apart", APART, max(1, pictures // 4))):
        shown = draw_picture_questions(SEED, n, held_out=True, families=families)
        right = []
        for at in range(0, n, size):
            scenes = [scene for scene, _ in shown[at : at + size]]
            part = [join([frame.turn(q.prompt, q.answer, image=True)], frame) for _, q in shown[at : at + size]]
            right += _exact(model, part, picture_batch(part, scenes, frame), device)
        found[area] = _tally(right, [item.kind for _, item in shown])
    return found


def _exact(model: Any, rows: Sequence[Row], batch: Batch, device: str) -> list[bool]:
    moved = to_device(batch, device)
    with torch.inference_mode():
        hits = (scored_logits(model, moved).argmax(-1) == moved["targets"]).tolist()
    found, at = [], 0
    for row in rows:
        n = sum(row.scored[1:])
        found.append(all(hits[at : at + n]))
        at += n
    return found


def _tally(right: Sequence[bool], kinds: Sequence[str]) -> dict[str, Any]:
    by_kind = {kind: [0, 0] for kind in dict.fromkeys(kinds)}
    for ok, kind in zip(right, kinds, strict=True):
        by_kind[kind][0] += ok
        by_kind[kind][1] += 1
    return {"n": len(right), "right": sum(right), "kinds": by_kind}
