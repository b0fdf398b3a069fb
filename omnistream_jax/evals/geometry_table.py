"""The table of the geometry benchmarks, as a terminal shows it."""

from collections.abc import Mapping
from typing import Any

from omnistream_jax.evals.paper_tables import published
from omnistream_jax.evals.text_table import aligned

_COLUMNS = {
    "depth": (("AbsRel", "abs_rel", 1, ".4f"), ("δ < 1.25", "delta_1", 100, ".2f")),
    "pose": (
        ("ATE", "ate", 1, ".4f"),
        ("RPE trans", "rpe_translation", 1, ".4f"),
        ("RPE rot °", "rpe_rotation", 1, ".4f"),
    ),
}
_SHOWN = ("CUT3R", "OmniStream")


def scores(task: str, metrics: Mapping[str, Any]) -> list[str]:
    """The numbers that the table of a task ("depth" or "pose") shows, of a sequence or a data set."""
    return [f"{factor * metrics[field]:{form}}" for _, field, factor, form in _COLUMNS[task]]


def line(task: str, metrics: Mapping[str, Any]) -> str:
    """The same with their names, in one line."""
    names = [name for name, *_ in _COLUMNS[task]]
    return ", ".join(f"{name} {score}" for name, score in zip(names, scores(task, metrics), strict=True))


def geometry_table(benchmarks: Mapping[str, Mapping[str, Any]], align: str) -> str:
    """Depth above, poses below; what is not as published is said.

    Args:
        benchmarks: name -> {"data": `Benchmark.settings`, "aggregate": numbers or None, "problem": text or None}.
        align: of the depth. CUT3R's and OmniStream's published numbers stand under complete benchmarks that were
            aligned as they were.
    """
    parts = []
    for task, title in (("depth", f"video depth, align {align}"), ("pose", "camera pose, Sim(3)")):
        chosen = {name: content for name, content in benchmarks.items() if content["data"]["task"] == task}
        if not chosen:
            continue
        rows = [[title, "sequences", "frames", *(name for name, *_ in _COLUMNS[task])]]
        for name, content in chosen.items():
            counts, aggregate = content["data"]["counts"], content["aggregate"]
            found = [f"{counts[what]:,} of {counts[f'expected_{what}']:,}" for what in ("sequences", "frames")]
            rows.append([name, *found, *(scores(task, aggregate) if aggregate else ["-"] * len(_COLUMNS[task]))])
            if counts["complete"] and (task == "pose" or align == "scale"):
                rows += [
                    [f"  {row} in the paper's Table {table}", "", "", *cells] for table, row, cells in _theirs(name)
                ]
        parts.append(aligned(rows))
        incomplete = [name for name, content in chosen.items() if not content["data"]["counts"]["complete"]]
        parts += [f"{name}: incomplete, not to be compared with published numbers" for name in incomplete]
        parts += [f"{name}: {content['problem']}" for name, content in chosen.items() if content["problem"]]
    return "\n".join(parts)


def _theirs(benchmark: str) -> list[tuple[int, str, list[str]]]:
    """Table, row and cells of the models that are shown."""
    metrics = [field for _, field, *_ in _COLUMNS[benchmark.rpartition("_")[2]]]
    rows = published(benchmark).items()
    return [
        (table, row, [values[field].printed for field in metrics]) for (table, row), values in rows if row in _SHOWN
    ]
