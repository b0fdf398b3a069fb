"""A ray tracer in array code: a room, boxes and balls, textures with mipmaps, Lambert shading by one point light.

Axes and pixels as data/schema.py has them; the world's y points down and is vertical. A ray's direction has length 1
along the camera's axis, so that its parameter t *is* the z-depth. Depth and objects are exact for the ray through a
pixel's centre, in float64; its colour is the mean of 2 x 2 rays, in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from omnistream_jax.data.world.textures import LAYER_TEXELS, LEVEL_OFFSETS, LEVELS, SIDE

AMBIENT = 0.5
"""Share of a surface's brightness that does not depend on the light."""
_NEAR = 1e-3  # metres; a solid that reaches nearer to the camera's plane is looked for in the whole picture
_CORNERS = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8)
_ANTIALIASING = ((-0.25, -0.25), (-0.25, 0.25), (0.25, -0.25), (0.25, 0.25))  # offsets from a pixel's centre

Window = tuple[slice, slice, slice]


@dataclasses.dataclass(frozen=True)
class Surface:
    """How something is painted.

    Attributes:
      layer: of the textures.
      tint: red, green and blue are multiplied with these.
      texels_per_metre: how fine the texture lies on it.
      wash: share of white over all, 0 to 1.
    """

    layer: int
    tint: tuple[float, float, float]
    texels_per_metre: float
    wash: float = 0.0


@dataclasses.dataclass(frozen=True)
class Room:
    """An axis-aligned room seen from within.

    Attributes:
      low: [3], its smallest x, y (the ceiling) and z, in metres.
      high: [3], its largest x, y (the floor) and z.
      surfaces: of the walls at low x, high x, low y, high y, low z, high z.
    """

    low: np.ndarray
    high: np.ndarray
    surfaces: tuple[Surface, ...]


@dataclasses.dataclass(frozen=True)
class Solid:
    """A ball or a box at one moment.

    Attributes:
      kind: "ball" or "box".
      half: [3], half of its sides in its own axes, in metres; a ball's are all its radius.
      centre: [3], metres.
      rotation: [3, 3], its own axes as columns.
      surface: how it is painted.
    """

    kind: Literal["ball", "box"]
    half: np.ndarray
    centre: np.ndarray
    rotation: np.ndarray
    surface: Surface


class Picture(NamedTuple):
    """A rendered frame: image uint8 [H, W, 3]; depth float32 [H, W], metres; ids uint8 [H, W], 0 the room, then the
    solids in their order from 1."""

    image: np.ndarray
    depth: np.ndarray
    ids: np.ndarray


class Rays(NamedTuple):
    """Rays [S, H, W] of one camera: directions of unit depth by component, their length, and what a pixel spans."""

    origin: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    length: np.ndarray
    pixel: float  # side of a ray's cell at depth 1, in metres

    def part(self, where: tuple | np.ndarray) -> Rays:
        """The rays of an index into [S, H, W]."""
        return Rays(self.origin, self.x[where], self.y[where], self.z[where], self.length[where], self.pixel)


class _Canvas(NamedTuple):
    """What is known of each ray so far, [S, H, W]: depth, and what its colour is made of."""

    depth: np.ndarray
    texel: np.ndarray
    paint: np.ndarray  # row of the tints
    brightness: np.ndarray


def camera_rays(intrinsics: np.ndarray, cam_to_world: np.ndarray, size: int, offsets: tuple, dtype: type) -> Rays:
    """The rays through the pixels' centres plus each of the offsets (x, y), S of them, in pixels."""
    steps = np.arange(size, dtype=np.float64) + 0.5
    shift_x, shift_y = np.array(offsets, np.float64).T[:, :, None, None]
    x = ((steps + shift_x - intrinsics[0, 2]) / intrinsics[0, 0]).astype(dtype)  # [S, 1, W]
    y = ((steps[:, None] + shift_y - intrinsics[1, 2]) / intrinsics[1, 1]).astype(dtype)  # [S, H, 1]
    rotation = cam_to_world[:3, :3].astype(dtype)
    directions = [rotation[i, 0] * x + (rotation[i, 1] * y + rotation[i, 2]) for i in range(3)]
    pixel = 1.0 / (intrinsics[0, 0] * len(offsets) ** 0.5)
    return Rays(cam_to_world[:3, 3].astype(dtype), *directions, np.sqrt(x * x + y * y + 1), pixel)


