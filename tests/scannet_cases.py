"""ScanNet v2 as it is published, written by its conventions; it imports nothing of ours."""

from pathlib import Path

import numpy as np
from PIL import Image
from world_cases import World


def write_scannet(root: Path, worlds: dict[str, World], listed: tuple[str, ...] = (), split: str = "train") -> Path:
    """Writes each world as the scene of its name; the split's list names them and those of `listed`, which are not."""
    for name, world in worlds.items():
        _write_scene(root / "scans" / name, world)
    (root / f"scannetv2_{split}.txt").write_text("".join(f"{name}\n" for name in (*worlds, *listed)))
    return root


def _write_scene(scene: Path, world: World) -> None:
    for folder in ("color", "depth", "pose", "intrinsic"):
        (scene / folder).mkdir(parents=True)
    height, width = world.depth.shape[1:]
    for t, (picture, depth, pose) in enumerate(zip(world.frames, world.depth, world.cam_to_world, strict=True)):
        colour = Image.fromarray(picture).resize((2 * width, 2 * height), Image.Resampling.NEAREST)
        colour.save(scene / f"color/{t}.jpg", quality=95)
        Image.fromarray(np.rint(depth * 1000).astype(np.uint16)).save(scene / f"depth/{t}.png")
        np.savetxt(scene / f"pose/{t}.txt", pose)
    intrinsics = np.eye(4)
    intrinsics[:3, :3] = world.intrinsics
    intrinsics[:2, 2] -= 0.5  # pixel centres at whole numbers
    np.savetxt(scene / "intrinsic/intrinsic_depth.txt", intrinsics)
