"""The motions of the world: what the one moving thing of a clip does, told apart by time alone.

Directions are those of the first frame's camera, made level; clockwise is as seen from above. All motions begin at the
same place, at share 0 of the clip, and a part of a clip shows the same motion as the whole. Who knew which thing moves
would tell the class (chance 0.09) from its place in the last frame alone in 0.28 of clips, and never from the first.
"""

from __future__ import annotations

import dataclasses

import numpy as np

MOTIONS = (
    "stays still",
    "moves to the left",
    "moves to the right",
    "comes closer",
    "moves away",
    "rises",
    "sinks",
    "turns clockwise",
    "turns anticlockwise",
    "speeds up",
    "slows down",
)
"""The motion classes, by number, as captions say them. What speeds up or slows down moves to either side."""
TURNING = (MOTIONS.index("turns clockwise"), MOTIONS.index("turns anticlockwise"))
VERTICAL_SHARE = 0.6
"""Rising and sinking cover this share of the way of the other motions: rooms are not high."""
_DOWN = np.array([0.0, 1.0, 0.0])


@dataclasses.dataclass(frozen=True)
class Path:
    """The amounts of a motion, drawn without regard to its class.

    Attributes:
      right: [3], level unit vector to the right of the first camera.
      forward: [3], level unit vector away from it.
      reach: metres covered within the clip.
      angle: radians turned within the clip.
      side: 1.0 or -1.0, right or left, of what speeds up or slows down.
    """

    right: np.ndarray
    forward: np.ndarray
    reach: float
    angle: float
    side: float


def offset(motion: int, path: Path, share: float) -> np.ndarray:
    """[3], how far from its first place the moving thing is, in metres.

    Args:
      motion: number in MOTIONS.
      path: how far and how fast.
      share: of the clip that has gone by, 0 to 1.
    """
    name, reach = MOTIONS[motion], path.reach
    if name == "moves to the left":
        return -path.right * reach * share
    if name == "moves to the right":
        return path.right * reach * share
    if name == "comes closer":
        return -path.forward * reach * share
    if name == "moves away":
        return path.forward * reach * share
    if name == "rises":
        return -_DOWN * reach * share * VERTICAL_SHARE
    if name == "sinks":
        return _DOWN * reach * share * VERTICAL_SHARE
    if name == "speeds up":
        return path.side * path.right * reach * share**2
    if name == "slows down":
        return path.side * path.right * reach * (1 - (1 - share) ** 2)
    return np.zeros(3)


def turn(motion: int, path: Path, share: float) -> np.ndarray:
    """[3, 3], the rotation of the moving thing since its first place; arguments as of `offset`."""
    if motion not in TURNING:
        return np.eye(3)
    return about_y(path.angle * share * (1 if MOTIONS[motion] == "turns clockwise" else -1))


def about_y(angle: float) -> np.ndarray:
    """[3, 3]: a turn about the axis that points down, positive clockwise as seen from above."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def swept_offsets(path: Path) -> np.ndarray:
    """[N, 3], places that some class passes through: what is kept clear and in sight whichever class is shown."""
    ends = [(path.right, 1.0), (-path.right, 1.0), (path.forward, 1.0), (-path.forward, 1.0)]
    ends += [(_DOWN, VERTICAL_SHARE), (-_DOWN, VERTICAL_SHARE)]
    halves = [direction * path.reach * amount * share for direction, amount in ends for share in (0.5, 1.0)]
    return np.array([np.zeros(3), *halves])
