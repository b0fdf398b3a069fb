"""The scores of a sweep over its evaluations, and which head is reported."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from omnistream_jax.evals.probes.base import Heads

Scores = Sequence[Mapping[str, float]]


def best_of(scores: Scores, score: str, higher_is_better: bool) -> int:
    """The head of the best score, the first of equals; one that is not a number is the worst."""
    values = [row[score] if higher_is_better else -row[score] for row in scores]
    return max(range(len(values)), key=lambda head: -math.inf if math.isnan(values[head]) else values[head])


def _to_json(scores: Scores) -> list[dict[str, Any]]:
    """Null where a value is no finite number, which JSON does not know."""
    return [{name: value if math.isfinite(value) else None for name, value in row.items()} for row in scores]


def from_json(scores: Sequence[Mapping[str, float | None]]) -> Scores:
    """Scores as `Report.rows` wrote them, NaN for null."""
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in scores]


class Report:
    """Evaluations by step, and what of them is reported.

    Args:
        score: the metric that chooses.
        higher_is_better: its direction.
        best_evaluation: whether the best of all evaluations is reported, or the last.
    """

    def __init__(self, score: str, higher_is_better: bool, best_evaluation: bool):
        self._score, self._higher, self._best_evaluation = score, higher_is_better, best_evaluation
        self.evaluations: list[dict[str, Any]] = []

    def add(self, step: int, scores: Scores) -> None:
        """Adds the scores of all heads after `step` steps, more than any before."""
        self.evaluations.append({"step": step, "scores": [dict(row) for row in scores]})

    def has(self, step: int) -> bool:
        """Whether there was an evaluation after `step` steps."""
        return any(row["step"] == step for row in self.evaluations)

    @property
    def step(self) -> int:
        """Of the evaluation that is reported."""
        return self._reported["step"]

    @property
    def scores(self) -> list[dict[str, float]]:
        """Of all heads in the evaluation that is reported."""
        return self._reported["scores"]

    @property
    def best(self) -> int:
        """The head that is reported."""
        return best_of(self.scores, self._score, self._higher)

    def content(self, heads: Heads) -> dict[str, Any]:
        """JSON values: the best head and all others, each with its learning rate, weight decay and scores."""
        pairs = zip(heads.learning_rates, heads.weight_decays, self.scores, strict=True)
        rows = [{"learning_rate": rate, "weight_decay": decay, **scores} for rate, decay, scores in pairs]
        rows = _to_json(rows)
        return {"step": self.step, "best": {"head": self.best, **rows[self.best]}, "heads": rows}

    def rows(self) -> list[dict[str, Any]]:
        """JSON values: all evaluations, each with its step and the scores of all heads; `from_json` reads them."""
        return [row | {"scores": _to_json(row["scores"])} for row in self.evaluations]

    @property
    def _reported(self) -> dict[str, Any]:
        if not self._best_evaluation:
            return self.evaluations[-1]
        scores = [row["scores"][best_of(row["scores"], self._score, self._higher)] for row in self.evaluations]
        return self.evaluations[best_of(scores, self._score, self._higher)]


def sweep_table(heads: Heads, report: Report, score: str) -> str:
    """A line a head: learning rate, weight decay and all its scores; the one that is reported is marked."""
    names = list(report.scores[0])
    lines = [f"  {'learning rate':>13} {'weight decay':>13} " + " ".join(f"{name:>10}" for name in names)]
    for head, row in enumerate(report.scores):
        mark = "*" if head == report.best else " "
        values = " ".join(f"{row[name]:>10.4f}" for name in names)
        lines.append(f"{mark} {heads.learning_rates[head]:>13.4g} {heads.weight_decays[head]:>13.4g} {values}")
    return "\n".join([*lines, f"{score} {report.scores[report.best][score]:.4f} after {report.step} steps"])
