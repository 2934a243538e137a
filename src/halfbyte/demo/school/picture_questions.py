"""Questions about drawn pictures: what, which colour, how many, which digit, where, what is on the left.

Same rules as `questions`: exact answers, endless, seeded, and a held-out tenth by the hash of the content. Here the content
key is the scene without its last pixels: kinds, colours, cells and background. A held-out picture therefore differs from
every training picture in something one can name, not only in a shift by a pixel.

Figures live in the cells of a 3 x 3 grid with a little jitter, so they never overlap.

Which of two figures is on the left (kind `side`) is taught with the rest and examined apart: in 8,000 steps the model of the
pair learned where a single figure is, and not which of two is where (docs/log.md). Its score is printed beside the others'.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfbyte.demo.school.pictures import BACKGROUNDS, PALETTE, SHAPES, Figure, Scene
from halfbyte.demo.school.questions import Item, a_

CELL = 128
ROWS = {0: "top", 2: "bottom"}
COLUMNS = {0: "left", 2: "right"}


Family = Callable[[random.Random], "PictureItems"]


@dataclass(frozen=True)
class PictureItems:
    """One scene and everything that is asked about it; all items share the scene's held-out bit."""

    scene: Scene
    items: tuple[Item, ...]


def draw_picture(rng: random.Random, *, held_out: bool) -> PictureItems:
    """One scene with its questions from a random family, from the training or from the held-out part."""
    family = rng.choice(FAMILIES)
    while True:
        drawn = family(rng)
        if drawn.items[0].held_out == held_out:
            return drawn


def draw_picture_questions(
    seed: int, n: int, *, held_out: bool, families: Sequence[Family] | None = None
) -> list[tuple[Scene, Item]]:
    """`n` pictures with one question each, families (default: EXAMINED) in turn, no content twice."""
    families = families or EXAMINED
    rng = random.Random(seed)
    found: dict[str, tuple[Scene, Item]] = {}
    turn = 0
    while len(found) < n:
        drawn = families[turn % len(families)](rng)
        key = drawn.items[0].key
        if drawn.items[0].held_out == held_out and key not in found:
            found[key] = (drawn.scene, rng.choice(drawn.items))
        turn += 1
    return list(found.values())


def _figure(rng: random.Random, cell: tuple[int, int], kind: str, colour: str) -> Figure:
    radius = rng.randint(34, 50)
    shift = 62 - radius
    x, y = (CELL * c + CELL // 2 + rng.randint(-shift, shift) for c in cell)
    return Figure(kind, x, y, radius, colour)


def _scene(rng: random.Random, placed: list[tuple[tuple[int, int], str, str]]) -> tuple[Scene, str]:
    """The scene of (cell, kind, colour) triples, and its content key."""
    background = rng.randrange(len(BACKGROUNDS))
    scene = Scene(background, tuple(_figure(rng, *figure) for figure in placed))
    return scene, f"{background} " + " ".join(f"{x}{y}{kind}{colour}" for (x, y), kind, colour in sorted(placed))


def _cells(rng: random.Random, n: int) -> list[tuple[int, int]]:
    return rng.sample([(x, y) for x in range(3) for y in range(3)], n)


def _one(rng: random.Random) -> PictureItems:
    kind, colour = rng.choice(SHAPES), rng.choice(list(PALETTE))
    scene, key = _scene(rng, [(_cells(rng, 1)[0], kind, colour)])
    asked = (
        (
            rng.choice(("What is in this image?", "What do you see?", "Describe the image.")),
            f"{a_(f'{colour} {kind}').capitalize()}.",
        ),
        (rng.choice(("What colour is the shape?", "Which colour do you see?")), f"{colour.capitalize()}."),
        (rng.choice(("What shape is it?", "Which shape do you see?")), f"{a_(kind).capitalize()}."),
    )
    return PictureItems(scene, tuple(Item("what", key, prompt, answer) for prompt, answer in asked))


def _digit(rng: random.Random) -> PictureItems:
    digit, colour = str(rng.randrange(10)), rng.choice(list(PALETTE))
    scene, key = _scene(rng, [(_cells(rng, 1)[0], digit, colour)])
    asked = (
        (rng.choice(("Which digit is shown?", "Which number do you see?", "Read the digit.")), digit),
        ("What colour is the digit?", f"{colour.capitalize()}."),
    )
    return PictureItems(scene, tuple(Item("digit", key, prompt, answer) for prompt, answer in asked))


def _how_many(rng: random.Random) -> PictureItems:
    n = rng.randint(1, 6)
    kinds = rng.sample(SHAPES, 2)
    placed = [(cell, rng.choice(kinds), rng.choice(list(PALETTE))) for cell in _cells(rng, n)]
    scene, key = _scene(rng, placed)
    of = {kind: sum(figure[1] == kind for figure in placed) for kind in kinds}
    asked = [(rng.choice(("How many shapes are there?", "Count the shapes.")), str(n))]
    asked += [(f"How many {kind}{'es' if kind == 'cross' else 's'} are there?", str(of[kind])) for kind in kinds]
    return PictureItems(scene, tuple(Item("how many", key, prompt, answer) for prompt, answer in asked))


def _place(rng: random.Random) -> PictureItems:
    """One figure and where it is, by rows and columns of the grid."""
    kind, colour, (x, y) = rng.choice(SHAPES), rng.choice(list(PALETTE)), _cells(rng, 1)[0]
    scene, key = _scene(rng, [((x, y), kind, colour)])
    where = " ".join(word for word in (ROWS.get(y), COLUMNS.get(x)) if word)
    answer = f"At the {where}." if where else "In the middle."
    asked = (rng.choice((f"Where is the {kind}?", "Where is the shape?", f"Where do you see the {kind}?")), answer)
    return PictureItems(scene, (Item("position", key, *asked),))


def _pair(rng: random.Random) -> PictureItems:
    """Two figures, side by side or one above the other, and which is where."""
    across = rng.random() < 0.5
    lane, (low, high) = rng.randrange(3), sorted(rng.sample(range(3), 2))
    cells = [(low, lane), (high, lane)] if across else [(lane, low), (lane, high)]
    words = rng.sample([(kind, colour) for kind in SHAPES for colour in PALETTE], 2)
    scene, key = _scene(rng, [(cell, *word) for cell, word in zip(cells, words, strict=True)])
    first, second = (f"{colour} {kind}" for kind, colour in words)
    before, after = ("on the left", "on the right") if across else ("at the top", "at the bottom")
    asked = (
        (f"Which shape is {before}?", f"The {first}."),
        (f"Which shape is {after}?", f"The {second}."),
        (f"What colour is the shape {before}?", f"{words[0][1].capitalize()}."),
        (f"What colour is the shape {after}?", f"{words[1][1].capitalize()}."),
    )
    return PictureItems(scene, tuple(Item("side", key, prompt, answer) for prompt, answer in asked))


EXAMINED: tuple[Family, ...] = (_one, _digit, _how_many, _place)
APART: tuple[Family, ...] = (_pair,)
#: what is taught
FAMILIES = EXAMINED + APART
