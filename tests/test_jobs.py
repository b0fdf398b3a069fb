"""Which config is of which job."""

import subprocess
import sys
from pathlib import Path

import pytest

from omnistream_jax import config as config_lib
from omnistream_jax import jobs
from omnistream_jax.config import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OF_JOB = {  # job -> the config that it reads
    "train": "pretrain.py",
    "plan": "pretrain.py",
    "extract": "extract.py",
    "stream": "stream.py",
    "evaluate": "evaluate_geometry.py",
    "probe": "evaluate_probes.py",
    "propagate": "evaluate_vos.py",
}


def config_of(job: str, as_job: str | None = None):
    return config_lib.load(str(CONFIGS / OF_JOB[job]), {"job": as_job or job})


@pytest.mark.parametrize("job", OF_JOB)
def test_a_job_takes_its_configs_and_refuses_those_of_others(job):
    jobs.check_job(config_of(job))
    for other in OF_JOB:
        if OF_JOB[other] != OF_JOB[job]:
            with pytest.raises(ConfigError, match=rf"^job: this config is no config of job {job} \(it has no field "):
                jobs.check_job(config_of(other, as_job=job))


def test_every_field_of_the_files_is_in_the_table_of_a_job():
    assert set(OF_JOB) == set(jobs.FIELDS) == set(jobs.JOBS)
    for job in set(OF_JOB) - {"train", "probe"}:  # a plan's are a training's, and one more
        assert set(jobs.FIELDS[job]) - {"name"} == set(config_of(job)) - {"job", "name"}
    assert set(jobs.FIELDS["plan"]) - set(jobs.FIELDS["train"]) == {"topology"}
    recipes = ("imagenet", "nyuv2", "ade20k", "k400", "ssv2", "world_objects", "world_depth", "world_motion")
    shared = set.intersection(*(set(config_lib.load(f"{CONFIGS / OF_JOB['probe']}:{name}")) for name in recipes))
    assert set(jobs.FIELDS["probe"]) == shared - {"job", "name", "size", "warmup_steps"}  # of each protocol its own


def test_a_file_without_a_job_ends_with_one_line_and_status_2(tmp_path):
    (tmp_path / "none.py").write_text(
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict()"
    )
    command = [sys.executable, "-m", "omnistream_jax.main", f"--config={tmp_path / 'none.py'}"]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == config_lib.EXIT_CONFIG
    assert done.stderr.startswith("error: job: expected one of train, ")
    assert "Traceback" not in done.stderr
