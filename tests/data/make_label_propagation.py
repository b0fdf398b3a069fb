"""Writes label_propagation.safetensors: what the two original programs make of the same features and first labels.

    python make_label_propagation.py DINO/eval_video_segmentation.py DINOV3/notebooks/segmentation_tracking.ipynb

Needs PyTorch, and the two files of github.com/facebookresearch/dino (7c446df) and dinov3 (6876159). Their functions
are run as they stand, on a CPU; the loops around them, which read pictures and write files, are said anew here.
"""

import argparse
import ast
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file

FRAMES, HEIGHT, WIDTH, DIMENSION, CHANNELS, PATCH, RADIUS, CONTEXT = 11, 7, 9, 16, 4, 8, 3, 7
ORIGINAL = (61, 83)  # pixels of the videos that the masks are for
NAMES = ("restrict_neighborhood", "norm_mask", "label_propagation", "propagate", "make_neighborhood_mask")


def functions(source: str, names: tuple[str, ...]) -> dict:
    """The named functions of a Python source, on a CPU."""
    source = source.replace(".cuda(non_blocking=True)", "").replace(".cuda()", "").replace('device="cuda"', "")
    space = {"torch": torch, "F": F, "np": np, "Tensor": torch.Tensor}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []  # torch.compile and a cache
            exec(compile(ast.unparse(node), node.name, "exec"), space)
    return space


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Features that drift to the right and change a little, float32 [T, h, w, D]; labels float32 [h, w, C]."""
    rng = np.random.default_rng(0)
    field = rng.normal(size=(HEIGHT, WIDTH + FRAMES, DIMENSION))
    frames = [
        field[:, FRAMES - t // 2 :][:, :WIDTH] + 0.5 * rng.normal(size=(HEIGHT, WIDTH, DIMENSION))
        for t in range(FRAMES)
    ]
    mask = np.zeros((HEIGHT, WIDTH), int)
    mask[1:4, 1:4], mask[2:6, 5:8], mask[6, 0] = 1, 2, 3
    return np.stack(frames).astype(np.float32), np.eye(CHANNELS, dtype=np.float32)[mask]


def by_dino(path: Path, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels [T - 1, h, w, C] and masks uint8 [T - 1, H, W]."""
    space = functions(path.read_text(), NAMES[:3])
    space["args"] = args = argparse.Namespace(size_mask_neighborhood=RADIUS, topk=5, n_last_frames=CONTEXT)
    space["extract_feature"] = lambda model, frame, return_h_w=False: (frame, HEIGHT, WIDTH)
    flat = torch.from_numpy(features).reshape(FRAMES, -1, DIMENSION)
    first, queue, near, soft, masks = torch.from_numpy(labels).permute(2, 0, 1)[None], [], None, [], []
    for t in range(1, FRAMES):
        contexts = [(flat[0].T, first), *queue]
        out, feature, near = space["label_propagation"](
            args, None, flat[t], [pair[0] for pair in contexts], [pair[1] for pair in contexts], near
        )
        queue = [*queue, (feature, out.clone())][-CONTEXT:]
        soft.append(out[0].permute(1, 2, 0).numpy().copy())
        large = F.interpolate(
            out, scale_factor=PATCH, mode="bilinear", align_corners=False, recompute_scale_factor=False
        )
        mask = torch.max(space["norm_mask"](large[0]), dim=0)[1].numpy().astype(np.uint8)
        masks.append(np.array(Image.fromarray(mask).resize(ORIGINAL[::-1], 0)))
    return np.stack(soft), np.stack(masks)


def by_dinov3(path: Path, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by the notebook."""
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    space = functions("\n".join(cells), (*NAMES[3:], "postprocess_probs"))
    unit = F.normalize(torch.from_numpy(features), dim=-1, p=2)
    near = space["make_neighborhood_mask"](HEIGHT, WIDTH, size=RADIUS, shape="circle")
    first, features_queue, labels_queue, soft, masks = torch.from_numpy(labels), [], [], [], []
    for t in range(1, FRAMES):
        context = torch.stack([unit[0], *features_queue]), torch.stack([first, *labels_queue])
        out = space["propagate"](unit[t], *context, near, 5, 0.2)
        features_queue, labels_queue = [*features_queue, unit[t]][-CONTEXT:], [*labels_queue, out][-CONTEXT:]
        soft.append(out.numpy())
        large = F.interpolate(out.movedim(-1, -3)[None], size=ORIGINAL, mode="nearest")
        masks.append(space["postprocess_probs"](large)[0].argmax(0).to(torch.uint8).numpy())
    return np.stack(soft), np.stack(masks)


def main() -> None:
    """See above."""
    features, labels = inputs()
    tensors = {"features": features, "first_labels": labels}
    for name, run, path in (("dino", by_dino, sys.argv[1]), ("dinov3", by_dinov3, sys.argv[2])):
        tensors[f"{name}/labels"], tensors[f"{name}/masks"] = map(
            np.ascontiguousarray, run(Path(path), features, labels)
        )
    sizes = {"patch": str(PATCH), "radius": str(RADIUS), "context": str(CONTEXT)}
    save_file(tensors, Path(__file__).with_name("label_propagation.safetensors"), sizes)


if __name__ == "__main__":
    main()
