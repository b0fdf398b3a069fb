"""What a finished training run leaves: the model, scores on held-out material, and pictures."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from omnistream_jax.data.chat import load_chat
from omnistream_jax.data.embedded import heldout_clip
from omnistream_jax.data.picture import colour_depth
from omnistream_jax.data.world import WorldCaptions, WorldClips
from omnistream_jax.evals.box_picture import described_pictures
from omnistream_jax.evals.patch_retrieval import patch_retrieval
from omnistream_jax.evals.pca import pca_picture
from omnistream_jax.evals.rows import labelled_row
from omnistream_jax.evals.world_captions import world_captions
from omnistream_jax.evals.world_geometry import world_geometry
from omnistream_jax.geometry.alignment import fit_scale
from omnistream_jax.geometry_model import GeometryModel, build_geometry_model
from omnistream_jax.language_model import LanguageModel, build_language_model
from omnistream_jax.model import Model, build_model
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.geometry import GeometryHeads
from omnistream_jax.models.projector import DECODER, PROJECTOR
from omnistream_jax.tasks.caption import CaptionTask
from omnistream_jax.tasks.geometry import HEADS, GeometryTask
from omnistream_jax.tasks.task import Params, Task
from omnistream_jax.utils.files import written_aside
from omnistream_jax.utils.metrics import MetricsWriter

_RETRIEVAL_FRAMES, _RETRIEVAL_CROPS = 12, 4
_DESCRIBED = 3  # pictures in captions.png
_ANSWER_BATCH, _ANSWER_TOKENS = 16, 96  # the world's longest descriptions take 70 tokens


@dataclasses.dataclass(frozen=True)
class Trained:
    """The modules of a run, and the parameters before and after it.

    Attributes:
        backbone: the module.
        tasks: what was trained.
        initial: the backbone's parameters before the first step.
        params: {"backbone": ..., head name: ...} after the last, of the EMA teacher where there is one.
    """

    backbone: Backbone
    tasks: Sequence[Task]
    initial: Params
    params: Params

    @property
    def model(self) -> Model:
        """The trained backbone."""
        return build_model(self.backbone.config, self.params["backbone"], dtype=self.backbone.dtype)

    @property
    def untrained(self) -> Model:
        """The backbone before training."""
        return build_model(self.backbone.config, self.initial, dtype=self.backbone.dtype)

    @property
    def geometry(self) -> GeometryModel | None:
        """The trained backbone with its geometry heads, if a task has trained them."""
        task = next((task for task in self.tasks if isinstance(task, GeometryTask)), None)
        if task is None:
            return None
        heads: GeometryHeads = task.geometry_heads
        return build_geometry_model(self.model, heads.config, self.params[HEADS])

    @property
    def language(self) -> LanguageModel | None:
        """The trained backbone with its projector and decoder, if a task has trained them."""
        task = next((task for task in self.tasks if isinstance(task, CaptionTask)), None)
        if task is None:
            return None
        params = {name: self.params[name] for name in (PROJECTOR, DECODER)}
        chat = load_chat(task.data.tokenizer)
        return build_language_model(self.model, task.decoder.config, params, chat, task.data.size)


def report(config: ConfigDict, trained: Trained, workdir: Path, metrics: MetricsWriter, say: Callable) -> None:
    """Exports the model to `workdir/model`, measures it on held-out material and draws it.

    Args:
        config: of the run; `evaluation` says at what sizes.
        trained: the modules and parameters.
        workdir: gets model/, features.png and, with geometry or captions, geometry.png and captions.png.
        metrics: gets the scores at the last step.
        say: prints a line.
    """
    if jax.process_index() != 0:
        return
    fields, model, geometry, language = config.evaluation, trained.model, trained.geometry, trained.language
    (geometry or model).save(workdir / "model")
    if language is not None:
        language.save_beside(workdir / "model")
    scores = {}
    for name, each in (("trained", model), ("untrained", trained.untrained)):
        scores |= {f"{key}_{name}": value for key, value in _retrieval(each, fields.retrieval_size).items()}
    if geometry is not None:
        scores |= world_geometry(geometry.reconstruct, _heldout_clips(fields))
    if language is not None:
        answer, captions = _caption_answers(language, fields.caption_records)
        scores |= world_captions(answer, captions, batch=_ANSWER_BATCH)
    metrics.write_again(config.steps, scores)
    drawn = pictures(config, trained)
    for name, picture in drawn.items():
        metrics.write_image(config.steps, name, picture)
        with written_aside(workdir / f"{name}.png") as aside:
            Image.fromarray(picture).save(aside)
    files = ", ".join(str(workdir / f"{name}.png") for name in drawn)
    say(f"model: {workdir / 'model'}, pictures: {files}")


def pictures(config: ConfigDict, trained: Trained) -> dict[str, np.ndarray]:
    """What the parameters see in held-out material, at the sizes of `config.evaluation`: uint8 [height, width, 3] each.

    "features": principal components of the patches, before and after training; "geometry": depth, and "captions":
    descriptions with boxes, where a task trains them.
    """
    fields, geometry, language = config.evaluation, trained.geometry, trained.language
    drawn = {"features": _features_picture(trained, fields.picture_frames, fields.picture_size)}
    if geometry is not None:
        drawn["geometry"] = _geometry_picture(geometry, _heldout_clips(fields))
    if language is not None:
        answer, captions = _caption_answers(language, fields.caption_records)
        drawn["captions"] = described_pictures(answer, captions, min(fields.caption_records, _DESCRIBED))
    return drawn


def _heldout_clips(fields: ConfigDict) -> WorldClips:
    return WorldClips("heldout", fields.geometry_scenes, frames=fields.picture_frames, size=fields.geometry_size)


def _retrieval(model: Model, side: int) -> dict[str, float]:
    """Patch retrieval on held-out frames, each with several crops: in percent, see evals/patch_retrieval.py."""
    frames = heldout_clip(_RETRIEVAL_FRAMES, side, side)

    def features(images: np.ndarray) -> np.ndarray:
        return np.asarray(model.encode(images[:, None], layers=()).patches[:, 0])

    scores = [patch_retrieval(features, frames, seed=seed) for seed in range(_RETRIEVAL_CROPS)]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _features_picture(trained: Trained, count: int, side: int) -> np.ndarray:
    """Principal components on a held-out clip, before and after training."""
    frames = heldout_clip(count, side, side)
    models = {"untrained": trained.untrained, "trained": trained.model}
    maps = {name: np.asarray(model.encode(frames[None], layers=()).patches[0]) for name, model in models.items()}
    return pca_picture(frames, maps)


def _geometry_picture(model: GeometryModel, clips: WorldClips) -> np.ndarray:
    """A held-out scene: frames, true depth, and predicted depth at the clip's best scale."""
    clip = clips.clip(0)
    depth = np.asarray(model.reconstruct(clip.images[None]).depth[0], np.float64)
    depth *= fit_scale(depth.ravel(), clip.depth.ravel().astype(np.float64), np.ones(depth.size, bool))
    limits = tuple(np.percentile(clip.depth, (2, 98)))
    rows = {"held-out scene": clip.images}
    rows |= {"true depth": colour_depth(clip.depth, limits), "depth, predicted": colour_depth(depth, limits)}
    return np.concatenate([labelled_row(name, tiles) for name, tiles in rows.items()])


def _caption_answers(model: LanguageModel, count: int) -> tuple[Callable[..., list[str]], WorldCaptions]:
    """The model's answers, for evals/world_captions.py, and `count` held-out records of each task to be asked about."""
    captions = WorldCaptions("heldout", count * len(WorldCaptions.TASKS), size=model.size)

    def answer(images: np.ndarray, instructions: list[str]) -> list[str]:
        missing = _ANSWER_BATCH - len(images)  # whole batches only: one program for all
        images = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
        texts = model.answer(images, instructions + instructions[-1:] * missing, max_tokens=_ANSWER_TOKENS)
        return texts[: len(instructions)]

    return answer, captions