def render(
    room: Room,
    light: np.ndarray,
    solids: tuple[Solid, ...],
    texels: np.ndarray,
    intrinsics: np.ndarray,
    cam_to_world: np.ndarray,
    size: int,
) -> Picture:
    """Renders one frame of size x size pixels.

    Args:
      room: everything happens in it.
      light: [3], where the light is.
      solids: at most 255; the camera is outside of them.
      texels: uint32, `Textures.texels`.
      intrinsics: [3, 3].
      cam_to_world: [4, 4]; the camera is in the room.
      size: H and W.
    """
    windows = [_window(solid, intrinsics, cam_to_world, size) for solid in solids]
    seen = [(number, solid, where) for number, (solid, where) in enumerate(zip(solids, windows, strict=True)) if where]
    with np.errstate(divide="ignore", invalid="ignore"):  # a ray along a wall meets it at infinity
        depth, ids = _geometry(camera_rays(intrinsics, cam_to_world, size, ((0.0, 0.0),), np.float64), room, seen)
        rays = camera_rays(intrinsics, cam_to_world, size, _ANTIALIASING, np.float32)
        canvas = _paint_room(rays, room, light.astype(np.float32))
        for number, solid, where in seen:
            _paint_solid(canvas, rays, solid, where, light.astype(np.float32), len(room.surfaces) + number)
    surfaces = (*room.surfaces, *(solid.surface for solid in solids))
    return Picture(_colours(canvas, texels, surfaces), depth.astype(np.float32), ids)


def _colours(canvas: _Canvas, texels: np.ndarray, surfaces: tuple[Surface, ...]) -> np.ndarray:
    """uint8 [H, W, 3]: texture times tint times brightness, as the mean over a pixel's rays."""
    packed = texels[canvas.texel]
    tints = np.array([surface.tint for surface in surfaces], np.float32)
    wash = np.array([surface.wash for surface in surfaces], np.float32)[canvas.paint]
    image = np.empty((*packed.shape[1:], 3), np.uint8)
    for channel in range(3):
        colour = ((packed >> (8 * channel)) & 255).astype(np.float32)
        colour *= tints[:, channel][canvas.paint]
        colour += wash * (255 - colour)
        colour *= canvas.brightness
        image[..., channel] = np.minimum(colour.mean(0) + 0.5, 255)
    return image


def _geometry(rays: Rays, room: Room, solids: list[tuple[int, Solid, Window]]) -> tuple[np.ndarray, np.ndarray]:
    """Depth [H, W] and ids [H, W] of one ray a pixel, given the solids in sight with their numbers and windows."""
    depth_x, depth_y, depth_z = _wall_depths(rays, room)
    depth = np.minimum(np.minimum(depth_x, depth_y), depth_z)
    ids = np.zeros(depth.shape, np.uint8)
    for number, solid, where in solids:
        entry = _entry(rays.part(where), solid)
        closer = entry < depth[where]
        depth[where][closer] = entry[closer]
        ids[where][closer] = number + 1
    return depth[0], ids[0]


def _wall_depths(rays: Rays, room: Room) -> list[np.ndarray]:
    """Depth at which each ray, from within, meets the wall of the x, of the y and of the z axis that it heads for."""
    depths = []
    for axis, direction in enumerate((rays.x, rays.y, rays.z)):
        low, high = (direction.dtype.type(bound[axis] - rays.origin[axis]) for bound in (room.low, room.high))
        inverse = 1 / direction  # of 0 and of -0 too, its sign is that of the wall it is multiplied with
        depths.append(np.where(inverse > 0, high, low) * inverse)
    return depths


def _paint_room(rays: Rays, room: Room, light: np.ndarray) -> _Canvas:
    depth_x, depth_y, depth_z = _wall_depths(rays, room)
    depth = np.minimum(np.minimum(depth_x, depth_y), depth_z)
    is_x, is_y = depth == depth_x, depth == depth_y
    px, py, pz = (rays.origin[i] + depth * direction for i, direction in enumerate((rays.x, rays.y, rays.z)))
    across = np.where(is_x, np.abs(rays.x), np.where(is_y, np.abs(rays.y), np.abs(rays.z)))
    face = np.where(is_x, rays.x > 0, np.where(is_y, (rays.y > 0) + np.int8(2), (rays.z > 0) + np.int8(4)))
    face = face.astype(np.uint8)
    scale = np.array([s.texels_per_metre for s in room.surfaces], np.float32)[face]
    base = np.array([s.layer * LAYER_TEXELS for s in room.surfaces], np.int32)[face]
    footprint = depth * scale * rays.pixel * np.sqrt(rays.length / across)
    texel = base + _texel(np.where(is_x, pz, px) * scale, np.where(is_y, pz, py) * scale, footprint)
    lx, ly, lz = light[0] - px, light[1] - py, light[2] - pz
    towards = np.where(is_x, np.abs(lx), np.where(is_y, np.abs(ly), np.abs(lz)))  # the light is inside of every wall
    lambert = towards / np.sqrt(lx * lx + ly * ly + lz * lz)
    return _Canvas(depth, texel, face, AMBIENT + (1 - AMBIENT) * lambert)


