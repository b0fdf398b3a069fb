"""Who may import whom, over the syntax trees of every file: imports inside functions count too."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "omnistream_jax"
MAX_LINES = 500

SUPPORT = {"utils"}
NETWORKS = {
    *("ops", "geometry", "models", "convert", "stream", "model", "geometry_model", "generate", "language_model"),
    *SUPPORT,
}
WORK = {"step", "optim", "sharding", "checkpoint", "config", "tasks", "evals", "losses", "data"} | NETWORKS

# Each part of the package (a folder, or a file beside them) and the others that it may import. Imports run one way:
# main -> jobs -> train | evaluate | probe | propagate | extract | live -> step, tasks, evals, model -> models, losses
# -> ops, geometry.
ALLOWED = {
    "__init__": {"model", "geometry_model", "language_model"},
    "main": {"jobs", "launcher", "distributed", "config"} | SUPPORT,
    "jobs": {"train", "evaluate", "extract", "live", "plan", "probe", "propagate", "launcher", "distributed"} | WORK,
    "train": {"build", "report", "watch", "flops", "programs", "profiling", "faults", "preemption"} | WORK,
    "faults": {"checkpoint"} | SUPPORT,
    "preemption": SUPPORT,
    "weights": {"checkpoint", "convert", "config"} | SUPPORT,
    "plan": {"plan_report", "roofline", "topology", "flops", "programs"} | WORK,
    "plan_report": {"programs", "roofline", "topology"} | SUPPORT,
    "roofline": {"topology", "sharding"} | SUPPORT,
    "topology": {"config", "sharding"} | SUPPORT,
    "launcher": {"config"} | SUPPORT,
    "distributed": {"launcher", "config"} | SUPPORT,
    "watch": {"flops", "tasks"} | SUPPORT,
    "flops": {"models", "tasks"} | SUPPORT,
    "programs": SUPPORT,
    "profiling": SUPPORT,
    "build": {"weights"} | WORK,
    "report": WORK,
    "evaluate": {"__init__"} | WORK,
    "probe": WORK,
    "propagate": {"__init__"} | WORK,
    "extract": WORK,
    "live": {"live_result", "live_geometry", "live_question", "live_rerun", "live_view", "reconstruction"} | WORK,
    "live_geometry": {"live_result", "reconstruction", "model", "geometry_model", "stream", "config", "data", "evals"}
    | SUPPORT,
    "live_question": {"live_result", "live_geometry", "language_model", "generate", "model", "geometry_model", "models"}
    | {"config", "data"}
    | SUPPORT,
    "live_view": {"live_result", "live_rerun", "data", "evals"} | SUPPORT,
    "live_rerun": {"live_result", "config"} | SUPPORT,
    "live_result": {"data"} | SUPPORT,
    "reconstruction": {"data"} | SUPPORT,
    "step": {"optim", "sharding", "tasks", "losses", "models", "ops"} | SUPPORT,
    "tasks": {"sharding", "models", "losses", "data", "ops", "geometry", "optim", "config"} | SUPPORT,
    "evals": {"model", "geometry_model", "stream", "convert", "models", "losses", "data", "ops", "geometry", "sharding"}
    | SUPPORT,
    "model": {"stream", "convert", "models", "ops"} | SUPPORT,
    "geometry_model": {"model", "stream", "convert", "models", "geometry"} | SUPPORT,
    "language_model": {"model", "generate", "convert", "models", "data"} | SUPPORT,
    "generate": {"models", "ops"} | SUPPORT,
    "serving": {"snapshot", "model", "stream", "models"} | SUPPORT,
    "snapshot": {"model", "stream", "ops"} | SUPPORT,
    "stream": {"models", "ops"} | SUPPORT,
    "convert": {"models", "ops"} | SUPPORT,
    "models": {"sharding", "ops", "geometry"} | SUPPORT,
    "losses": {"ops", "geometry"} | SUPPORT,
    "ops": {"sharding"} | SUPPORT,
    "geometry": SUPPORT,
    "data": SUPPORT,
    "checkpoint": {"sharding"} | SUPPORT,
    "optim": {"muon"} | SUPPORT,
    "muon": SUPPORT,
    "sharding": SUPPORT,
    "config": SUPPORT,
    "utils": set(),
}
NO_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}  # in data/: its workers would take the accelerator
NOWHERE = {"torch", "tensorflow", "pickle", "dill", "cloudpickle"}


def imports_of(source: str, module: str) -> list[str]:
    """Full names of what a module imports, the names after `from X import` included."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return names


