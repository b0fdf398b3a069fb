"""Vision-language alignment, L_cap: a decoder tells what an image shows (OmniStream eq. 9).

Letters: B rows, K images of a row, S their side in pixels, P = h * w visual tokens of an image, L text tokens of a row,
d and D the widths of the backbone and of the decoder.

A row for the decoder is [visual tokens of image 1 .. K, text tokens]. A token sees what stands before it in its own
segment, as in Qwen, and a text all of its image besides; nothing else: an image that several texts are about is encoded
once, and each of them is told as if it were the only one (P = 2, K = 2, two texts about the first image):

    token       v   v   v   v     t   t   t   t   t   .
    segment     100 100 200 200   101 101 102 102 201 0
    position    0   1   0   1     2   3   2   3   2   .
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from omnistream_jax.data.captions import CaptionData
from omnistream_jax.losses.language import language_loss
from omnistream_jax.losses.means import Mean
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.projector import DECODER, PROJECTOR, Projector
from omnistream_jax.models.qwen3 import Qwen3, init_decoder, output_matrix
from omnistream_jax.ops.rope import random_scale
from omnistream_jax.sharding import batch_shards
from omnistream_jax.tasks.task import Params, Teachers
from omnistream_jax.utils.segments import SHARED
from omnistream_jax.utils.trees import leaf_name

_KERNEL_STD = 0.02  # of both modules' own initialisation


@dataclasses.dataclass(frozen=True)
class CaptionTask:
    """A `Task`; see `tasks/task.py`.

    Attributes:
        name, weight, data: as of every task.
        backbone: the student's module.
        projector, decoder: what is trained on top; the decoder's `remat` is the backbone's.
        chunk: tokens of a device whose logits are held at once, see `losses/language.py`.
        kernel_std: standard deviation of the projector's and the decoder's kernels at initialisation; the decoder's
            embedding keeps its own.
        rope_jitter: as in `SelfSupervisionSettings`.
        micro_batches: as of every task; the mean stays that over all tokens of the whole batch.
    """

    name: str
    weight: float
    data: CaptionData
    backbone: Backbone
    projector: Projector
    decoder: Qwen3
    chunk: int = 256
    kernel_std: float = _KERNEL_STD
    rope_jitter: float = 2.0
    has_teacher: bool = False
    micro_batches: int = 1

    @property
    def heads(self) -> Mapping[str, Callable[[jax.Array], Params]]:
        """The projector and the decoder."""
        token = jnp.zeros((1, self.backbone.config.width))
        return {
            PROJECTOR: lambda key: self._scaled(self.projector.init(key, token)["params"]),
            DECODER: lambda key: self._scaled(init_decoder(self.decoder, key)),
        }

    def loss(
        self, params: Params, teachers: Teachers, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean cross-entropy of the answers' tokens; see `Task.loss` and `data/schema.py:CaptionBatch`.

        Metrics: "caption", the same; "token_accuracy", the share of these tokens that are the likeliest ones;
        "answers_cut", the share of the images with an answer that was longer than its room; and "texts_per_image".
        """
        tokens, segment = batch["tokens"], batch["segment"]
        visual = self._visual_tokens(params, batch["image"], random_scale(key, self.rope_jitter))
        hidden = self._hidden(params, visual, tokens, segment, batch["position"])
        loss, accuracy = language_loss(
            hidden[:, :-1],
            output_matrix(params[DECODER], self.decoder.config),
            tokens[:, 1:],
            _learned(batch),
            chunk=self.chunk,
            shards=batch_shards(),
        )
        images = {"answers_cut": batch["cut"].mean(), "texts_per_image": batch["texts"].mean()}
        return loss, {"caption": loss, "token_accuracy": accuracy, **images}

    def means(
        self, params: Params, teachers: Teachers, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> dict[str, list[Mean]]:
        """The loss and its metrics as means, over the answers' tokens or over the images; see `Task.means`."""
        loss, metrics = self.loss(params, teachers, batch, key)
        counts = {"answers_cut": batch["cut"].size, "texts_per_image": batch["texts"].size}
        learned = _learned(batch).sum()

        def mean(name: str, value: jax.Array) -> list[Mean]:
            count = jnp.asarray(counts.get(name, learned), jnp.float32)
            return [Mean(value * count, count)]

        return {name: mean(name, value) for name, value in {"loss": loss, **metrics}.items()}

    def _visual_tokens(self, params: Params, images: jax.Array, rope_scale: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Images [B, K, S, S, 3], each a clip of one frame -> [B, K, P, D]."""
        rows, count = images.shape[:2]
        frames = images.reshape(rows * count, 1, *images.shape[2:])
        out = self.backbone.apply({"params": params["backbone"]}, frames, layers=(), rope_scale=rope_scale)
        patches = out.patches  # [B K, 1, h, w, d]
        patches = patches.reshape(rows, count, -1, patches.shape[-1])
        return self.projector.apply({"params": params[PROJECTOR]}, patches)

    def _hidden(
        self, params: Params, visual: jax.Array, tokens: jax.Array, segment: jax.Array, position: jax.Array
    ) -> jax.Array:
        """The decoder's hidden states at the text tokens, [B, L, D]."""
        rows, count, per_image, width = visual.shape
        place = jnp.arange(count * per_image)
        shape = (rows, count * per_image)
        decoder = {"params": params[DECODER]}
        text = self.decoder.apply(decoder, tokens, method="embed")
        embeddings = jnp.concatenate([visual.reshape(*shape, width), text], axis=1)
        images = (place // per_image + 1) * SHARED
        segments = jnp.concatenate([jnp.broadcast_to(images, shape), segment], axis=1)
        positions = jnp.concatenate([jnp.broadcast_to(place % per_image, shape), per_image + position], axis=1)
        return self.decoder.apply(decoder, embeddings, positions, segments)[:, shape[1] :]

    def _scaled(self, params: Params) -> Params:
        """Fresh parameters with kernels of `kernel_std`."""

        def scale(path: tuple, leaf: jax.Array) -> jax.Array:
            return leaf * (self.kernel_std / _KERNEL_STD) if leaf_name(path).endswith("kernel") else leaf

        return jax.tree_util.tree_map_with_path(scale, params)


def _learned(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Which tokens but the first of a row are to be told, bool [B, L - 1].

    A token is predicted by the one before it in its text. The first of a text, which has none, is a prompt's.
    """
    segment = batch["segment"]
    return batch["target_mask"][:, 1:] & (segment[:, 1:] == segment[:, :-1])
