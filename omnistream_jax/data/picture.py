"""Drawing for `show.py`: depth in colours, a scene from above, boxes, rows of pictures with text. Pillow only."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from omnistream_jax.data.schema import CaptionedImage, PosedFrame

# "Turbo" (Mikhailov 2019) at nine places, far to near: dark blue, blue, cyan, green, yellow, orange, red, dark red.
_TURBO = np.array(
    [
        *((48, 18, 59), (70, 107, 227), (40, 187, 236), (49, 242, 153), (162, 252, 60)),
        *((237, 208, 58), (251, 128, 34), (210, 49, 5), (122, 4, 3)),
    ],
    float,
)
_INVALID, _SKY = (60, 60, 60), (190, 220, 245)
_PAPER, _INK, _FAULT = (255, 255, 255), (20, 20, 20), (190, 30, 30)
_GAP, _TEXT = 6, 14
_POINTS_PER_FRAME = 6000
# Seven colours that are told apart (Okabe and Ito 2008), without black.
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (240, 228, 66))


def colour_ramp(shares: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] of numbers in 0 to 1: dark blue to dark red."""
    places = np.linspace(0, 1, len(_TURBO))
    channels = [np.interp(shares, places, _TURBO[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def depth_range(frames: Sequence[PosedFrame]) -> tuple[float, float] | None:
    """The 2nd and the 98th percentile of the valid depths of some frames; None where there are none."""
    valid = [frame.depth[frame.valid] for frame in frames if frame.depth is not None]
    values = np.concatenate(valid) if valid else np.zeros(0)
    return (float(np.percentile(values, 2)), float(np.percentile(values, 98))) if values.size else None


def colour_depth(depth: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """uint8 [..., 3] of depths [...] > 0 by their inverse: red is near, blue is far, the limits and beyond are full."""
    near, far = 1 / limits[0], 1 / max(limits[1], limits[0] * 1.001)
    return colour_ramp((1 / depth - far) / (near - far))


def depth_picture(frame: PosedFrame, limits: tuple[float, float]) -> Image.Image:
    """Depth in colours, by its inverse: red is near, blue is far; grey is not known, pale blue is sky."""
    height, width = frame.image.shape[:2]
    picture = np.full((height, width, 3), _INVALID, np.uint8)
    if frame.depth is not None:
        picture[frame.valid] = colour_depth(frame.depth[frame.valid], limits)
    if frame.sky is not None:
        picture[frame.sky] = _SKY
    return Image.fromarray(picture)


def view_from_above(frames: Sequence[PosedFrame], path: np.ndarray, size: int, unit: str) -> Image.Image:
    """The points and cameras of some frames as the first one's camera has them from above: its x right, its z up.

    Args:
      frames: whose points are drawn in their colours, and whose cameras as open triangles, blue to red in their order.
      path: [n, 3], centres of the cameras between them, joined by a line; [0, 3]: they follow no path.
      size: of the square picture, pixels.
      unit: of the scale bar.
    """
    picture = Image.new("RGB", (size, size), (245, 245, 245))
    draw = ImageDraw.Draw(picture)
    posed = [frame for frame in frames if frame.cam_to_world is not None]
    if not posed:
        draw.text((10, size // 2), "no poses", _INK, _font())
        return picture
    to_first = np.linalg.inv(posed[0].cam_to_world.astype(np.float64))
    clouds = [_points(frame) for frame in posed]
    points = _move(to_first, np.concatenate([place for place, _ in clouds]))[:, ::2]  # x and z
    colours = np.concatenate([colour for _, colour in clouds])
    path = _move(to_first, path)[:, ::2]
    centres = np.stack([(to_first @ frame.cam_to_world)[:3, 3] for frame in posed])[:, ::2]
    low, scale = _fit(points, np.concatenate([path, centres]), size)

    def place(xz: np.ndarray) -> np.ndarray:
        moved = (xz - low) * scale
        return np.stack([moved[..., 0], size - moved[..., 1]], -1)

    pixels = np.floor(place(points)).astype(int)
    inside = ((pixels >= 0) & (pixels < size)).all(-1)
    canvas = np.array(picture)
    canvas[pixels[inside, 1], pixels[inside, 0]] = colours[inside]
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    if len(path) > 1:
        draw.line([tuple(point) for point in place(path)], _INK, 1)
    for number, frame in enumerate(posed):
        _draw_camera(draw, place, to_first @ frame.cam_to_world, frame, number / max(len(posed) - 1, 1), size / scale)
    _draw_scale(draw, scale, size, unit)
    return picture


def _points(frame: PosedFrame) -> tuple[np.ndarray, np.ndarray]:
    """Some of a frame's points in the world [n, 3], and their colours [n, 3]."""
    if frame.depth is None:
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    row, column = np.nonzero(frame.valid)
    some = np.random.default_rng(0).permutation(len(row))[:_POINTS_PER_FRAME]  # even steps would show as stripes
    row, column = row[some], column[some]
    rays = np.stack([column + 0.5, row + 0.5, np.ones(len(row))], -1) @ np.linalg.inv(frame.intrinsics.astype(float)).T
    places = _move(frame.cam_to_world.astype(float), frame.depth[row, column, None] * rays)
    return places, frame.image[row, column]


def _move(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _fit(points: np.ndarray, cameras: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """The lower corner that the picture shows, and pixels a unit: all cameras, and most points."""
    shown = cameras
    if len(points):
        shown = np.concatenate([cameras, np.percentile(points, [3, 97], axis=0)])
    low, high = shown.min(0), shown.max(0)
    span = max(float((high - low).max()), 1e-6) * 1.15
    return (low + high - span) / 2, size / span


def _draw_camera(draw, place, matrix: np.ndarray, frame: PosedFrame, share: float, span: float) -> None:
    """An open triangle: the rays of the left and the right edge, a tenth of the picture long."""
    width, focal = frame.image.shape[1], frame.intrinsics[0, 0]
    edges = [(x - frame.intrinsics[0, 2]) / focal for x in (0, width)]
    corners = _move(matrix, np.array([[0.0, 0, 0]] + [[edge, 0, 1] for edge in edges]) * span / 10)[:, ::2]
    tip, left, right = (tuple(point) for point in place(corners))
    draw.line([left, tip, right], tuple(int(value) for value in colour_ramp(np.array(0.1 + 0.75 * share))), 2)


def _draw_scale(draw, scale: float, size: int, unit: str) -> None:
    """A bar of a round length, about a quarter of the picture."""
    length = 10.0 ** np.floor(np.log10(size / scale / 4))
    length *= max(factor for factor in (1, 2, 5) if factor * length * scale <= size / 3)
    draw.line([(8, size - 8), (8 + length * scale, size - 8)], _INK, 2)
    draw.text((8, size - 12 - _TEXT), f"{length:g} {unit}", _INK, _font())


def boxes_picture(sample: CaptionedImage, height: int) -> Image.Image:
    """An image scaled to a height, with its boxes and what each of them is called."""
    picture = fitted(Image.fromarray(sample.image), height)
    draw = ImageDraw.Draw(picture)
    for number, (box, phrase) in enumerate(zip(sample.boxes, sample.phrases, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        x1, y1, x2, y2 = (float(share) * side for share, side in zip(box, picture.size * 2, strict=True))
        draw.rectangle([x1, y1, max(x1, x2), max(y1, y2)], outline=colour, width=2)
        name = textwrap.shorten(phrase, 40, placeholder="...")
        corner = x1, y1 - _TEXT - 3 if y1 > _TEXT + 3 else y1 + 2  # over the box, where there is room
        draw.rectangle(draw.textbbox(corner, name, _font()), colour)
        draw.text(corner, name, _PAPER, _font())
    return picture


def text_picture(paragraphs: Sequence[str], width: int, height: int) -> Image.Image:
    """Paragraphs set in lines; what does not fit is cut."""
    picture = Image.new("RGB", (width, height), _PAPER)
    lines = []
    for paragraph in paragraphs:
        lines += [*textwrap.wrap(paragraph, max(width // 7, 8)), ""]
    ImageDraw.Draw(picture).multiline_text((4, 2), "\n".join(lines), _INK, _font(), spacing=3)
    return picture


def fitted(picture: Image.Image, height: int) -> Image.Image:
    """A copy scaled to a height."""
    width = max(1, round(picture.width * height / picture.height))
    return picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row."""
    joined = Image.new("RGB", (_along([p.width for p in pictures]), max(p.height for p in pictures)), _PAPER)
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + _GAP
    return joined


def below(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures under each other."""
    joined = Image.new("RGB", (max(p.width for p in pictures), _along([p.height for p in pictures])), _PAPER)
    top = 0
    for picture in pictures:
        joined.paste(picture, (0, top))
        top += picture.height + _GAP
    return joined


def _along(lengths: Sequence[int]) -> int:
    return sum(lengths) + _GAP * (len(lengths) - 1)


def titled(title: str, picture: Image.Image | None, fault: bool = False) -> Image.Image:
    """A picture under lines of text; None: the text alone."""
    lines = title.splitlines()
    width = max(int(_font().getlength(line)) + 8 for line in lines)
    head = Image.new("RGB", (width, (_TEXT + 4) * len(lines) + 2), _PAPER)
    ImageDraw.Draw(head).multiline_text((4, 0), title, _FAULT if fault else _INK, _font(), spacing=3)
    return head if picture is None else below([head, picture])


def framed(picture: Image.Image) -> Image.Image:
    """A picture with a margin."""
    page = Image.new("RGB", (picture.width + 4 * _GAP, picture.height + 4 * _GAP), _PAPER)
    page.paste(picture, (2 * _GAP, 2 * _GAP))
    return page


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)
