"""Self-supervised tasks on a tiny backbone with random weights, and L_ssl written again in plain float64 NumPy."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from backbone_cases import random_model
from scipy.special import erf, logsumexp
from training_cases import small_config

from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.losses.gram import resize_patches
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.step import TrainState
from omnistream_jax.tasks.build import build_tasks
from omnistream_jax.tasks.self_supervision import SelfSupervisionTask

STEP = 5


def random_tasks(**overrides: object) -> tuple[dict[str, SelfSupervisionTask], TrainState]:
    """The tasks of `small_config`, by kind, and a state whose student, teacher and Gram teacher are all unlike."""
    config = small_config(**overrides)
    student, gram = random_model(seed=0), random_model(seed=1)
    tasks = build_tasks(config, Backbone(student.config), gram.config)
    heads = {name: jax.eval_shape(init, jax.random.key(0)) for name, init in tasks[0].heads.items()}
    generator = np.random.default_rng(2)

    def draw(path, leaf):
        scale = 1.5 * leaf.shape[0] ** -0.5 if path[-1].key == "kernel" else 0.3
        return jnp.asarray(scale * generator.normal(size=leaf.shape), jnp.float32)

    def shift(leaf):
        noise = 0.1 * (0.1 + np.std(leaf)) * generator.normal(size=leaf.shape)
        return jnp.asarray(np.asarray(leaf) + noise, jnp.float32)

    params = {"backbone": student.params, **jax.tree_util.tree_map_with_path(draw, heads)}
    ema = jax.tree.map(shift, params)
    state = TrainState(step=jnp.int32(STEP), params=params, optimizer=(), ema=ema, gram=gram.params)
    return {task.kind: task for task in tasks}, state


def first_batch(task: SelfSupervisionTask) -> dict[str, np.ndarray]:
    with build_pipeline({task.name: task.data}, seed=0, prefetch=0) as pipeline:
        batch = next(pipeline)[task.name]
    return {name: np.asarray(array) for name, array in batch.items() if name != "record"}


@dataclasses.dataclass(frozen=True)
class Crop:
    """One crop's features, float64."""

    cls: np.ndarray  # [d], the mean over time
    patches: np.ndarray  # [T, h, w, d]


@functools.partial(jax.jit, static_argnums=0)
def _apply(backbone: Backbone, params, crop: np.ndarray, mask: np.ndarray | None):
    return backbone.apply({"params": params}, crop[None], masks=None if mask is None else mask[None], layers=())


def encode(backbone: Backbone, params, crops: np.ndarray, masks: np.ndarray | None = None) -> list[list[Crop]]:
    """Features of crops [B, C, T, H, W, 3] by sample and crop, each crop in a pass of its own."""

    def one(sample: int, view: int) -> Crop:
        out = _apply(backbone, params, crops[sample, view], None if masks is None else masks[sample, view])
        cls, patches = (np.asarray(array[0], np.float64) for array in (out.cls, out.patches))
        return Crop(cls.mean(axis=0), patches)

    return [[one(sample, view) for view in range(crops.shape[1])] for sample in range(crops.shape[0])]


def head(params: Mapping, features: np.ndarray) -> np.ndarray:
    """The DINO head: [..., d] -> [..., K]."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    count = len(params) - 1
    for i in range(count):
        features = features @ params[f"mlp_{i}"]["kernel"] + params[f"mlp_{i}"]["bias"]
        if i < count - 1:
            features = 0.5 * features * (1 + erf(features / np.sqrt(2)))
    return normalized(features) @ params["last_layer"]["kernel"]


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))


def sinkhorn(logits: np.ndarray, temperature: float) -> np.ndarray:
    """SwAV's three rounds of equal prototypes, then equal rows: [R, K] -> [R, K]."""
    shares = np.exp((logits - logits.max()) / temperature)
    rows, prototypes = shares.shape
    for _ in range(3):
        shares = shares / shares.sum(axis=0, keepdims=True) / prototypes
        shares = shares / shares.sum(axis=1, keepdims=True) / rows
    return shares * rows


def entropy(probs: np.ndarray) -> float:
    probs = probs[probs > 0]
    return float(-(probs * np.log(probs)).sum())


def koleo(features: list[np.ndarray]) -> float:
    unit = [normalized(feature) for feature in features]
    total = 0.0
    for i, feature in enumerate(unit):
        others = [other for j, other in enumerate(unit) if j != i]
        nearest = max(others, key=lambda other, feature=feature: feature @ other)
        total -= np.log(np.linalg.norm(feature - nearest + 1e-8) + 1e-8)
    return total / len(unit)


