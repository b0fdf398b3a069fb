"""Video object segmentation by a frozen backbone: labels are handed on from frame to frame, nothing is trained.

A sequence that is finished has its files, written aside and renamed, so a killed run costs one sequence. Many
processes share the sequences; each follows its own on its first device.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from omnistream_jax import config as config_lib
from omnistream_jax.config import ConfigError
from omnistream_jax.convert.files import WeightsError, fingerprint
from omnistream_jax.data.benchmarks.davis import open_davis
from omnistream_jax.data.benchmarks.masked import MaskedSequence, MaskedVideos
from omnistream_jax.data.benchmarks.world_masks import open_world
from omnistream_jax.data.errors import DataError
from omnistream_jax.evals import paper_tables
from omnistream_jax.evals.propagation import Propagation
from omnistream_jax.evals.region_boundary import VOID_RULES, ObjectScores, mean_scores, score_sequence
from omnistream_jax.evals.result_files import made_by
from omnistream_jax.evals.text_table import aligned
from omnistream_jax.evals.video_segmentation import FeatureReader, FrameRule, segment
from omnistream_jax.evals.vos_files import VosFiles, read_predictions
from omnistream_jax.model import dtype_of, load
from omnistream_jax.utils.agreement import from_all, from_first_process, lock_workdir, say, share
from omnistream_jax.utils.device_memory import full_device_told
from omnistream_jax.utils.files import write_json

SUMMARY, SETTINGS, EMBEDDED = "vos.json", "settings.json", "embedded"


class PropagationError(RuntimeError):
    """The run cannot go on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """What makes the masks of a sequence."""

    reader: FeatureReader
    rule: FrameRule
    propagation: Propagation

    def masks(self, sequence: MaskedSequence) -> Iterator[np.ndarray]:
        """uint8 [H, W] of every frame, in order."""
        return segment(self.reader, self.rule, self.propagation, sequence)


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked configuration with what it names; segmenter is None where another program's masks are scored."""

    config: ConfigDict
    videos: MaskedVideos
    segmenter: Segmenter | None
    files: VosFiles


def propagate(config: ConfigDict) -> None:
    """Segment and score as the config says; configs/evaluate_vos.py tells what is left in `config.output`.

    Raises:
        ConfigError: a field does not fit, or `config.output` holds results of other settings.
        DataError: the data are not complete, or a file of them is damaged; finished sequences are kept.
        WeightsError: the checkpoint cannot be read.
        WorkdirLockedError: another run works in `config.output`.
        PropagationError: out of memory, or results that cannot be written.
    """
    job = build(config)
    summary = job.files.folder / SUMMARY
    with _explained(job), lock_workdir(job.files.folder):
        refusal = f"output: {summary.parent} holds results of other settings; use those, or another directory"
        settings = dict(job.files.settings)
        remember = functools.partial(config_lib.remember_settings, settings, summary.with_name(SETTINGS), refusal)
        from_first_process(remember, errors=(ConfigError,))
        rows = _all_rows(job)
        if jax.process_index() != 0:
            return
        content = {"config": config_lib.to_plain(config), "settings": settings, **made_by()}
        content |= {"data": job.videos.settings(), **_aggregate(rows), "published": _published(job)}
        write_json(summary, content | {"sequences": rows})
    print(_table(job, rows, content), summary, sep="\n", flush=True)


def build(config: ConfigDict) -> Job:
    """Check the fields, count the data and load the model; nothing is written yet. Raises as `propagate`."""
    fields = _with_preset(config)
    for name in ("output", "data"):
        if not config[name]:
            raise ConfigError(f"{name}: expected a directory, got none; give --config.{name}=DIR")
    if bool(config.checkpoint) == bool(config.predictions):
        raise ConfigError("checkpoint: expected a model's directory, or masks of another program in predictions")
    if config.void not in VOID_RULES:
        raise ConfigError(f"void: expected one of {', '.join(VOID_RULES)}, got {config.void!r}")
    if config.window < 0:
        raise ConfigError(f"window: expected a number of frames, or 0 for all, got {config.window}")
    videos = _open(config)
    if config.predictions:
        settings, segmenter = {"void": config.void, "predictions": str(Path(config.predictions).resolve())}, None
    else:
        segmenter, settings = _segmenter(config, fields, videos)
    return Job(config, videos, segmenter, VosFiles(Path(config.output), settings, config.plots))


