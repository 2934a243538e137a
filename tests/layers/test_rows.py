"""Rows: masks, batches and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from layers.small_rows import random_rows

from halfbyte.errors import SourceError
from halfbyte.layers.rows import load_rows


def test_batches_hold_every_prediction_once_with_its_label() -> None:
    rows = random_rows(10, 90)
    seen = [
        (int(row), int(position), int(label))
        for batch in rows.batches(2)
        for row, position, label in zip(batch.rows, batch.scored[1], batch.labels, strict=True)
    ]
    expected = [
        (row, position, int(ids[position + 1]))
        for row, (ids, mask) in enumerate(zip(rows.tokens, rows.scored, strict=True))
        for position in np.flatnonzero(mask)
    ]
    assert sorted(seen) == sorted(expected)
    assert len(seen) == rows.n == 93


def test_batches_are_longest_first_and_padded_on_the_right() -> None:
    batches = random_rows(10, 90).batches(2)
    assert [batch.tokens.shape for batch in batches] == [(2, 40), (2, 23), (1, 5)]
    assert (batches[1].tokens[1, 9:] == 0).all()
    assert (batches[1].tokens[1, :9] >= 10).all()


def test_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = replace(random_rows(10, 90), facts={"window": 40}, texts=["é"] * 5)
    rows.save(tmp_path / "rows.npz")
    again = load_rows(tmp_path / "rows.npz")
    assert again.digest == rows.digest
    assert again.facts == rows.facts
    assert again.texts == rows.texts
    assert all(np.array_equal(a, b) for a, b in zip(again.tokens, rows.tokens, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(again.scored, rows.scored, strict=True))


def test_digest_feels_every_part() -> None:
    rows = random_rows(10, 90)
    moved = [mask.copy() for mask in rows.scored]
    moved[0][0] = False
    others = [
        replace(rows, scored=moved), replace(rows, documents=list("abcde")), replace(rows, version=2),
        replace(rows, protocol="other"), random_rows(10, 90, seed=1),
    ]  # fmt: skip
    assert len({rows.digest, *(other.digest for other in others)}) == 6
    assert replace(rows, facts={"x": 1}).digest == rows.digest


def test_altered_or_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    random_rows(10, 90).save(path)
    parts = dict(np.load(path))
    parts["tokens"][0] += 1
    np.savez(path, **parts)
    with pytest.raises(SourceError, match="digest"):
        load_rows(path)
    path.write_bytes(b"something else")
    with pytest.raises(SourceError, match="not a file of rows"):
        load_rows(path)
