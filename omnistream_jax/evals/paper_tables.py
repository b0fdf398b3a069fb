"""The published figures of OmniStream's Tables 2 to 9 as data (paper_tables.json), to stand beside ours.

    python -m omnistream_jax.evals.paper_tables > docs/paper_tables.md

Every figure names the texts in which it was read; what could not be read is listed as missing. Percentages are 0 to
100, depths and RMSE are in metres, as the paper prints them.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omnistream_jax.evals.text_table import aligned

PATH = Path(__file__).with_suffix(".json")
SUMMARY, ABLATION = 2, 8  # tables that show what others have in detail, and other models than the paper's final one
_PARTS = ("paper", "sources", "benchmarks", "metrics", "tables", "missing", "figures")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
        table: its number in the paper.
        benchmark, metric: keys of `PaperTables.benchmarks` and `metrics`.
        row: the model that it is of, as the paper calls it.
        printed: the number as the paper prints it.
        read_in: keys of `PaperTables.sources`, one or more.
    """

    table: int
    benchmark: str
    metric: str
    row: str
    printed: str
    read_in: tuple[str, ...]

    @property
    def value(self) -> float:
        """The number."""
        return float(self.printed)


@dataclasses.dataclass(frozen=True)
class PaperTables:
    """The file.

    Attributes:
        paper: whose tables.
        sources: name -> what was read, and where it is.
        benchmarks: name -> {"title", "setting"}.
        metrics: name -> {"title", "better": "higher" or "lower", "digits": behind the point, of ours}.
        tables: number -> {"title", "note"}.
        missing: {"table", "what", "reason"} of figures that could not be read.
        figures: in the paper's order.
    """

    paper: str
    sources: Mapping[str, str]
    benchmarks: Mapping[str, Mapping[str, str]]
    metrics: Mapping[str, Mapping[str, Any]]
    tables: Mapping[int, Mapping[str, str]]
    missing: tuple[Mapping[str, Any], ...]
    figures: tuple[Figure, ...]

    def of(self, benchmark: str, tables: Collection[int] | None = None) -> list[Figure]:
        """The figures of a benchmark: in these tables, or in its own, which is the summary where it has no other.

        Raises ValueError for an unknown benchmark.
        """
        if benchmark not in self.benchmarks:
            raise ValueError(f"benchmark: expected one of {', '.join(self.benchmarks)}, got {benchmark!r}")
        figures = [figure for figure in self.figures if figure.benchmark == benchmark]
        if tables is None:
            numbers = {figure.table for figure in figures} - {ABLATION}
            tables = numbers - {SUMMARY} or numbers
        return [figure for figure in figures if figure.table in tables]


