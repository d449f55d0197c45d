"""Cells as jobs: run by submitit on this machine, and submitted to a stand-in for SLURM."""

import json
import os
import stat

import pytest

from rslightning.errors import UserError
from rslightning.experiments.cells import Task, alone, read_status
from rslightning.experiments.slurm import JOBS_FILE, SlurmLauncher

pytest.importorskip("submitit")

SBATCH = """#!/bin/sh
cat "$1" >> "$SLURM_STAND_IN/scripts"
echo "Submitted batch job 77"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
cat "$SLURM_STAND_IN/states"
"""


def tasks(folder, *names):
    wrong = ["--config", "nowhere.yaml"]  # a fit that ends at once, with a sentence
    return [Task(name, folder / name, wrong) for name in names]


def test_a_job_runs_its_cell_and_tells_how_it_ended(tmp_path):
    launcher = SlurmLauncher(tmp_path / "slurm", {"timeout_min": 5}, "local", poll_seconds=0.1)
    (task,) = tasks(tmp_path, "one")
    ended = {}
    for _, states in launcher.run([task]):
        ended |= states
    assert ended == {"one": read_status(task.folder)}
    assert ended["one"].state == "failed"
    assert ended["one"].message.startswith("There is no configuration nowhere.yaml")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put stand-ins for SLURM's commands on the path; return their folder."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "sacct": SACCT, "srun": "#!/bin/sh\n"}.items():
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    (folder / "states").write_text("77_0|RUNNING|n1\n77_1|PENDING|\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    return folder


def test_jobs_are_one_array_and_a_new_process_watches_those_of_the_old(slurm, tmp_path):
    options = {"slurm_partition": "long", "slurm_gpus_per_node": 1, "timeout_min": 90}
    both = tasks(tmp_path, "one", "two")
    running, ended = next(SlurmLauncher(tmp_path / "jobs", options).run(both))
    assert (running, ended) == ({"one"}, {})
    script = (slurm / "scripts").read_text()
    for line in ("--partition=long", "--gpus-per-node=1", "--time=90", "--array=0-1"):
        assert f"#SBATCH {line}" in script
    assert json.loads((tmp_path / "jobs" / JOBS_FILE).read_text()) == {"one": "77_0", "two": "77_1"}

    running, ended = next(SlurmLauncher(tmp_path / "jobs", options).run(both))
    assert (running, ended) == ({"one"}, {})
    assert (slurm / "scripts").read_text() == script  # nothing was submitted again


def test_wrong_options_are_told_in_a_sentence(slurm, tmp_path):
    with pytest.raises(UserError, match=r"^SLURM jobs: .*nonsense"):
        SlurmLauncher(tmp_path / "jobs", {"slurm_nonsense": 1})


def test_a_machine_without_slurm_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^SLURM jobs: .*srun"):
        SlurmLauncher(tmp_path / "jobs", {})


def test_a_fit_of_its_own_does_not_take_the_jobs_variables_for_its_own():
    environment = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "HOME": "/home/me"}
    assert alone(environment) == {"HOME": "/home/me"}