def part_of(module: str) -> str:
    """The part of the package to which omnistream_jax.part.file belongs; the package itself is "__init__"."""
    return [*module.split("."), "__init__"][1]


def problems_of(source: str, module: str) -> list[str]:
    """What a module imports against the rules."""
    part, problems = part_of(module), []
    if part not in ALLOWED:
        return [f"{module}: {part} has no line in ALLOWED of tests/test_structure.py"]
    for name in imports_of(source, module):
        root = name.split(".")[0]
        if root == "omnistream_jax":
            if part_of(name) not in ALLOWED[part] | {part}:
                problems.append(f"{module} imports {name}")
        elif root in NOWHERE or (part == "data" and root in NO_JAX):
            problems.append(f"{module} imports {name}")
    return problems


def modules() -> dict[str, Path]:
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts)] = path
    return files


def in_fresh_interpreter(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_imports_run_one_way():
    assert [problem for module, path in modules().items() for problem in problems_of(path.read_text(), module)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("omnistream_jax.models.block", "from omnistream_jax.data import schema"),
        ("omnistream_jax.models.block", "def f():\n    import omnistream_jax.losses.dino"),
        ("omnistream_jax.models.block", "from ..tasks import ssl"),
        ("omnistream_jax.utils.trees", "from omnistream_jax import config"),
        ("omnistream_jax.ops.rope", "import omnistream_jax"),
        ("omnistream_jax.data.video", "import jax.numpy as jnp"),
        ("omnistream_jax.data.video", "import importlib; importlib.import_module('flax.linen')"),
        ("omnistream_jax.convert.files", "import pickle"),
        ("omnistream_jax.novelty", ""),
    ],
)
def test_the_rules_catch(module, source):
    assert problems_of(source, module) != []


def test_data_reaches_no_module_that_names_jax():
    """Through utils, for instance, which data may import."""
    sources = {module.removesuffix(".__init__"): path.read_text() for module, path in modules().items()}
    todo, seen = [module for module in sources if part_of(module) == "data"], set()
    while todo:
        module = todo.pop()
        if module in seen or module not in sources:
            continue
        seen.add(module)
        names = imports_of(sources[module], module)
        assert [name for name in names if name.split(".")[0] in NO_JAX] == [], module
        todo += [name for name in names if name.startswith("omnistream_jax.")]
        todo += [name.rpartition(".")[0] for name in names if name.startswith("omnistream_jax.")]
    assert len(seen) > 1


def test_using_data_starts_no_jax_backend():
    """Grain imports jax; what counts is that no device is taken."""
    names = [module.removesuffix(".__init__") for module in modules() if part_of(module) == "data"]
    program = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "print(bool(bridge and bridge._backends))"
    )
    assert in_fresh_interpreter(program) == "False"


def test_the_public_interface_imports_at_once_and_without_jax():
    started = time.monotonic()
    program = "import sys, omnistream_jax; omnistream_jax.load; print('jax' in sys.modules, 'flax' in sys.modules)"
    assert in_fresh_interpreter(program) == "False False"
    assert time.monotonic() - started < 3


def test_no_file_is_too_long_to_read():
    lengths = {path.name: len(path.read_text().splitlines()) for path in modules().values()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
