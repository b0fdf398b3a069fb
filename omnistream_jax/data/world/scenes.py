"""What is in a clip of the world: a room, a camera that moves, one thing that may move and others that do not.

A scene is determined by (seed, split, index). Everything but the motion class is drawn without regard to it, so that
the first frame is the same picture whatever the class. Sizes are drawn as angles and most things float: one
frame does not tell how far they are, the camera's motion does.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from omnistream_jax.data.embedded import SPLITS
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.world.motion import MOTIONS, Path, about_y, offset, swept_offsets, turn
from omnistream_jax.data.world.placing import Placing
from omnistream_jax.data.world.render import Room, Solid, Surface
from omnistream_jax.data.world.textures import MATERIALS, SIDE, Textures, world_textures

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.16, 0.14),
    "green": (0.16, 0.75, 0.2),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (1.15, 0.95, 0.1),
    "purple": (0.6, 0.22, 0.8),
    "turquoise": (0.15, 0.85, 0.85),
    "pink": (1.2, 0.55, 0.75),
    "white": (1.2, 1.2, 1.2),
}
SHAPES: dict[str, tuple[float, float, float]] = {
    "ball": (1.0, 1.0, 1.0),
    "cube": (1.0, 1.0, 1.0),
    "pillar": (0.5, 1.6, 0.5),
    "slab": (1.4, 0.4, 1.0),
}
"""Half sides of each shape, as multiples of each other."""
MAX_OTHERS = 5
_WALLS_WASH = 0.65  # with walls as vivid as the things, a decoder takes twice as long to learn what a picture shows
_ATTEMPTS = 400


@dataclasses.dataclass(frozen=True)
class Thing:
    """Something in the room that captions can name.

    Attributes:
      shape: a key of SHAPES.
      colour: a key of COLOURS, or None.
      material: a key of MATERIALS, or None; exactly one of the two is given.
      solid: where it is at the start of the clip, and how it looks.
    """

    shape: str
    colour: str | None
    material: str | None
    solid: Solid


@dataclasses.dataclass(frozen=True)
class Camera:
    """A smooth path through the room, in shares of the clip from 0 to 1.

    Attributes:
      tangent: of half the field of view, the same in both directions.
      start: [3], the camera centre at share 0, metres.
      shift: [3], from there to the camera centre at share 1.
      bulge: [3], how far the path leaves the straight line halfway.
      angles: yaw, pitch and roll at share 0, radians.
      turns: how much each has changed at share 1.
    """

    tangent: float
    start: np.ndarray
    shift: np.ndarray
    bulge: np.ndarray
    angles: np.ndarray
    turns: np.ndarray

    def cam_to_world(self, share: float) -> np.ndarray:
        """float64 [4, 4] at a share of the clip."""
        yaw, pitch, roll = self.angles + self.turns * share**2 * (3 - 2 * share)  # starts and ends gently
        pose = np.eye(4)
        pose[:3, :3] = about_y(yaw) @ _about_x(pitch) @ _about_z(roll)
        pose[:3, 3] = self.start + self.shift * share + self.bulge * np.sin(np.pi * share)
        return pose

    def intrinsics(self, size: int) -> np.ndarray:
        """float64 [3, 3] for pictures of size x size pixels."""
        focal = size / 2 / self.tangent
        return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


@dataclasses.dataclass(frozen=True)
class Scene:
    """The scene graph of a clip.

    Attributes:
      split: "train" or "heldout".
      room: its walls.
      light: [3], where the light is.
      camera: its path.
      things: what stands or floats in the room; ids in masks are their places here plus 1.
      mover: which of them moves.
      motion: its class, a number in MOTIONS.
      path: how far and how fast it moves.
    """

    split: str
    room: Room
    light: np.ndarray
    camera: Camera
    things: tuple[Thing, ...]
    mover: int
    motion: int
    path: Path

    def solids(self, share: float) -> tuple[Solid, ...]:
        """Where everything is at a share of the clip, 0 to 1."""
        solids = [thing.solid for thing in self.things]
        start = solids[self.mover]
        solids[self.mover] = dataclasses.replace(
            start,
            centre=start.centre + offset(self.motion, self.path, share),
            rotation=turn(self.motion, self.path, share) @ start.rotation,
        )
        return tuple(solids)


def motion_of(seed: int, split: str, index: int) -> int:
    """The motion class of a scene: every len(MOTIONS) indices from a multiple of it on hold each class once."""
    block, place = divmod(index, len(MOTIONS))
    return int(_rng(seed, split, block, "motions").permutation(len(MOTIONS))[place])


def build_scene(seed: int, split: str, index: int, motion: int | None = None) -> Scene:
    """The scene of (seed, split, index).

    Args:
      seed: 0 or more.
      split: "train" or "heldout": other numbers, and textures that share no pixel of a photograph.
      index: 0 or more.
      motion: shows this class in place of the scene's own, everything else being the same.

    Raises:
      DataError: an argument is out of range.
    """
    if split not in SPLITS:
        raise DataError(f"world: split is {split!r}, expected one of {', '.join(SPLITS)}")
    for field, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise DataError(f"world: {field} is {value}, expected 0 or more")
    textures, rng = world_textures(split), _rng(seed, split, index, "scene")
    for _ in range(_ATTEMPTS):
        low, high = _bounds(rng)
        camera = _camera(rng, low, high)
        placing = Placing(low, high, [camera.cam_to_world(share) for share in (0.0, 0.5, 1.0)], camera.tangent)
        if (moving := _place_mover(rng, placing)) is not None:
            break
    else:
        raise RuntimeError(f"world: scene {index} of seed {seed} found no place for what moves")
    (centre, radius, shape), path = moving
    places = [(centre, radius, shape), *_place_others(rng, placing)]
    looks = _looks(rng, [shape for _, _, shape in places])
    things = [_thing(rng, textures, *place, *look) for place, look in zip(places, looks, strict=True)]
    order = rng.permutation(len(things))
    room = Room(low, high, _walls(rng, textures))
    light = np.array([rng.uniform(low[0], high[0]) * 0.6, low[1] + 0.25, rng.uniform(low[2] * 0.7, 0.5)])
    return Scene(
        split,
        room,
        light,
        camera,
        tuple(things[i] for i in order),
        int(np.flatnonzero(order == 0)[0]),
        motion_of(seed, split, index) if motion is None else motion,
        path,
    )


def _rng(seed: int, split: str, number: int, use: str) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), number, ("scene", "motions").index(use)])


def _about_x(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def _about_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _bounds(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The room's corners; the floor is at y = 0."""
    half_width, half_depth, height = rng.uniform(2.3, 3.6), rng.uniform(3.5, 4.8), rng.uniform(2.7, 3.6)
    return np.array([-half_width, -height, -half_depth]), np.array([half_width, 0.0, half_depth])


