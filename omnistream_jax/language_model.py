"""A backbone with its projector and decoder: what it says about images and clips.

Letters: B rows, T frames, H x W pixels, S the model's side, h x w patches, d and D the widths of backbone and decoder.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omnistream_jax import model as model_lib
from omnistream_jax.convert.files import WeightsError, check_shapes, find_directory, read_json, read_tensor_file
from omnistream_jax.convert.qwen3 import load_decoder, save_decoder
from omnistream_jax.data.boxes import malformed_boxes, move_boxes, restore_boxes
from omnistream_jax.data.captions import letterbox
from omnistream_jax.data.chat import Chat, load_chat
from omnistream_jax.data.errors import DataError
from omnistream_jax.generate import embed_prompts, generate
from omnistream_jax.model import Model
from omnistream_jax.models.projector import DECODER, PROJECTOR, Projector, project
from omnistream_jax.models.qwen3 import Qwen3, Qwen3Config, decoding_params
from omnistream_jax.utils.files import write_json, written_aside
from omnistream_jax.utils.tensor_file import write_tensors
from omnistream_jax.utils.trees import named_leaves, nest

CONFIG_NAME, PROJECTOR_NAME, DECODER_FOLDER = "language.json", "projector.safetensors", "decoder"

Pictures = np.ndarray | Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A backbone, a projector and a decoder with their weights, and the decoder's tokenizer.

    Attributes:
        model: the backbone.
        projector, decoder: the Linen modules.
        params: {"projector": ..., "decoder": ...}, float32.
        chat: text to tokens and back.
        size: S, side in pixels of the square that pictures are laid into, as in training.
    """

    model: Model
    projector: Projector
    decoder: Qwen3
    params: Mapping[str, Any]
    chat: Chat
    size: int

    def answer(
        self,
        images: Pictures,
        instructions: Sequence[str],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """What the decoder says about each picture or clip.

        Args:
            images: uint8 RGB, pictures [B, H, W, 3] or clips [B, T, H, W, 3], or a list of such without B, whose H
                and W may differ. What is not S x S is laid into such a square (`data/captions.py:letterbox`); boxes
                in instructions and answers are those of the picture itself, see data/boxes.py.
            instructions: one for each.
            max_tokens: of an answer, the token that ends it included.
            temperature, top_p, seed: of sampling, see `generate`; a temperature of 0 takes the likeliest tokens.

        Raises:
            ValueError: naming what does not fit: an instruction without text or too long, or images of another kind.
        """
        squares, shown = self._squares(images)
        texts = self._checked(instructions, squares)
        moved = [move_boxes(text, share) for text, share in zip(texts, shown, strict=True)]
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        patches = self.model.encode(squares, layers=()).patches
        said = self.answer_features(patches, moved, max_tokens=max_tokens, **sampling)
        return [restore_boxes(text, share) for text, share in zip(said, shown, strict=True)]

    def answer_features(
        self, patches: jax.Array, instructions: Sequence[str], *, max_tokens: int = 256, **sampling: Any
    ) -> list[str]:
        """As `answer`, of what the backbone has encoded already: patches [B, T, h, w, d] of whole clips or of streams.

        Boxes are those of the frames as they were encoded.
        """
        embeddings, lengths = self.prompts(patches, instructions)
        stops = {"stop_tokens": self.chat.stops, "max_tokens": max_tokens}
        tokens = generate(*self._decoding, embeddings, lengths, **stops, **sampling)
        return [self.chat.decode(row[row >= 0].tolist()) for row in tokens]

    def prompts(self, patches: jax.Array, instructions: Sequence[str]) -> tuple[jax.Array, np.ndarray]:
        """Embeddings [B, L, D] and lengths int32 [B] for `generate`: visual tokens frame by frame, then the text."""
        if np.ndim(patches) != 5 or np.shape(patches)[-1] != self.model.config.width or 0 in np.shape(patches):
            expected = f"[B, T, h, w, {self.model.config.width}]"
            raise ValueError(f"patches: expected {expected}, got {list(np.shape(patches))}")
        prompts = [self.chat.prompt(text) for text in self._checked(instructions, patches)]
        visual = int(np.prod(patches.shape[1:4]))
        longest = visual + max(map(len, prompts))
        if longest >= self.decoder.config.max_length:
            raise ValueError(
                f"instructions: {visual} visual tokens and a prompt of {longest - visual} are too long, expected fewer "
                f"than {self.decoder.config.max_length} together"
            )
        decoder, params = self._decoding
        text, lengths = embed_prompts(decoder, params, prompts)
        visual_tokens = project(self.projector, self.params[PROJECTOR], patches)
        return jnp.concatenate([visual_tokens, text], axis=1), visual + lengths

    def save(self, directory: str | os.PathLike) -> None:
        """Write the backbone as `Model.save` does, and beside it what `save_beside` writes."""
        self.model.save(directory)
        self.save_beside(directory)

    def save_beside(self, directory: str | os.PathLike) -> None:
        """Write language.json, projector.safetensors and, in decoder/, the decoder and its tokenizer as Qwen3's are."""
        directory, leaves = Path(directory), named_leaves(dict(self.params[PROJECTOR]))
        save_decoder(directory / DECODER_FOLDER, self.decoder.config, self.params[DECODER])
        self.chat.save(os.fspath(directory / DECODER_FOLDER))
        with written_aside(directory / PROJECTOR_NAME) as weights:
            write_tensors(weights, {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()})
        write_json(directory / CONFIG_NAME, {"size": self.size}, indent=2)

    @functools.cached_property
    def _decoding(self) -> tuple[Qwen3, dict[str, Any]]:
        """The decoder and its parameters as generation takes them."""
        return self.decoder.clone(decoding=True), decoding_params(self.params[DECODER], self.decoder.dtype)

    def _squares(self, images: Pictures) -> tuple[np.ndarray, list[tuple[float, float]]]:
        """Clips uint8 [B, T, S, S, 3], and the shares of the square's width and height that each takes."""
        clips = [image if np.ndim(image) == 4 else np.asarray(image)[None] for image in images]
        for clip in clips:
            if clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape or clip.dtype != np.uint8:
                found = f"{clip.dtype}{list(clip.shape)}"
                raise ValueError(f"images: expected uint8 pictures [H, W, 3] or clips [T, H, W, 3], got {found}")
        if len({len(clip) for clip in clips}) != 1:
            raise ValueError(f"images: expected equally many frames in each, got {[len(clip) for clip in clips]}")
        laid = [[self._square(np.asarray(frame)) for frame in clip] for clip in clips]
        return np.array([[square for square, _ in frames] for frames in laid]), [frames[0][1] for frames in laid]

    def _square(self, frame: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
        if frame.shape[:2] == (self.size, self.size):
            return frame, (1.0, 1.0)
        return letterbox(frame, self.size)

    def _checked(self, instructions: Sequence[str], images: np.ndarray | jax.Array) -> list[str]:
        """The instructions, if they are one text for each image, with boxes that are written as such."""
        texts = [instructions] if isinstance(instructions, str) else list(instructions)
        if isinstance(instructions, str) or len(texts) != len(images) or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"instructions: expected a list of {len(images)} texts, one for each image, got {texts!r}")
        if wrong := next((text for text in texts if malformed_boxes(text)), None):
            raise ValueError(f"instructions: {wrong!r} holds a box that is not written as one (data/boxes.py)")
        return texts


def build_language_model(
    model: Model, config: Qwen3Config, params: Mapping[str, Any], chat: Chat, size: int
) -> LanguageModel:
    """A LanguageModel from parts; projector and decoder compute in the backbone's dtype."""
    dtype = model.backbone.dtype
    return LanguageModel(model, Projector(config.width, dtype), Qwen3(config, dtype), params, chat, size)


def load_language(path: str | os.PathLike, rope: str | None = None, dtype: Any = None) -> LanguageModel:
    """Load a backbone with its decoder, as training left them in WORKDIR/model or `LanguageModel.save` wrote them.

    Args:
        path: a directory or hub id; rope, dtype: as of `load`.

    Raises:
        convert.files.WeightsError: naming the file and everything in it that does not fit.
    """
    model = model_lib.load(path, rope=rope, dtype=dtype)
    directory = find_directory(path)
    if not (directory / CONFIG_NAME).exists():
        raise WeightsError(f"{directory}: a backbone without a decoder, expected {CONFIG_NAME} in it")
    size = _read_size(directory / CONFIG_NAME, model.config.patch_size)
    folder = directory / DECODER_FOLDER
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such directory")
    config, decoder = load_decoder(folder)
    chat = _read_chat(folder / "tokenizer.json", config)
    built = build_language_model(model, config, {}, chat, size)
    tensors = read_tensor_file(directory / PROJECTOR_NAME)
    check_shapes(directory / PROJECTOR_NAME, tensors, _projector_shapes(built.projector, model.config.width))
    projector = nest({name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    return dataclasses.replace(built, params=jax.tree.map(jnp.asarray, {PROJECTOR: projector, DECODER: decoder}))


def _read_size(path: Path, patch_size: int) -> int:
    content = read_json(path)
    if set(content) != {"size"}:
        raise WeightsError(f"{path}: expected the key 'size', got {sorted(content)}")
    size = content["size"]
    if type(size) is not int or size < patch_size or size % patch_size:
        raise WeightsError(f"{path}: size: expected a multiple of {patch_size}, got {size!r}")
    return size


def _read_chat(path: Path, config: Qwen3Config) -> Chat:
    try:
        chat = load_chat(os.fspath(path))
        chat.check_vocabulary(config.vocabulary_size)
    except DataError as error:
        raise WeightsError(str(error)) from error
    return chat


def _projector_shapes(projector: Projector, width: int) -> dict[str, tuple[int, ...]]:
    token = jax.ShapeDtypeStruct((1, width), jnp.float32)
    params = jax.eval_shape(projector.init, jax.random.key(0), token)["params"]
    return {name: leaf.shape for name, leaf in named_leaves(params).items()}
