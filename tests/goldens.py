"""Reads the goldens: numbers of the reference implementations (shared/goldens/README.md)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = (REPOSITORY / "tests" / "data", REPOSITORY.parent / "shared" / "goldens")
# Too large for tests/data: without the shared folder their tests are skipped. Every other golden must be there.
NOT_SHIPPED = (
    "01a_omnistream_offline",
    "01e_omnistream_offline_gt16",
    "01h_omnistream_swiglu",
    "01l_omnistream_bf16",
)


@dataclass(frozen=True)
class Golden:
    """One golden file; the names in each dict are the file's without their prefix.

    `grads` has parameter names, "input:<name>" for inputs and "loss"; `derived` is keyed by patch, then name.
    """

    config: dict
    meta: dict
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]
    derived: dict[str, dict[str, np.ndarray]]


def golden_path(name: str) -> Path:
    """The file of a golden, such as "05b_dino_head".

    Where no folder has it, the test is skipped if the golden is in NOT_SHIPPED; else this is a FileNotFoundError.
    """
    for folder in FOLDERS:
        path = folder / f"{name}.safetensors"
        if path.exists():
            return path
    message = f"golden {name}.safetensors is neither in {FOLDERS[0]} nor in {FOLDERS[1]}"
    if name in NOT_SHIPPED:
        pytest.skip(message)
    raise FileNotFoundError(message)


def load_golden(name: str) -> Golden:
    """Loads a golden by its file name without the suffix."""
    groups: dict[str, dict] = {key: {} for key in ("w", "in", "out", "grad", "ct", "derived")}
    with safe_open(golden_path(name), "numpy") as file:
        header = json.loads(file.metadata()["golden"])
        for key in file.keys():  # noqa: SIM118 -- not a dict
            group, _, rest = key.partition("/")
            if group == "derived":
                patch, _, rest = rest.partition("/")
                groups["derived"].setdefault(patch, {})[rest] = file.get_tensor(key)
            else:
                groups[group][rest] = file.get_tensor(key)
    return Golden(
        config=header["config"],
        meta=header["meta"],
        weights=groups["w"],
        inputs=groups["in"],
        outputs=groups["out"],
        grads=groups["grad"],
        cotangents=groups["ct"],
        derived=groups["derived"],
    )


def relative_error(actual, expected: np.ndarray) -> float:
    """max |actual - expected| over max |expected| (over 1e-30 where that is zero)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))