def _with_preset(config: ConfigDict) -> dict[str, Any]:
    """The fields that the preset knows, as they are set, or as the preset sets them where they are None."""
    if config.preset not in config.presets:
        raise ConfigError(f"preset: expected one of {', '.join(config.presets)}, got {config.preset!r}")
    preset = config.presets[config.preset]
    return {name: value if config[name] is None else config[name] for name, value in preset.items()}


def _open(config: ConfigDict) -> MaskedVideos:
    if config.data != EMBEDDED:
        return open_davis(config.data, config.allow_incomplete)
    if config.allow_incomplete:
        raise ConfigError("allow_incomplete: nothing of the embedded world can be missing; expected False, got True")
    try:
        return open_world(**config.world)
    except DataError as error:  # nothing but fields can be wrong
        raise ConfigError(str(error)) from error


def _segmenter(config: ConfigDict, fields: Mapping[str, Any], videos: MaskedVideos) -> tuple[Segmenter, dict[str, Any]]:
    """With the settings that its masks depend on."""

    def part(kind: type) -> Any:
        return kind(**{field.name: fields[field.name] for field in dataclasses.fields(kind)})

    try:
        rule, propagation = part(FrameRule), part(Propagation)
        model = load(config.checkpoint, dtype=dtype_of(config.compute_dtype))
        stream = {"window": config.window or None, "sinks": config.sinks, "time_unit": config.time_unit or None}
        reader = FeatureReader(model, fields["features"], frames_per_step=config.frames_per_step, **stream)
        rule.check(reader.patch)
        for sequence in videos.sequences:
            rule.size(*sequence.size, reader.patch)
    except WeightsError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shared = {name: config[name] for name in ("window", "sinks", "frames_per_step", "void")}
    settings = {"preset": config.preset, **fields, **shared}
    settings |= {"time_unit": config.time_unit or model.config.time_unit, "compute_dtype": model.backbone.dtype.name}
    return Segmenter(reader, rule, propagation), settings | {"model": fingerprint(config.checkpoint)}


def _all_rows(job: Job) -> dict[str, dict[str, Any]]:
    """The numbers of every sequence, in the order of the data; of this process's share they are made here."""
    sequences, files = {sequence.name: sequence for sequence in job.videos.sequences}, job.files

    def finished() -> dict[str, dict[str, Any]]:
        if not job.segmenter:  # scored anew each time: nothing tells whether another program's masks are the same
            return {}
        stored = {name: files.read(sequence) for name, sequence in sequences.items()}
        return {name: row for name, row in stored.items() if row is not None}

    kept = from_first_process(finished)
    numbers = ", ".join(f"{job.videos.counts[name]:,} {name}" for name in ("sequences", "frames", "objects"))
    say(f"{job.videos.name}: {numbers}; {len(kept)} sequences finished already")
    rows = {}
    for name in share({name: len(sequence) for name, sequence in sequences.items() if name not in kept}):
        began = time.monotonic()
        row = _evaluate(job, sequences[name])
        row |= {"seconds": round(time.monotonic() - began, 3), **made_by()}
        rows[name] = files.write(sequences[name], row)
        told = f"{_line(row)} ({row['frames']} frames, {row['seconds']:.1f} s)"
        print(f"{job.videos.name} {name}: {told}", flush=True)
    rows = kept | {name: row for part in from_all(rows) for name, row in part.items()}
    return {name: rows[name] for name in sequences}


