"""Pictures of our own for calibration: drawn by arithmetic from a seed, so there is no licence to ask about and nothing to ship.

What they are for: soft tokens that reach the language model, in sizes and with contents that differ. They are no photographs. What a
vision tower hands on from a photograph has other statistics, so somebody who has pictures like those in use should give them
(`--calibration FILE` with "image" in its lines).

    figures   up to seven discs, boxes and slabs of drawn colours on a plain ground
    stripes   bands of two colours at a slant
    bars      a chart: bars of drawn heights on a line
    waves     two colours that flow into one another

Nothing of the demo's school (halfbyte.demo.school.pictures) is used, neither sizes nor colours nor questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: width and height in pixels
SIZES = ((320, 240), (448, 448), (256, 384), (512, 288))
QUESTIONS = {
    "figures": ("Describe this picture.", "How many objects can you count here?", "Which colours appear in this picture?"),
    "stripes": ("What pattern is this?", "Which two colours make up this pattern?"),
    "bars": ("What kind of chart is this?", "Which bar is the tallest?", "How many bars does the chart have?"),
    "waves": ("What does this picture remind you of?", "Describe the colours of this picture in one sentence."),
}  # fmt: skip
_SEED = 20_261_124


def draw_pictures(folder: Path, count: int) -> list[tuple[str, str, Path]]:
    """`count` pictures as PNG files in `folder`, kinds in turn: (kind, question, file) each; always the same ones."""
    from PIL import Image

    rng = random.Random(_SEED)
    found = []
    for number in range(count):
        kind = tuple(QUESTIONS)[number % len(QUESTIONS)]
        pixels = _KINDS[kind](rng, *rng.choice(SIZES))
        path = folder / f"drawn-{number + 1}.png"
        Image.fromarray(pixels).save(path)
        found.append((kind, rng.choice(QUESTIONS[kind]), path))
    return found


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _ground(rng: random.Random, width: int, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 [height, width, 3] of one colour, and each pixel's row and column."""
    import numpy as np

    rows, columns = np.mgrid[:height, :width]
    return np.full((height, width, 3), _colour(rng), np.uint8), rows, columns


def _figures(rng: random.Random, width: int, height: int) -> np.ndarray:
    canvas, rows, columns = _ground(rng, width, height)
    for _ in range(rng.randint(1, 7)):
        y, x, size = rng.randrange(height), rng.randrange(width), rng.randint(height // 12, height // 4)
        v, u = abs(rows - y), abs(columns - x)
        inside = rng.choice(
            (u * u + v * v <= size * size, (u <= size) & (v <= size), (2 * u <= size) & (v <= 2 * size))
        )
        canvas[inside] = _colour(rng)
    return canvas


def _stripes(rng: random.Random, width: int, height: int) -> np.ndarray:
    canvas, rows, columns = _ground(rng, width, height)
    across, down, period = rng.randint(-3, 3), rng.randint(1, 3), rng.randint(20, 120)
    canvas[(across * columns + down * rows) % period < period // 2] = _colour(rng)
    return canvas


def _bars(rng: random.Random, width: int, height: int) -> np.ndarray:
    canvas, rows, columns = _ground(rng, width, height)
    count = rng.randint(2, 8)
    slot = width // (count + 1)
    for bar in range(count):
        left, tall = slot // 2 + bar * slot, rng.randint(height // 8, height * 3 // 4)
        canvas[(columns >= left) & (columns < left + slot * 2 // 3) & (rows >= height * 7 // 8 - tall) & (rows < height * 7 // 8)] = _colour(rng)  # fmt: skip
    canvas[abs(rows - height * 7 // 8) < 2] = 0
    return canvas


def _waves(rng: random.Random, width: int, height: int) -> np.ndarray:
    import numpy as np

    canvas, rows, columns = _ground(rng, width, height)
    other = np.array(_colour(rng), np.float64)
    share = (
        1 + np.sin(columns * rng.uniform(0.005, 0.05) + np.sin(rows * rng.uniform(0.005, 0.05)) * rng.uniform(0.5, 4))
    ) / 2
    return (canvas * (1 - share[..., None]) + other * share[..., None]).astype(np.uint8)


_KINDS: dict[str, Callable[[random.Random, int, int], np.ndarray]] = {
    "figures": _figures, "stripes": _stripes, "bars": _bars, "waves": _waves,
}  # fmt: skip
