"""Pictures drawn by arithmetic: coloured shapes and digits, with no font, no library and no antialiasing to differ.

A scene is a background and a list of figures, each `(kind, x, y, radius, colour)` in pixels of a 384 x 384 canvas. A pixel
belongs to a figure if a formula of its offset (u, v) from the centre says so: `u*u + v*v <= r*r` is a circle, `|u| + |v|
<= r` a diamond, a digit is a 5 x 7 bitmap looked up at (u, v). The same few tensor operations draw one picture on a
laptop and a batch on a GPU during training, to the same bytes.

Why 384: Gemma 4's image processor scales every picture into its budget of patches, and a square one into 24 x 24 patches
of 16 pixels for 70 soft tokens (64 are used). A picture of exactly that size passes without resampling, so what training
saw (`patches`) is what the processor will hand over later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

SIZE = 384
PATCH = 16
FIGURES = 6  # most figures in a scene
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PALETTE = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 30),
    "orange": (245, 130, 20), "purple": (140, 50, 170), "black": (20, 20, 20),
}  # fmt: skip
BACKGROUNDS = ((255, 255, 255), (235, 235, 235), (250, 240, 220), (220, 235, 245))
#: 5 x 7 bitmaps, a row a string; drawn for this project
DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One figure. kind: one of SHAPES or a digit "0".."9"; x, y, radius in pixels; colour: a name in PALETTE."""

    kind: str
    x: int
    y: int
    radius: int
    colour: str


@dataclass(frozen=True)
class Scene:
    """A background (index into BACKGROUNDS) and figures, later ones over earlier ones."""

    background: int
    figures: tuple[Figure, ...]


def draw(scenes: Sequence[Scene]) -> torch.Tensor:
    """uint8 [len(scenes), 384, 384, 3], rows from the top, RGB."""
    return paint(numbers_of(scenes))


def numbers_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """The scenes as float32 [scenes, 1 + FIGURES, 7]: what `paint` needs, and all that has to travel to a GPU.

    Row 0 holds the background's colour in its last three columns, the others (kind, x, y, radius, R, G, B); kind -1: none.
    """
    import torch

    count = FIGURES
    empty = (-1, 0, 0, 1, 0, 0, 0)
    table = []
    for scene in scenes:
        rows = [(-1, 0, 0, 1, *BACKGROUNDS[scene.background])]
        for figure in scene.figures:
            kind = SHAPES.index(figure.kind) if figure.kind in SHAPES else len(SHAPES) + int(figure.kind)
            rows.append((kind, figure.x, figure.y, figure.radius, *PALETTE[figure.colour]))
        table.append(rows + [empty] * (1 + count - len(rows)))
    return torch.tensor(table, dtype=torch.float32)


def paint(numbers: torch.Tensor) -> torch.Tensor:
    """The pictures of `numbers_of`, on its device: uint8 [scenes, 384, 384, 3]."""
    import torch

    canvas = numbers[:, 0, 4:].to(torch.uint8)[:, None, None, :].expand(-1, SIZE, SIZE, -1).clone()
    axis = torch.arange(SIZE, dtype=torch.float32, device=numbers.device)
    for j in range(1, numbers.shape[1]):
        kind, x, y, radius = (numbers[:, j, k, None, None] for k in range(4))
        inside = _inside(kind, axis[None, None, :] - x, axis[None, :, None] - y, radius)
        colour = numbers[:, j, 4:].to(torch.uint8)[:, None, None, :]
        canvas = torch.where(inside[..., None], colour, canvas)
    return canvas


def _inside(kind: torch.Tensor, u: torch.Tensor, v: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Which offsets (u right, v down) belong to a figure; all arguments broadcast to [batch, 384, 384]."""
    import torch

    square = torch.maximum(u.abs(), v.abs())
    far = u * u + v * v
    masks = (
        far <= r * r,
        square <= 0.85 * r,
        (v <= 0.8 * r) & (2 * u.abs() <= v + r),
        u.abs() + v.abs() <= 1.1 * r,
        (square <= r) & (torch.minimum(u.abs(), v.abs()) <= 0.3 * r),
        (far <= r * r) & (far >= 0.36 * r * r),
    )
    inside = torch.zeros(torch.broadcast_shapes(kind.shape, far.shape), dtype=torch.bool, device=u.device)
    for number, mask in enumerate(masks):
        inside |= (kind == number) & mask
    bitmap = torch.tensor([[[c == "1" for c in row] for row in digit.split()] for digit in DIGITS], device=u.device)
    pixel = r * (2 / 7)
    column, row = torch.floor(u / pixel + 2.5), torch.floor(v / pixel + 3.5)
    on_glyph = (column >= 0) & (column < 5) & (row >= 0) & (row < 7) & (kind >= len(SHAPES))
    glyph = (kind - len(SHAPES)).clamp(0, 9).long().expand_as(inside)
    looked = bitmap[glyph, row.clamp(0, 6).long().expand_as(inside), column.clamp(0, 4).long().expand_as(inside)]
    return inside | (on_glyph & looked)


def patches(canvas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What Gemma 4's image processor makes of such pictures, without its padding.

    canvas   uint8 [b, 384, 384, 3]
    returns  float32 [b, 576, 768] in 0..1 (patches row by row; pixels row by row, channels last) and int64 [b, 576, 2]
             with the (x, y) of each patch
    """
    import torch

    side = SIZE // PATCH
    cut = canvas.reshape(-1, side, PATCH, side, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    pixels = cut.reshape(len(canvas), side * side, PATCH * PATCH * 3).to(torch.float32) * (1 / 255)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([x, y], dim=-1).reshape(1, -1, 2).expand(len(canvas), -1, -1)
    return pixels, places.to(canvas.device)


def picture(scene: Scene) -> Image:
    """The scene as an RGB image of 384 x 384 pixels."""
    from PIL import Image

    return Image.fromarray(draw([scene])[0].numpy())