def _evaluate(job: Job, sequence: MaskedSequence) -> dict[str, Any]:
    """Makes, stores and scores the masks of a sequence."""
    truth = sequence.masks()
    if job.segmenter:
        masks = []
        for index, mask in enumerate(job.segmenter.masks(sequence)):
            job.files.write_prediction(sequence, index, mask)
            masks.append(mask)
        prediction = np.stack(masks)
    else:
        prediction = read_predictions(Path(job.config.predictions), sequence)
    try:
        scores = score_sequence(prediction, truth, job.config.void)
        still = score_sequence(_still(truth, sequence.objects), truth, job.config.void)
    except ValueError as error:
        raise DataError(f"{sequence.name}: {error}") from error
    if job.files.pictures:
        job.files.write_picture(sequence, prediction, truth)
    objects = [{"object": int(number), **each} for number, each in zip(scores.numbers, _listed(scores), strict=True)]
    return {"frames": len(sequence), **_named(scores), "objects": objects, "still": _listed(still)}


def _still(truth: np.ndarray, objects: int) -> np.ndarray:
    """The first mask for every frame: what needs no features."""
    first = np.where(truth[0] <= objects, truth[0], 0).astype(np.uint8)
    return np.broadcast_to(first, truth.shape)


def _named(*scores: ObjectScores) -> dict[str, float]:
    mean = mean_scores(scores)
    return {"j_and_f": mean.both, "j": mean.region, "f": mean.boundary}


def _listed(scores: ObjectScores) -> list[dict[str, float]]:
    """An entry an object."""
    fields = (scores.region[:, None], scores.boundary[:, None], scores.numbers[:, None])
    return [_named(ObjectScores(*each)) for each in zip(*fields, strict=True)]


def _aggregate(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over all objects: of the masks ("scores"), and of first masks that stay where they are ("still")."""
    objects = {"scores": [], "still": []}
    for row in rows.values():
        objects["scores"] += row["objects"]
        objects["still"] += row["still"]
    return {
        name: {metric: float(np.mean([each[metric] for each in listed])) for metric in ("j_and_f", "j", "f")}
        for name, listed in objects.items()
    }


def _published(job: Job) -> dict[str, str] | None:
    """What the paper prints, in percent; None where the numbers may not be compared."""
    if job.videos.name != "davis2017" or not job.videos.counts["complete"]:
        return None
    rows = paper_tables.published("davis2017")
    return {f"{row}, Table {table}": figures["j_and_f"].printed for (table, row), figures in rows.items()}


def _percent(scores: Mapping[str, float]) -> list[str]:
    return [f"{100 * scores[name]:.1f}" for name in ("j_and_f", "j", "f")]


def _line(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(("J&F", "J", "F"), _percent(scores), strict=True))


def _table(job: Job, rows: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    """As a terminal shows it, in percent; the paper's figure stands beside complete data alone."""
    lines = [[job.videos.name, "objects", "J&F", "J", "F"]]
    lines += [[name, str(len(row["objects"])), *_percent(row)] for name, row in rows.items()]
    total = str(job.videos.counts["objects"])
    lines += [
        ["all objects", total, *_percent(content["scores"])],
        ["first mask kept", total, *_percent(content["still"])],
    ]
    parts = [aligned(lines)]
    if content["published"]:
        parts.append(paper_tables.compare("davis2017", {"j_and_f": 100 * content["scores"]["j_and_f"]}))
    elif job.videos.name == "davis2017":
        parts.append("davis2017: incomplete, not to be compared with published numbers")
    return "\n".join(parts)


@contextlib.contextmanager
def _explained(job: Job) -> Iterator[None]:
    """What can go wrong outside the program as a PropagationError."""
    hint = "a smaller short_side or frames_per_step"
    if job.files.settings.get("features") == "stream":
        hint = "a smaller window, short_side or frames_per_step" if job.config.window else "a window"
    try:
        with full_device_told(PropagationError, hint):
            yield
    except OSError as error:
        raise PropagationError(f"{job.files.folder}: the evaluation cannot go on ({error})") from error
