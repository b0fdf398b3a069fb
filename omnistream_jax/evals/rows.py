"""Pictures of clips: rows of frames under their names."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2
LABEL_HEIGHT = 16
BACKGROUND = 255


def labelled_row(label: str, tiles: np.ndarray) -> np.ndarray:
    """Tiles [T, H, W, 3] side by side under a strip with the label: [LABEL_HEIGHT + H + GAP, Wp, 3]."""
    count, height, width, _ = tiles.shape
    row = Image.new("RGB", (count * (width + GAP) - GAP, LABEL_HEIGHT + height + GAP), (BACKGROUND,) * 3)
    # Clipped to the strip: a long label must not be drawn over the tiles.
    strip = Image.new("RGB", (row.width, LABEL_HEIGHT), (BACKGROUND,) * 3)
    ImageDraw.Draw(strip).text((2, 1), label, fill=(0, 0, 0), font=ImageFont.load_default(size=12))
    row.paste(strip, (0, 0))
    for index, tile in enumerate(tiles):
        row.paste(Image.fromarray(tile), (index * (width + GAP), LABEL_HEIGHT))
    return np.asarray(row)


def enlarge(tile: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, 3] -> [H, W, 3], nearest neighbour, so that single patches stay visible."""
    height, width = size
    return np.asarray(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST))
