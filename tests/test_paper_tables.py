"""The paper's published figures: that the file is whole, hangs together, and is shown beside ours."""

import dataclasses
import json

import numpy as np
import pytest
from training_cases import REPOSITORY

from omnistream_jax.evals import paper_tables
from omnistream_jax.evals.geometry_table import geometry_table
from omnistream_jax.evals.paper_tables import Figure, compare, load, published

VSI = ("object_count", "absolute_distance", "object_size", "room_size")
VSI += ("relative_distance", "relative_direction", "route_plan", "appearance_order")


def values(benchmark, table):
    rows = published(benchmark, tables=[table])
    return {row: {name: figure.value for name, figure in found.items()} for (_, row), found in rows.items()}


def test_every_table_is_there_and_every_figure_names_what_was_read():
    tables = load()
    assert set(tables.tables) == {figure.table for figure in tables.figures} == set(range(2, 10))
    assert len(tables.figures) > 300
    assert {figure.benchmark for figure in tables.figures} == set(tables.benchmarks)
    assert {name for figure in tables.figures for name in figure.read_in} == set(tables.sources)
    assert all(entry["reason"] for entry in tables.missing)


def test_what_the_project_quotes_of_the_paper_stands_in_the_file():
    """EVAL_PROTOCOLS.md, sections 0 and 1."""
    assert {name: load().of(name, [2])[0].value for name in ("nyuv2", "ade20k")} == {"nyuv2": 0.377, "ade20k": 51.5}
    assert values("davis2017", 2)["DINOv3-L"] == {"j_and_f": 73.2}
    expected = {"CUT3R": [0.421, 47.9, 0.078, 93.7, 0.118, 88.1], "Spann3R": [0.622, 42.6, 0.144, 81.3, 0.198, 73.7]}
    for row, numbers in expected.items():
        found = [values(f"{name}_depth", 3)[row] for name in ("sintel", "bonn", "kitti")]
        assert [number for metrics in found for number in metrics.values()] == numbers


def test_rows_that_have_their_parts_add_up():
    """A figure that was misread, or put in another column's place, would show."""
    vsi = values("vsi_bench", 5)
    assert len(vsi) == 11
    for row, metrics in vsi.items():
        assert np.mean([metrics[name] for name in VSI]) == pytest.approx(metrics["average"], abs=0.051), row
    calvin = {row: metrics for row, metrics in values("calvin", 6).items() if "task_1" in metrics}
    assert len(calvin) == 8
    for row, metrics in calvin.items():
        rates = [metrics[f"task_{place}"] for place in range(1, 6)]
        assert rates == sorted(rates, reverse=True), row
        assert sum(rates) == pytest.approx(metrics["average_length"], abs=0.0026), row
    simpler = values("simpler_bridge", 7)
    assert len(simpler) == 10
    for row, metrics in simpler.items():
        rates = [metrics[name] for name in ("carrot", "eggplant", "spoon", "cube")]
        assert np.mean(rates) == pytest.approx(metrics["success"], abs=0.26), row  # 18.5 is printed for 18.75
        np.testing.assert_allclose(np.multiply(rates, 0.24), np.rint(np.multiply(rates, 0.24)), atol=0.03)


def test_the_summary_says_what_the_detailed_tables_say():
    detailed = dict.fromkeys(("sintel_depth", "bonn_depth", "kitti_depth"), 3)
    detailed |= dict.fromkeys(("sintel_pose", "tum_pose", "scannet_pose"), 4)
    for name, table in detailed.items():
        for row, metrics in values(name, 2).items():
            assert metrics.items() <= values(name, table)[row].items(), (name, row)
    assert values("vsi_bench", 2)["OmniStream"]["average"] == values("vsi_bench", 5)["OmniStream-7B"]["average"]
    assert values("calvin", 6)["OmniStream-7B, frozen vision"]["average_length"] == pytest.approx(3.89, abs=0.0051)
    assert round(values("calvin", 6)["OpenVLA (Llama-2)"]["average_length"], 2) == 2.55


def test_ours_stand_beside_theirs():
    text = compare("imagenet", {"top1": 61.234, "top5": 80.0})
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["ImageNet-1K", "Top-1", "%", "↑"]
    assert lines[1] == ["ours", "61.2"]
    assert ["OmniStream,", "Table", "2", "84.7"] in lines
    assert "12,500 steps" in text
    assert "top5" not in text
    assert "Table 8" not in text
    assert "Table 2" not in compare("sintel_depth", {"abs_rel": 0.5})
    assert "OmniStream, stage 1, Table 8" in compare("imagenet", {"top1": 1.0}, tables=[8])


@pytest.mark.parametrize(
    ("benchmark", "ours", "message"),
    [
        ("cifar", {"top1": 1.0}, "benchmark: expected one of imagenet, .*, got 'cifar'"),
        ("nyuv2", {"top1": 1.0}, "nyuv2: expected one of rmse, got top1"),
        ("nyuv2", {}, "got nothing"),
    ],
)
def test_what_the_paper_does_not_have_is_refused(benchmark, ours, message):
    with pytest.raises(ValueError, match=message):
        compare(benchmark, ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"printed": "about 3"}, "expected a number in quotes"),
        ({"printed": 3.0}, "expected a number in quotes"),
        ({"read_in": []}, "read_in: expected one or more of protocols"),
        ({"read_in": ["hearsay"]}, "read_in: expected"),
        ({"metric": "top7"}, "unknown metric"),
        ({"table": 99}, "unknown table"),
        ({"note": ""}, "other fields than table, benchmark, metric, row, printed, read_in"),
        ({}, "it stands there twice"),
    ],
)
def test_a_damaged_file_is_named_with_the_entry(change, message, tmp_path):
    content = json.loads(paper_tables.PATH.read_text())
    content["figures"].append(content["figures"][0] | change)
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_the_document_is_what_the_file_says():
    """python -m omnistream_jax.evals.paper_tables > docs/paper_tables.md"""
    assert (REPOSITORY / "docs" / "paper_tables.md").read_text() == paper_tables.markdown()


def test_the_document_has_every_figure():
    text = paper_tables.markdown()
    for figure in load().figures:
        section = text.split(f"## Table {figure.table}:")[1].split("\n## ")[0]
        row = next(line for line in section.splitlines() if line.startswith(f"| {figure.row} |"))
        assert f" {figure.printed} " in row


@pytest.mark.parametrize(
    ("name", "align", "complete", "shown"),
    [
        ("sintel_depth", "scale", True, True),
        ("sintel_depth", "metric", True, False),
        ("sintel_depth", "scale", False, False),
        ("tum_pose", "scale", True, True),
    ],
)
def test_the_geometry_table_has_theirs_under_a_comparable_benchmark(name, align, complete, shown):
    counts = {"sequences": 1, "expected_sequences": 1, "frames": 2, "expected_frames": 2, "complete": complete}
    data = {"task": name.split("_")[1], "counts": counts}
    text = geometry_table({name: {"data": data, "aggregate": None, "problem": None}}, align)
    table = published(name)
    for (number, row), metrics in table.items():
        line = next((line.split() for line in text.splitlines() if line.strip().startswith(f"{row} in")), None)
        expected = [figure.printed for figure in metrics.values()] if shown and row in ("CUT3R", "OmniStream") else None
        assert (line and line[6:]) == expected, (row, number)


def test_a_figure_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Figure(2, "imagenet", "top1", "ours", "1", ("protocols",)).printed = "99"
