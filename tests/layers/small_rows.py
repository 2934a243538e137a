"""Rows of random tokens, for tests of arithmetic that need no text."""

from __future__ import annotations

import numpy as np

from halfbyte.layers.rows import Rows


def random_rows(low: int, high: int, lengths: tuple[int, ...] = (9, 40, 23, 40, 5), seed: int = 0) -> Rows:
    """One row of each length; all but the last position count, of the second row only every other one."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(low, high, length).astype(np.int32) for length in lengths]
    scored = [np.arange(length) < length - 1 for length in lengths]
    scored[1] &= np.arange(lengths[1]) % 2 == 0
    documents = [f"document {row // 2}" for row in range(len(lengths))]
    return Rows("test", 1, tokens, scored, documents)
