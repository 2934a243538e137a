"""Image files from outside: a small set of formats, bounded size, local files only.

A 10 kB PNG can claim 10^10 pixels, and an address can point inside the network this process runs in. So the header decides before any
pixel is decoded, and only paths are opened. Whoever sends a folder of questions must not be able to show a model the rest of the disk:
`image_beside` takes names that stay in that folder, links followed.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from halfbyte.errors import SourceError, UnsafeName, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 50_000_000
_LONGEST_NAME, _SHOWN = 400, 120


def open_image(path: str | Path) -> Image:
    """The image in the file `path` as RGB (of a moving one, the first frame).

    raises UsageError for a URL, SourceError for a file that is missing, too large or not an image of FORMATS
    """
    from PIL import Image, UnidentifiedImageError

    if "://" in str(path):
        raise UsageError("images are read from files, not from addresses", where=str(path), todo="download it first")
    check_image(Path(path), str(path))
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(
            f"cannot be decoded as an image ({error})", where=str(path), todo="save it again, or leave it out"
        ) from None


def picture_hash(image: Image) -> str:
    """16 hex digits of size and RGB pixels: the same picture in another file or format without loss has the same."""
    pixels = image.convert("RGB")
    return hashlib.sha256(f"{pixels.width}x{pixels.height}:".encode() + pixels.tobytes()).hexdigest()[:16]


def check_image(path: Path, where: str) -> None:
    """Decides by size and header; no pixel is decoded. `where` is what an error names: the file, or the line that names it.

    raises SourceError
    """
    from PIL import Image, UnidentifiedImageError

    shown = repr(path.name[:_SHOWN])
    if not path.is_file():
        raise SourceError(f"there is no image file {shown}", where=where, todo="check the path")
    if path.stat().st_size > MAX_BYTES:
        raise SourceError(f"image {shown} is larger than {MAX_BYTES >> 20} MiB", where=where, todo="make it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the lower one
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(
            f"image {shown} cannot be read as an image ({error})", where=where, todo=f"use one of {', '.join(FORMATS)}"
        ) from None
    if width * height > MAX_PIXELS:
        raise SourceError(
            f"image {shown} of {width} x {height} exceeds {MAX_PIXELS // 10**6} million pixels",
            where=where,
            todo="scale it down",
        )


def image_beside(folder: Path, name: object, where: str) -> Path:
    """The checked file that `name`, from a file in `folder`, names: in that folder or below it.

    raises UnsafeName (a path or link that leads out, an address), SourceError (as `check_image`)
    """
    if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or any(mark in name for mark in "\\\0:"):
        raise UnsafeName(
            f"{str(name)[:_SHOWN]!r} is not the name of an image", where=where, todo="name a file beside the questions"
        )
    parts, path = PurePosixPath(name), (folder / name).resolve()
    if parts.is_absolute() or ".." in parts.parts or not path.is_relative_to(folder.resolve()):
        raise UnsafeName(
            f"image {name[:_SHOWN]!r} lies outside its folder", where=where, todo="put the image beside the questions"
        )
    check_image(path, where)
    return path