def gram(student: np.ndarray, teacher: np.ndarray) -> float:
    """Of one crop's patches [h, w, d]; the teacher's map may be finer."""
    teacher = np.asarray(resize_patches(jnp.asarray(teacher[None], jnp.float32), *student.shape[:2])[0], np.float64)
    student, teacher = (normalized(patches.reshape(-1, patches.shape[-1])) for patches in (student, teacher))
    return float(((student @ student.T - teacher @ teacher.T) ** 2).mean())


def reference_loss(
    task: SelfSupervisionTask, state: TrainState, batch: Mapping[str, np.ndarray]
) -> tuple[float, dict[str, float]]:
    """L_ssl and its terms, crop by crop; the settings must have no jitter of the rotary positions."""
    settings, masks = task.settings, batch["masks"]
    assert settings.rope_jitter == 1.0
    samples, views, locals_ = len(masks), range(2), range(batch["local_crops"].shape[1])
    first, last = settings.teacher_temperature
    temperature = first + (last - first) * min(STEP / settings.teacher_warmup_steps, 1.0)

    student = encode(task.backbone, state.params["backbone"], batch["global_crops"], masks)
    local = encode(task.backbone, state.params["backbone"], batch["local_crops"])
    teacher = encode(task.backbone, state.ema["backbone"], batch["global_crops"])

    def cross_entropy(target: np.ndarray, logits: np.ndarray) -> float:
        scaled = logits / settings.student_temperature
        return float(-(target * (scaled - logsumexp(scaled))).sum())

    def compare(crops: list[list[Crop]], pairs: list[tuple[int, int]]) -> float:
        """The mean over samples and pairs (student's crop, teacher's crop)."""
        logits = [[head(state.params["dino_head"], crop.cls) for crop in row] for row in crops]
        terms = [cross_entropy(targets[b, j], logits[b][i]) for b in range(samples) for i, j in pairs]
        return float(np.mean(terms))

    teacher_logits = np.stack([head(state.ema["dino_head"], crop.cls) for row in teacher for crop in row])
    centred = sinkhorn(teacher_logits, temperature)
    targets = centred.reshape(samples, len(views), -1)
    pairs_global = [(i, j) for i in views for j in views if i != j]
    pairs_local = [(i, j) for i in locals_ for j in views]
    terms = {
        "dino_global": compare(student, pairs_global),
        "dino_local": compare(local, pairs_local),
        f"ibot_{task.kind}": _ibot(state, student, teacher, masks, temperature, cross_entropy),
        "koleo": float(np.mean([koleo([row[g].cls for row in student]) for g in views])),
        "teacher_entropy": entropy(softmax(teacher_logits / temperature).mean(axis=0)),
        "target_entropy": float(np.mean([entropy(row) for row in centred])),
    }
    share = len(pairs_global) / (len(pairs_global) + len(pairs_local))
    total = share * terms["dino_global"] + (1 - share) * 0.5 * terms["dino_local"]
    total += terms[f"ibot_{task.kind}"] + 0.1 * len(views) * terms["koleo"]
    if task.kind == "image":
        crops = batch.get("gram_crops", batch["global_crops"])
        anchors = encode(task.gram_backbone, state.gram, crops)
        terms["gram"] = float(
            np.mean([gram(student[b][g].patches[0], anchors[b][g].patches[0]) for b in range(samples) for g in views])
        )
        total += terms["gram"]
    return total, terms


def _ibot(
    state: TrainState,
    student: list[list[Crop]],
    teacher: list[list[Crop]],
    masks: np.ndarray,
    temperature: float,
    cross_entropy: Callable[[np.ndarray, np.ndarray], float],
) -> float:
    """The mean over the masked patches of a crop, then over all crops; one without masks counts as 0."""
    places = [(b, g, place) for b, g in np.ndindex(masks.shape[:2]) for place in np.argwhere(masks[b, g])]
    logits = np.stack([head(state.ema["ibot_head"], teacher[b][g].patches[tuple(place)]) for b, g, place in places])
    total = 0.0
    for (b, g, place), target in zip(places, sinkhorn(logits, temperature), strict=True):
        answer = head(state.params["ibot_head"], student[b][g].patches[tuple(place)])
        total += cross_entropy(target, answer) / masks[b, g].sum()
    return total / masks[:, :, 0, 0, 0].size
