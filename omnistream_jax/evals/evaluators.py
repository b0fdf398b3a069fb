"""Small evaluators of a frozen backbone on labelled pictures, quick enough to run while it is being trained.

    sets = LabelledSets(train, test)
    for evaluator in (KnnEvaluator(sets), LinearEvaluator(sets)):
        for name, value in evaluator.run(model): ...

Accuracies are percentages of the test set. N, M: pictures to learn from and to score, D: width, C: classes.
"""

import dataclasses
import weakref
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from omnistream_jax.data.probes.labelled import LabelledViews
from omnistream_jax.evals.probes.imagenet import FEATURES, pooled
from omnistream_jax.evals.probes.optimizers import Sgd
from omnistream_jax.evals.probes.schedules import Cosine
from omnistream_jax.losses.normalize import l2_normalize
from omnistream_jax.model import Model
from omnistream_jax.models.probes import LinearClassifier

_ENCODED, _SCORED = 64, 256  # pictures that pass the backbone, and test pictures that are compared, at once
_LEARNING_RATE_BATCH = 256  # peak learning rates are for batches of so many, as in DINOv3's linear evaluation


@dataclasses.dataclass(frozen=True)
class LabelledFeatures:
    """Features of both sets, on the device.

    Attributes:
        train: float32 [N, D].
        test: float32 [M, D].
        train_labels: int32 [N].
        test_labels: int32 [M].
        classes: C.
    """

    train: jax.Array
    test: jax.Array
    train_labels: np.ndarray
    test_labels: np.ndarray
    classes: int


class LabelledSets:
    """Pictures to learn from and to score, and what a model sees in them.

    They are decoded once and held in the host's memory, size x size x 3 bytes each.

    Args:
        train, test: of the same classes, all views of one size.
    """

    def __init__(self, train: LabelledViews, test: LabelledViews):
        self._views = (train, test)
        self._decoded: list[tuple[np.ndarray, np.ndarray]] = []
        self._model: weakref.ref[Model] | None = None
        self._encoded: list[np.ndarray] = []

    def __len__(self) -> int:
        """How many there are to learn from."""
        return len(self._views[0])

    def read(self) -> None:
        """Decodes all pictures, where that is not done yet. Raises DataError that names a file that is damaged."""
        if not self._decoded:
            self._decoded = [_read(views) for views in self._views]

    def features(self, model: Model, kind: str) -> LabelledFeatures:
        """What `imagenet.pooled` makes of all pictures; the latest model's are kept, so that it encodes them once.

        Args:
            model: the backbone.
            kind: "cls", "mean" or "cls+mean".
        """
        self.read()
        if self._model is None or self._model() is not model:
            self._encoded = [_encode(model, images) for images, _ in self._decoded]
            self._model = weakref.ref(model)
        width = model.config.width
        columns = {"cls": slice(width), "mean": slice(width, None), "cls+mean": slice(None)}[kind]
        train, test = (jnp.asarray(features[:, columns]) for features in self._encoded)
        labels = [labels for _, labels in self._decoded]
        return LabelledFeatures(train, test, *labels, classes=len(self._views[1].source.classes))


@dataclasses.dataclass(frozen=True)
class KnnEvaluator:
    """Weighted nearest neighbours (Wu et al. 2018, as DINO's eval_knn.py): no training, one number a k.

    The k training features of the highest cosine vote for their classes with weights exp(cosine / temperature).

    Attributes:
        sets: the pictures.
        neighbours: each k, of at most N.
        temperature: of the weights.
        features: "cls", "mean" or "cls+mean"; normalised to length 1.
    """

    sets: LabelledSets
    neighbours: tuple[int, ...] = (20,)
    temperature: float = 0.07
    features: str = "cls"

    def __post_init__(self):
        _check_kind("knn_features", self.features)
        if not self.neighbours or not all(isinstance(k, int) and k >= 1 for k in self.neighbours):
            raise ValueError(f"neighbours: expected one whole number of 1 or more, or several, got {self.neighbours}")
        if max(self.neighbours) > len(self.sets):
            raise ValueError(f"neighbours: {max(self.neighbours)}, of {len(self.sets)} pictures to learn from")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def run(self, model: Model) -> Iterator[tuple[str, float]]:
        """("knn_top1", percent) of the first k, and ("knn_top1_kK", percent) of the others."""
        features = self.sets.features(model, self.features)
        for place, k in enumerate(self.neighbours):
            found = knn_classes(features, k, self.temperature)
            yield "knn_top1" + (f"_k{k}" if place else ""), float(np.mean(100.0 * (found == features.test_labels)))


