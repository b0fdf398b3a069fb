"""How CUT3R's evaluations size their frames (its load_images_for_eval), which fixes what the published numbers saw.

The long side becomes 512 pixels (Lanczos where that shrinks, bicubic where it enlarges or keeps). Then both sides
become multiples of the patch: by a second Lanczos resize where depth is scored, which must cover the whole picture, or
by a crop about the centre where poses are scored, which must keep the focal length in both directions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from omnistream_jax.data.errors import DataError, require_field

Mode = Literal["resize", "crop"]


def prepared_size(
    width: int, height: int, long_side: int = 512, patch: int = 16
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes that a picture goes through: (width, height) with its long side resized, and (width, height) at last.

    A square picture ends with 3/4 of its width as height: a quirk that CUT3R inherited from DUSt3R, kept for the
    numbers' sake and rounded down to whole patches. (CUT3R's own code does so when cropping; when resizing it stops at
    a height that is no integer.)

    Raises:
      DataError: less than one patch of the picture would be left.
    """
    require_field(patch >= 1, "patch", patch, "at least 1")
    require_field(long_side >= patch, "long_side", long_side, f"at least one patch of {patch} pixels")
    longer = max(width, height)
    resized = round(width * long_side / longer), round(height * long_side / longer)
    # both sides are made even first, as cropping about a whole centre makes them
    final_width, final_height = (side // 2 * 2 // patch * patch for side in resized)
    if resized[0] == resized[1]:
        final_height = 3 * final_width // 4 // patch * patch
    if not (final_width and final_height):
        raise DataError(
            f"a picture of {width} x {height} pixels has no whole patch of {patch} at a long side of {long_side}"
        )
    return resized, (final_width, final_height)


def prepare_frames(image: np.ndarray, long_side: int = 512, patch: int = 16, mode: Mode = "resize") -> np.ndarray:
    """One upright RGB picture, or each of a clip, as the published evaluations show it to a model.

    `images.read_image` has turned it upright by its EXIF orientation. At the defaults 1024 x 436 (width x height)
    becomes 512 x 208, 640 x 480 becomes 512 x 384, 1242 x 375 becomes 512 x 144 and 1296 x 968 becomes 512 x 368; see
    `prepared_size` for square ones.

    Args:
      image: uint8 [H, W, 3] or [T, H, W, 3].
      long_side: pixels of the longer side after the first resize.
      patch: both sides of the result are multiples of it.
      mode: "resize", where depth is scored, or "crop", where poses are.

    Returns:
      uint8 [h, w, 3] or [T, h, w, 3], not normalised.

    Raises:
      DataError: another array or mode, or a picture too narrow for one patch.
    """
    require_field(mode in ("resize", "crop"), "mode", mode, '"resize" or "crop"')
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape:
        raise DataError(f"image: {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] or [T, H, W, 3]")
    if image.ndim == 4:
        return np.stack([prepare_frames(frame, long_side, patch, mode) for frame in image])
    height, width = image.shape[:2]
    resized, final = prepared_size(width, height, long_side, patch)
    kernel = Image.Resampling.LANCZOS if max(width, height) > long_side else Image.Resampling.BICUBIC
    picture = Image.fromarray(image).resize(resized, kernel)
    if mode == "resize":
        return np.asarray(picture.resize(final, Image.Resampling.LANCZOS))
    left, top = (side // 2 - kept // 2 for side, kept in zip(resized, final, strict=True))
    return np.asarray(picture.crop((left, top, left + final[0], top + final[1])))
