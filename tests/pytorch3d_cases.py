"""A writer of PyTorch3D's FrameAnnotations, by the definition of its axes; imports nothing of ours.

A point is a row, X_camera = X_world @ R + T, in axes left, up, forward; a pixel is
(width / 2 - unit * (focal * left / forward + centre), height / 2 - unit * (focal * up / forward + centre)).
"""

import gzip
import json

import numpy as np
from PIL import Image


def viewpoint(intrinsics, cam_to_world, height, width, intrinsics_format):
    """The JSON value of a camera that is given with OpenCV's axes."""
    right, down, forward, origin = cam_to_world[:3].T
    axes = np.stack([-right, -down, forward], axis=1)  # a column each: a row's products with them are its coordinates
    unit = np.array([width, height]) / 2
    if intrinsics_format == "ndc_isotropic":
        unit = np.full(2, min(height, width) / 2)
    return {
        "R": axes.tolist(),
        "T": (-origin @ axes).tolist(),
        "focal_length": (np.diag(intrinsics)[:2] / unit).tolist(),
        "principal_point": ((np.array([width, height]) / 2 - intrinsics[:2, 2]) / unit).tolist(),
        "intrinsics_format": intrinsics_format,
    }


def write_float16_png(path, depth):
    """float16 whose bits are those of a 16-bit PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(depth.astype(np.float16).view(np.uint16)).save(path)


def write_jgz(path, value):
    """Gzipped JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(value).encode(), 1))
