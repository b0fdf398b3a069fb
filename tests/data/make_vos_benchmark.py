"""Writes vos_benchmark.json: what the package vos-benchmark 0.1.0 says of the 50 clips of tests/vos_cases.py.

    pip install vos-benchmark; python make_vos_benchmark.py    (beside the package omnistream_jax)

The package wants opencv-python, which lies where opencv-python-headless does, and so is no part of the extra `test`.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from vos_benchmark.evaluator import Evaluator
from vos_cases import random_clip

CLIPS = 50


def scores(seed: int) -> dict:
    """J and F of each object in percent, and a digest of the masks that they are of."""
    prediction, truth = random_clip(seed)
    evaluator = Evaluator()
    for predicted, true in zip(prediction[1:-1], truth[1:-1], strict=True):
        evaluator.feed_frame(predicted, true)
    region, boundary = evaluator.conclude()
    digest = hashlib.sha256(prediction.tobytes() + truth.tobytes()).hexdigest()
    return {
        "digest": digest,
        "j": {n: float(v) for n, v in region.items()},
        "f": {n: float(v) for n, v in boundary.items()},
    }


if __name__ == "__main__":
    content = [scores(seed) for seed in range(CLIPS)]
    Path(__file__).with_name("vos_benchmark.json").write_text(json.dumps(content, indent=0) + "\n")
