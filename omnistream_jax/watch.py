"""What the loop of training tells about itself: how fast it is, where its time goes, how well it uses the devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.flops import peak_flops, task_flops
from omnistream_jax.tasks.task import Task
from omnistream_jax.utils.speed import Speed, StepClock

PARTS = ("data", "device", "save", "other")


class Watch:
    """Counts the steps of this run, over all of its processes, which have equal shares of every batch.

    In the loop: `charge` after each part of a step, `count` once a step, `speed` where a line is written.

    Args:
        tasks: of the run.
        dtype: of the backbone's activations.
        devices: that the run uses.
        clock: for tests.
    """

    def __init__(self, tasks: Sequence[Task], dtype: jnp.dtype, devices: int, clock: StepClock | None = None):
        self._tasks = {task.name: task for task in tasks}
        self._clock = clock or StepClock()
        peak = peak_flops(jax.devices()[0], dtype)
        self._peak = None if peak is None else peak * devices
        self._fresh()

    def charge(self, part: str) -> None:
        """The time since the last charge was spent on one of PARTS."""
        self._clock.charge(part)

    def count(self, step: int, batches: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """A step, the first being 1, with this process's batches by task."""
        self._steps += 1
        processes = jax.process_count()
        for name, batch in batches.items():
            images, frames = (processes * number for number in count_inputs(batch))
            self._images, self._frames = self._images + images, self._frames + frames
            if self._peak is not None:
                learned = processes * int(batch["target_mask"].sum()) if "target_mask" in batch else None
                self._flops += task_flops(self._tasks[name], learned_tokens=learned, step=step - 1).total

    def speed(self) -> Speed:
        """Of the steps that were counted since the last call."""
        seconds = dict.fromkeys(PARTS, 0.0) | self._clock.take()
        counts = {name: count for name, count in (("images", self._images), ("frames", self._frames)) if count}
        share = None if self._peak is None else self._flops / (sum(seconds.values()) * self._peak)
        speed = Speed(self._steps, seconds, counts, share)
        self._fresh()
        return speed

    def _fresh(self) -> None:
        self._steps, self._images, self._frames, self._flops = 0, 0, 0, 0.0


def count_inputs(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Images, and frames of clips, in a batch of data/schema.py; a sample counts once, whatever its crops.

    Raises ValueError for a batch of another kind.
    """
    if "global_crops" in batch:
        samples, _, frames = batch["global_crops"].shape[:3]
        return (samples, 0) if frames == 1 else (0, samples * frames)
    if "frames" in batch:
        return 0, batch["frames"].shape[0] * batch["frames"].shape[1]
    if "image" in batch:
        return batch["image"].shape[0] * batch["image"].shape[1], 0
    raise ValueError(f"a batch of {', '.join(batch)} holds neither images nor frames")
