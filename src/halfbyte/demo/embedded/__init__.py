"""The pair that travels with the package: one small Gemma 4, vanilla and QAT, that answers in text and about pictures.

    vanilla     taught by `halfbyte.demo.school.train_pair`
    qat         the same model distilled onto q4_0, stored as bf16 that lies on the grid: what Google calls "q4_0-unquantized"

Each folder is a checkpoint like any other, with a card that says what it can and cannot do. `scores.json` is what the
training command wrote at its end.
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("vanilla", "qat")


def embedded(name: str) -> Path:
    """The checkpoint folder of one of NAMES, inside the installed package: read it, never write into it."""
    assert name in NAMES, name
    return Path(__file__).parent / name
