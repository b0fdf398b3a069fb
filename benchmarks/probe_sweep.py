"""What a sweep of 13 learning rates costs beside one: a whole step of the ImageNet probe, encoding included.

    python benchmarks/probe_sweep.py --model=tiny --size=224 --batch=32

Steps of both take turns in one run, so that both see the same machine. Prints the median of each, their ratio, and the
same for steps on features that are encoded before.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax.evals.probes.base import Heads
from omnistream_jax.evals.probes.engine import Trainer, init_state, make_encode
from omnistream_jax.evals.probes.imagenet import ImageProbe
from omnistream_jax.evals.probes.optimizers import Sgd
from omnistream_jax.evals.probes.schedules import Cosine
from omnistream_jax.model import build_model
from omnistream_jax.models.presets import PRESETS, preset
from omnistream_jax.sharding import global_batch, make_mesh

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)  # DINOv3's and the paper's


@dataclasses.dataclass(frozen=True)
class NoPictures:
    """Stands for a data set: the steps are given random frames."""

    classes: tuple[str, ...]


def make_probe(rates: tuple[float, ...], classes: int, batch: int, size: int) -> ImageProbe:
    """The probe of the recipe imagenet with some of its learning rates."""
    none = NoPictures(tuple(map(str, range(classes))))
    return ImageProbe(
        heads=Heads.sweep(rates, (0.0,), batch / 256),
        batch=batch,
        schedule=Cosine(12_500),
        optimizer=Sgd(0.9),
        feature_kind="cls+mean",
        train=none,
        heldout=none,
        size=size,
        resize=size,
        evaluate_batch=batch,
    )


def alternate(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The median seconds of each, one call of each in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()

    config, mesh = preset(arguments.model), make_mesh()
    empty = build_model(config, {}, dtype=arguments.dtype)
    params = jax.jit(empty.backbone.init)(jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]
    generator = np.random.default_rng(0)
    shape = (arguments.batch, 1, arguments.size, arguments.size, 3)
    batch = {
        "frames": generator.integers(0, 256, shape, np.uint8),
        "label": generator.integers(0, arguments.classes, arguments.batch).astype(np.int32),
    }
    runs = {}
    with jax.set_mesh(mesh):
        batch = global_batch(batch, mesh)
        encode = make_encode(dataclasses.replace(empty, params=params), mesh)
        for rates in (RATES, RATES[6:7]):
            probe = make_probe(rates, arguments.classes, arguments.batch, arguments.size)
            trainer = Trainer(probe, 0, mesh)
            shapes = trainer.feature_shapes(encode, batch["frames"])
            features, labels = trainer.features(encode, batch["frames"]), {"label": batch["label"]}
            states = [init_state(probe, shapes, 0, mesh) for _ in range(2)]

            def whole(trainer: Trainer = trainer, states: list = states) -> None:
                states[0] = jax.block_until_ready(trainer.step(encode, states[0], batch))[0]

            def on_features(
                trainer: Trainer = trainer, states: list = states, features=features, labels=labels
            ) -> None:
                states[1] = jax.block_until_ready(trainer.step_on_features(states[1], features, labels))[0]

            runs |= {f"whole step {len(rates)}": whole, f"on features {len(rates)}": on_features}
        seconds = alternate(runs, arguments.repeats)

    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(
        f"{arguments.model}, {arguments.size} px, batch {arguments.batch}, {arguments.classes} classes, "
        f"{arguments.dtype}, jax {jax.__version__}, {device}"
    )
    print(f"| | {len(RATES)} heads, ms | 1 head, ms | ratio |\n|---|---|---|---|")
    for name in ("whole step", "on features"):
        many, one = (1e3 * seconds[f"{name} {count}"] for count in (len(RATES), 1))
        print(f"| {name} | {many:.2f} | {one:.2f} | {many / one:.3f} |")


if __name__ == "__main__":
    main()
