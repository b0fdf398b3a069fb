"""Compilations are counted; compiled programs are kept where asked, and loaded by the next start."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from training_cases import PRETRAIN, REPOSITORY

from omnistream_jax import config as config_lib
from omnistream_jax import train
from omnistream_jax.utils.compilation import CompileCounter, Compiled, keep_compiled

CONFIGS = ("pretrain.py", "extract.py", "stream.py")


def new_program():
    """A function that nothing has compiled yet."""
    return jax.jit(lambda x: jnp.sin(x) * 2 + x)


@pytest.fixture
def no_cache(monkeypatch):
    """As JAX is before it has been given a directory; what a test sets is undone."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_each_new_program_is_counted_once():
    first, second = new_program(), new_program()
    x, y = jnp.ones(3), jnp.ones(4)
    with CompileCounter() as counter:
        assert counter.total.programs == 0
        first(x)
        first(x)
        assert counter.total.programs == 1
        first(y)
        second(x)
        assert counter.total.programs == 3
        assert counter.total.seconds > 0
    new_program()(x)
    assert counter.total.programs == 3, "it goes on after its end"


def test_counters_do_not_disturb_each_other():
    with CompileCounter() as outer:
        with CompileCounter() as inner:
            new_program()(jnp.ones(3))
        new_program()(jnp.ones(5))
    assert 1 <= inner.total.programs < outer.total.programs


def test_the_line_for_a_reader():
    assert str(Compiled(4, 12.34, 3)) == "compiled 4 programs in 12.3 s (3 from the cache)"
    assert str(Compiled(1, 0.04, 0)) == "compiled 1 program in 0.0 s (0 from the cache)"


PROGRAM = """
import sys, jax
from omnistream_jax.utils.compilation import CompileCounter, keep_compiled
assert keep_compiled(sys.argv[1]) == jax.config.jax_compilation_cache_dir
with CompileCounter() as counter:
    value = jax.jit(lambda x: (x @ x.T).sum() + len(jax.devices()))(jax.numpy.ones((3, 4)))
print(float(value), counter.total.programs, counter.total.from_cache)
"""


def test_a_second_start_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    folder = tmp_path / "not yet there" / "cache"
    answers = []
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM, str(folder)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        if "prefer-no-gather" in done.stderr:
            pytest.skip("XLA refuses its own cache on this kind of CPU: github.com/openxla/xla/issues/44565")
        answers.append(done.stdout.split())
    (value, programs, cached), (value_again, programs_again, cached_again) = answers
    assert value == value_again == str(36.0 + len(jax.devices()))
    assert int(programs) == int(programs_again) == int(cached_again) > 0
    assert cached == "0"
    assert any(folder.iterdir())
    assert folder.stat().st_mode & 0o077 == 0, "others could put programs there"


def test_a_directory_that_jax_has_already_comes_first(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before
    assert keep_compiled(str(tmp_path / "other")) == before
    assert not (tmp_path / "other").exists()


def test_without_a_directory_nothing_is_kept(no_cache):
    assert keep_compiled("") is None
    assert jax.config.jax_compilation_cache_dir is None


def test_the_home_directory_may_be_written_as_a_tilde(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keep_compiled("~/cache") == str(tmp_path / "cache")


def test_a_directory_that_cannot_be_made_is_told(no_cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        keep_compiled(str(tmp_path / "file" / "cache"))
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_job_keeps_its_programs(name):
    config = config_lib.load(str(REPOSITORY / "configs" / name))
    assert config.compilation_cache == "~/.cache/omnistream_jax/compilation"


def test_a_resumed_training_may_keep_its_programs_elsewhere(tmp_path):
    config_lib.remember(config_lib.load(PRETRAIN), tmp_path)
    other = config_lib.load(PRETRAIN, {"compilation_cache": ""})
    config_lib.remember(other, tmp_path, may_change=train._MAY_CHANGE)