def _paint_solid(canvas: _Canvas, rays: Rays, solid: Solid, where: Window, light: np.ndarray, paint: int) -> None:
    """Paints a solid over what lies behind it."""
    window = rays.part(where)
    entry = _entry(window, solid)
    closer = entry < canvas.depth[where]
    if not closer.any():
        return
    seen, depth = window.part(closer), entry[closer]
    point = np.stack([rays.origin[i] + depth * direction for i, direction in enumerate((seen.x, seen.y, seen.z))])
    centre, rotation = solid.centre.astype(np.float32), solid.rotation.astype(np.float32)
    local = rotation.T @ (point - centre[:, None])  # [3, N], in the solid's own axes
    if solid.kind == "ball":
        own_normal, u, v = _ball_surface(local, solid)
    else:
        own_normal, u, v = _box_surface(local, solid)
    normal = rotation @ own_normal
    facing = np.abs(normal[0] * seen.x + normal[1] * seen.y + normal[2] * seen.z)
    scale = np.float32(solid.surface.texels_per_metre)
    footprint = depth * scale * rays.pixel * np.sqrt(seen.length / np.maximum(facing, 1e-3))
    to_light = light[:, None] - point
    lambert = np.maximum((normal * to_light).sum(0), 0) / np.sqrt((to_light * to_light).sum(0))
    canvas.depth[where][closer] = depth
    canvas.texel[where][closer] = solid.surface.layer * LAYER_TEXELS + _texel(u * scale, v * scale, footprint)
    canvas.paint[where][closer] = paint
    canvas.brightness[where][closer] = AMBIENT + (1 - AMBIENT) * lambert


def _ball_surface(local: np.ndarray, solid: Solid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal [3, N] in the ball's axes, and longitude and latitude as metres along its equator and its meridian."""
    radius = np.float32(solid.half[0])
    normal = local / radius
    longitude = np.arctan2(normal[0], normal[2])
    latitude = np.arcsin(np.clip(normal[1], -1, 1))
    return normal, longitude * radius, latitude * radius


def _box_surface(local: np.ndarray, solid: Solid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal [3, N] in the box's axes, and metres along the two sides of the face."""
    share = local / solid.half.astype(np.float32)[:, None]
    axis = np.abs(share).argmax(0)
    normal = np.zeros_like(local)
    row = np.arange(local.shape[1])
    normal[axis, row] = np.sign(share[axis, row])
    u = np.where(axis == 0, local[2], local[0])
    v = np.where(axis == 1, local[2], local[1])
    return normal, u, v


def _texel(u: np.ndarray, v: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """Index in a layer of the texel at (u, v), in texels of the finest level from the middle of the texture.

    The texture is repeated in mirror image. The level is that whose texels are about as large as the footprint.
    """
    level = (np.asarray(footprint * np.float32(2**0.5), np.float32).view(np.int32) >> 23) - 127  # floor(log2(.))
    level = np.clip(level, 0, LEVELS - 1)
    column, row = _mirrored(u) >> level, _mirrored(v) >> level
    return LEVEL_OFFSETS[level] + row * (SIDE >> level) + column


def _mirrored(coordinate: np.ndarray) -> np.ndarray:
    steps = (coordinate + np.float32(SIDE / 2 + 512 * SIDE)).astype(np.int32) & (2 * SIDE - 1)  # positive: truncates
    return np.minimum(steps, 2 * SIDE - 1 - steps)


def _window(solid: Solid, intrinsics: np.ndarray, cam_to_world: np.ndarray, size: int) -> Window | None:
    """The part of [S, H, W] that a solid's bounding box projects into; None if it is out of sight."""
    corners = solid.centre[:, None] + solid.rotation @ (_CORNERS * solid.half[:, None]) - cam_to_world[:3, 3:]
    column, row, depth = intrinsics @ (cam_to_world[:3, :3].T @ corners)
    if depth.min() < _NEAR:
        return None if depth.max() < _NEAR else (slice(None), slice(None), slice(None))
    column, row = column / depth, row / depth  # one pixel more on all sides: rounding must not cut
    left, right = max(0, int(column.min()) - 1), min(size, int(column.max()) + 2)
    top, bottom = max(0, int(row.min()) - 1), min(size, int(row.max()) + 2)
    if left >= right or top >= bottom:
        return None
    return slice(None), slice(top, bottom), slice(left, right)


def _entry(rays: Rays, solid: Solid) -> np.ndarray:
    """Depth at which each ray enters a solid; infinity where it does not."""
    offset = (rays.origin - solid.centre).astype(rays.x.dtype)
    if solid.kind == "ball":
        along = (rays.x * offset[0] + rays.y * offset[1] + rays.z * offset[2]) / (rays.length * rays.length)
        # The point of the ray nearest to the centre; more exact than the textbook's discriminant.
        x, y, z = (offset[i] - along * direction for i, direction in enumerate((rays.x, rays.y, rays.z)))
        inside = rays.x.dtype.type(solid.half[0] ** 2) - (x * x + y * y + z * z)
        entry = -along - np.sqrt(np.maximum(inside, 0)) / rays.length
        return np.where((inside > 0) & (entry > 0), entry, np.inf)
    rotation = solid.rotation.astype(rays.x.dtype)
    enter, leave = -np.inf, np.inf
    for axis in range(3):
        start = offset @ rotation[:, axis]
        slope = 1 / (rotation[0, axis] * rays.x + rotation[1, axis] * rays.y + rotation[2, axis] * rays.z)
        half = rays.x.dtype.type(solid.half[axis])
        first, second = (-half - start) * slope, (half - start) * slope
        enter = np.maximum(enter, np.minimum(first, second))
        leave = np.minimum(leave, np.maximum(first, second))
    return np.where((enter < leave) & (enter > 0), enter, np.inf)
