"""Images from outside: small set of formats, bounded size, local files only.

A 10 kB PNG can claim 10^10 pixels, and a URL can point inside the network this process runs in. So the header decides
before any pixel is decoded, and only paths are opened, never addresses.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import SourceError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 50_000_000


def open_image(path: str | Path) -> Image:
    """The image in the file `path` as RGB.

    raises UsageError for a URL, SourceError for a file that is missing, too large or not an image of FORMATS
    """
    from PIL import Image, UnidentifiedImageError

    where = str(path)
    if "://" in where:
        raise UsageError("images are read from files, not from addresses", where=where, todo="download it first")
    file = Path(path)
    if not file.is_file():
        raise SourceError("no such image file", where=where, todo="check the path")
    if file.stat().st_size > MAX_BYTES:
        raise SourceError(f"image file is larger than {MAX_BYTES >> 20} MiB", where=where, todo="make it smaller")
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise SourceError(
                    f"image of {width} x {height} exceeds {MAX_PIXELS // 10**6} million pixels",
                    where=where,
                    todo="scale it down",
                )
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(
            f"cannot be read as an image ({error})", where=where, todo=f"use one of {', '.join(FORMATS)}"
        ) from None
