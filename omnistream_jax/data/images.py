"""Reading photographs."""

from __future__ import annotations

import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from omnistream_jax.data.errors import DataError

MAX_PIXELS = 64_000_000
"""Largest picture (height x width) that is decoded; Pillow alone only warns, at 89 million."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""What is decoded, whatever a file's name says. Pillow knows more, some of which start other programs (EPS)."""


def read_image(
    path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS, file: BinaryIO | None = None, upright: bool = True
) -> np.ndarray:
    """Reads one picture as uint8 [H, W, 3] RGB, turned upright as its EXIF orientation says.

    Transparent pictures are laid on black. The size is checked from the header, before anything is decoded.

    Args:
      path: where it lies; where `file` is given, only its name in messages.
      max_pixels: the largest height x width that is decoded.
      file: the picture itself, open for reading and seeking: a member of an archive, or io.BytesIO; left open.
      upright: False leaves it as it is stored, as evaluators do that know no EXIF.

    Raises:
      DataError: the file is missing, is no picture, is damaged, or has more than `max_pixels` pixels.
    """
    path = os.fspath(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the one that counts
            with Image.open(path if file is None else file, formats=_FORMATS) as image:
                _check_size(path, *image.size, max_pixels)
                return np.asarray(_to_rgb(ImageOps.exif_transpose(image) if upright else image))
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such image file", reason="file is missing") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: expected a whole image file, but reading it failed ({error})", reason="image cannot be decoded"
        ) from error


def _check_size(path: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataError(
            f"{path}: {width} x {height} pixels, at most {max_pixels:,} are allowed", reason="image is too large"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} is no 8-bit picture")  # convert() would clip it to white
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image.convert("RGB")