def _camera(rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> Camera:
    """Starts near the wall at low z, looks about along z, and moves mostly sideways: that gives parallax."""
    start = np.array([rng.uniform(-0.6, 0.6), rng.uniform(0.42, 0.58) * low[1], low[2] + rng.uniform(0.8, 1.4)])
    sideways = rng.choice([-1, 1]) * rng.uniform(0.3, 0.8)
    shift = np.array([sideways, rng.uniform(-0.15, 0.15), rng.uniform(-0.2, 0.4)])
    angles = np.radians([rng.uniform(-14, 14), rng.uniform(-8, 3), rng.uniform(-3, 3)])
    follow = -np.arctan2(sideways, rng.uniform(3.0, 5.0)) * rng.uniform(0.2, 1.1)  # looks back at what it passes
    turns = np.array([follow, np.radians(rng.uniform(-3, 3)), np.radians(rng.uniform(-3, 3))])
    bulge = np.array([rng.uniform(-0.1, 0.1), rng.uniform(-0.08, 0.08), rng.uniform(-0.1, 0.1)])
    return Camera(float(np.tan(np.radians(rng.uniform(27, 36)))), start, shift, bulge, angles, turns)


def _place_mover(rng: np.random.Generator, placing: Placing) -> tuple[tuple, Path] | None:
    """(centre, bounding radius, shape) of what moves, and its path: clear and in sight for every class."""
    first = placing.poses[0]
    right, forward = first[:3, 0] * [1, 0, 1], first[:3, 2] * [1, 0, 1]
    right, forward = right / np.linalg.norm(right), forward / np.linalg.norm(forward)
    for _ in range(12):
        depth = rng.uniform(2.2, 3.6)
        reach = depth * rng.uniform(0.16, 0.24)
        path = Path(right, forward, reach, np.radians(rng.uniform(110, 200)), float(rng.choice([-1, 1])))
        radius = depth * rng.uniform(0.14, 0.2)
        x, y = rng.uniform(-0.5, 0.5) * placing.tangent, rng.uniform(-0.45, 0.45) * placing.tangent
        centre = placing.world_point(x, y, depth)
        if placing.reserve(centre, radius, centre + swept_offsets(path)):
            return (centre, radius, str(rng.choice(list(SHAPES)))), path
    return None


def _place_others(rng: np.random.Generator, placing: Placing) -> list[tuple]:
    """(centre, bounding radius, shape) of 2 to MAX_OTHERS things that do not move; a third stand on the floor."""
    places = []
    for _ in range(int(rng.integers(2, MAX_OTHERS + 1))):
        shape, on_floor = str(rng.choice(list(SHAPES))), rng.random() < 0.35
        for _ in range(60):
            depth = rng.uniform(1.8, 5.5)
            radius = depth * rng.uniform(0.09, 0.19)
            centre = placing.world_point(*(rng.uniform(-0.85, 0.85, 2) * placing.tangent), depth)
            half_height = _half(shape, radius)[1]
            if on_floor:
                centre[1] = -half_height
            if placing.add(centre, radius, half_height):
                places.append((centre, radius, shape))
                break
    return places


def _half(shape: str, radius: float) -> np.ndarray:
    """Half sides of a shape within a sphere."""
    if shape == "ball":
        return np.full(3, radius)
    sides = np.array(SHAPES[shape])
    return sides * radius / np.linalg.norm(sides)


def _looks(rng: np.random.Generator, shapes: list[str]) -> list[tuple[str | None, str | None]]:
    """(colour, material) of each thing: few looks a scene, so that one word seldom tells things apart, but no two
    things alike in look and shape."""
    everything = [(colour, None) for colour in COLOURS] + [(None, material) for material in MATERIALS]
    most_alike = max(shapes.count(shape) for shape in shapes)
    count = max(most_alike, int(rng.integers(2, 5)))
    palette = [everything[i] for i in rng.choice(len(everything), count, replace=False)]
    left = {shape: [palette[i] for i in rng.permutation(count)] for shape in SHAPES}
    return [left[shape].pop() for shape in shapes]


def _thing(
    rng: np.random.Generator,
    textures: Textures,
    centre: np.ndarray,
    radius: float,
    shape: str,
    colour: str | None,
    material: str | None,
) -> Thing:
    half = _half(shape, radius)
    layers = textures.greys if material is None else textures.materials[material]
    tint = COLOURS[colour] if colour is not None else (1.0, 1.0, 1.0)
    # A texture spans the longest side of a box, or half of a ball's equator.
    across = np.pi * radius if shape == "ball" else 2 * half.max()
    surface = Surface(int(rng.choice(layers)), tint, SIDE / across)
    kind = "ball" if shape == "ball" else "box"
    return Thing(shape, colour, material, Solid(kind, half, centre, about_y(rng.uniform(-np.pi, np.pi)), surface))


def _walls(rng: np.random.Generator, textures: Textures) -> tuple[Surface, ...]:
    """Photographs, in their own colours or in one, under a wash of white: what stands in the room stands out."""
    surfaces = []
    for face in range(6):
        ceiling = face == 2
        grey = ceiling or rng.random() < 0.4
        tint = rng.uniform(0.6, 1.1, 3) if grey else np.full(3, rng.uniform(0.7, 1.0))
        span = rng.uniform(1.0, 3.0)
        layers = textures.greys if grey else textures.photographs
        surfaces.append(Surface(int(rng.choice(layers)), tuple(tint.tolist()), SIDE / span, _WALLS_WASH))
    return tuple(surfaces)