@dataclasses.dataclass(frozen=True)
class LinearEvaluator:
    """A linear classifier a learning rate, all trained at once on features that are encoded once; the best one counts.

    DINOv3's linear evaluation in small: CLS token beside the mean of the patches, cross-entropy, SGD with momentum 0.9,
    a cosine to 0, no weight decay, learning rates times batch / 256. Its steps are few and its pictures not augmented.

    Attributes:
        sets: the pictures.
        learning_rates: peaks for a batch of 256.
        steps: of the training.
        batch: pictures a step, each set once an epoch.
        features: "cls", "mean" or "cls+mean".
        seed: of the order and of the first weights.
    """

    sets: LabelledSets
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
    steps: int = 500
    batch: int = 128
    features: str = "cls+mean"
    seed: int = 0

    def __post_init__(self):
        _check_kind("linear_features", self.features)
        if not self.learning_rates or not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates: expected one positive number or several, got {self.learning_rates}")
        for field in ("steps", "batch"):
            if getattr(self, field) < 1:
                raise ValueError(f"linear_{field}: expected 1 or more, got {getattr(self, field)}")

    def run(self, model: Model) -> Iterator[tuple[str, float]]:
        """("linear_top1", percent) of the best head, and ("linear_learning_rate", its peak for a batch of 256)."""
        accuracies = self.accuracies(self.sets.features(model, self.features))
        best = int(np.argmax(accuracies))
        yield "linear_top1", float(accuracies[best])
        yield "linear_learning_rate", self.learning_rates[best]

    def accuracies(self, features: LabelledFeatures) -> np.ndarray:
        """The accuracy of each learning rate's head on the test set, in percent."""
        pictures = len(features.train_labels)
        batch = min(self.batch, pictures)
        rng = np.random.default_rng(self.seed)
        epochs = -(-self.steps // (pictures // batch))
        order = [rng.permutation(pictures)[: pictures // batch * batch].reshape(-1, batch) for _ in range(epochs)]
        rates = jnp.asarray(self.learning_rates, jnp.float32) * batch / _LEARNING_RATE_BATCH
        order = np.concatenate(order)[: self.steps].astype(np.int32)
        classifier, key = LinearClassifier(features.classes), jax.random.key(self.seed)
        heads = _trained(classifier, features.train, features.train_labels, rates, order, key)
        found = jax.vmap(lambda head: classifier.apply(head, features.test).argmax(-1))(heads)
        return np.mean(100.0 * (np.asarray(found) == features.test_labels), axis=1)


def knn_classes(features: LabelledFeatures, k: int, temperature: float) -> np.ndarray:
    """int [M]: the classes that the weighted votes of the k nearest training features give the test features."""
    train, labels = l2_normalize(features.train), jnp.asarray(features.train_labels)
    test = _padded(np.asarray(l2_normalize(features.test)), _SCORED)
    parts = np.split(test, len(test) // _SCORED)
    found = [np.asarray(_voted(train, labels, part, temperature, k, features.classes)) for part in parts]
    return np.concatenate(found)[: len(features.test_labels)]


@partial(jax.jit, static_argnames=("k", "classes"))
def _voted(train: jax.Array, labels: jax.Array, test: jax.Array, temperature: float, k: int, classes: int) -> jax.Array:
    cosine = jnp.matmul(test, train.T, precision=jax.lax.Precision.HIGHEST)
    cosine, nearest = jax.lax.top_k(cosine, k)
    # Weights relative to the nearest: the same votes, and no overflow at low temperatures.
    weights = jnp.exp((cosine - cosine[:, :1]) / temperature)
    return jnp.einsum("mk,mkc->mc", weights, jax.nn.one_hot(labels[nearest], classes)).argmax(-1)


@partial(jax.jit, static_argnums=0)
def _trained(
    classifier: LinearClassifier,
    features: jax.Array,
    labels: jax.Array,
    rates: jax.Array,
    order: jax.Array,
    key: jax.Array,
) -> dict:
    """The heads of all learning rates after all steps; `order` [steps, batch] has the rows of each step."""
    optimizer, schedule = Sgd(momentum=0.9), Cosine(len(order))

    def loss(head: dict, rows: jax.Array) -> jax.Array:
        logits = classifier.apply(head, features[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def train(rate: jax.Array) -> dict:
        def step(carry: tuple, now: tuple) -> tuple[tuple, None]:
            (head, state), (number, rows) = carry, now
            gradients = jax.grad(loss)(head, rows)
            return optimizer.update(gradients, state, head, number, rate * schedule(number), 0.0), None

        head = classifier.init(key, features[:1])
        return jax.lax.scan(step, (head, optimizer.init(head)), (jnp.arange(len(order)), order))[0][0]

    return jax.vmap(train)(rates)


def _read(views: LabelledViews) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, S, S, 3] and int32 [N]."""
    images = np.empty((len(views), views.size, views.size, 3), np.uint8)
    labels = np.empty(len(views), np.int32)
    for index in range(len(views)):
        sample = views.sample(index)
        images[index], labels[index] = sample["frames"][0], sample["label"]
    return images, labels


def _encode(model: Model, images: np.ndarray) -> np.ndarray:
    """float32 [N, 2 D], CLS and mean, in batches of one size: one program for all."""
    found = []
    for start in range(0, len(images), _ENCODED):
        part = _padded(images[start : start + _ENCODED], _ENCODED)
        found.append(np.asarray(pooled(model.encode(part[:, None], layers=()), "cls+mean")))
    return np.concatenate(found)[: len(images)]


def _padded(array: np.ndarray, multiple: int) -> np.ndarray:
    """Rows of zeros behind, up to a multiple."""
    return np.pad(array, [(0, -len(array) % multiple), *[(0, 0)] * (array.ndim - 1)])


def _check_kind(field: str, kind: str) -> None:
    if kind not in FEATURES:
        raise ValueError(f"{field}: expected {', '.join(FEATURES)}, got {kind!r}")