@functools.cache
def load(path: str | os.PathLike = PATH) -> PaperTables:
    """The tables of a file.

    Raises:
        ValueError: naming the file and the entry that is not as the classes above have it, or that stands there twice.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or set(content) != set(_PARTS):
        raise ValueError(f"{path}: expected an object of {', '.join(_PARTS)}")
    try:
        figures = tuple(Figure(**{**entry, "read_in": tuple(entry["read_in"])}) for entry in content["figures"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: a figure has other fields than {_names(Figure)}: {error}") from error
    tables = {int(number): table for number, table in content["tables"].items()}
    loaded = PaperTables(**{**content, "tables": tables, "missing": tuple(content["missing"]), "figures": figures})
    seen = set()
    for figure in figures:
        problem = _problem(figure, loaded)
        place = (figure.table, figure.benchmark, figure.metric, figure.row)
        if problem or place in seen:
            raise ValueError(f"{path}: {figure}: {problem or 'it stands there twice'}")
        seen.add(place)
    return loaded


def published(benchmark: str, tables: Collection[int] | None = None) -> dict[tuple[int, str], dict[str, Figure]]:
    """{(table, row): {metric: figure}} of a benchmark, as `PaperTables.of` chooses the tables."""
    rows: dict[tuple[int, str], dict[str, Figure]] = {}
    for figure in load().of(benchmark, tables):
        rows.setdefault((figure.table, figure.row), {})[figure.metric] = figure
    return rows


def compare(benchmark: str, ours: Mapping[str, float], tables: Collection[int] | None = None) -> str:
    """Ours beside theirs, as a terminal shows it.

    Args:
        benchmark: of the file, as imagenet, nyuv2, ade20k, k400, ssv2, davis2017, sintel_depth or tum_pose.
        ours: metric -> value, in the paper's unit; metrics that the paper does not have of this benchmark are left out.
        tables: None for the benchmark's own; Table 8 has the ablations.

    Raises:
        ValueError: an unknown benchmark, or no metric in common.
    """
    rows, known = published(benchmark, tables), load()
    found = {metric for values in rows.values() for metric in values}
    metrics = [metric for metric in known.metrics if metric in ours and metric in found]
    if not metrics:
        raise ValueError(f"{benchmark}: expected one of {', '.join(sorted(found))}, got {', '.join(ours) or 'nothing'}")
    about = known.benchmarks[benchmark]
    arrows = {"higher": "↑", "lower": "↓"}
    titles = [f"{known.metrics[metric]['title']} {arrows[known.metrics[metric]['better']]}" for metric in metrics]
    lines = [
        [about["title"], *titles],
        ["ours", *(f"{ours[metric]:.{known.metrics[metric]['digits']}f}" for metric in metrics)],
    ]
    for (table, row), values in rows.items():
        if any(metric in values for metric in metrics):
            lines.append([f"{row}, Table {table}", *(_printed(values.get(metric)) for metric in metrics)])
    return f"{aligned(lines)}\npublished: {about['setting']} (arXiv 2603.12265)"


def markdown() -> str:
    """All tables, their settings, and where each row was read, as docs/paper_tables.md has them."""
    known = load()
    parts = [
        "# The paper's tables",
        f"Published figures of {known.paper}. Made of omnistream_jax/evals/paper_tables.json by "
        "`python -m omnistream_jax.evals.paper_tables > docs/paper_tables.md`; evaluations print them beside ours.",
        "The paper itself could not be read where this was made; each figure was read in one or more of these texts, "
        "whose names stand behind its row:",
        "\n".join(f"- **{name}**: {text}" for name, text in known.sources.items()),
    ]
    told: set[str] = set()  # settings stand where their benchmark comes first
    parts += [_markdown_table(known, number, told) for number in known.tables]
    missing = [f"- Table {entry['table']}: {entry['what']}: {entry['reason']}." for entry in known.missing]
    parts += ["## Missing", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(known: PaperTables, number: int, told: set[str]) -> str:
    figures = [figure for figure in known.figures if figure.table == number]
    columns = list(dict.fromkeys((figure.benchmark, figure.metric) for figure in figures))
    values = {(figure.row, figure.benchmark, figure.metric): figure for figure in figures}
    titles = [f"{known.benchmarks[name]['title']}: {known.metrics[metric]['title']}" for name, metric in columns]
    lines = [["", *titles, "read in"], ["---"] * (len(columns) + 2)]
    for row in dict.fromkeys(figure.row for figure in figures):
        cells = [values.get((row, *column)) for column in columns]
        sources = dict.fromkeys(name for figure in cells if figure for name in figure.read_in)
        lines.append([row, *map(_printed, cells), ", ".join(sources)])
    settings = {
        name: f"- {known.benchmarks[name]['title']}: {known.benchmarks[name]['setting']}." for name, _ in columns
    }
    parts = [f"## Table {number}: {known.tables[number]['title']}"]
    parts += ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += ["\n".join(text for name, text in settings.items() if name not in told), known.tables[number]["note"]]
    told |= set(settings)
    return "\n\n".join(filter(None, parts))


def _problem(figure: Figure, known: PaperTables) -> str | None:
    if figure.table not in known.tables or figure.benchmark not in known.benchmarks:
        return "an unknown table or benchmark"
    if figure.metric not in known.metrics:
        return "an unknown metric"
    if not isinstance(figure.printed, str) or not re.fullmatch(r"\d+(\.\d+)?", figure.printed):
        return "printed: expected a number in quotes"
    if not figure.read_in or not set(figure.read_in) <= set(known.sources):
        return f"read_in: expected one or more of {', '.join(known.sources)}"
    return None


def _printed(figure: Figure | None) -> str:
    return "-" if figure is None else figure.printed


def _names(fields: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(fields))


if __name__ == "__main__":
    print(markdown(), end="")
