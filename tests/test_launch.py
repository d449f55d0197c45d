"""Runs of several processes: how many there are, and that they end together."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from rslightning import launch
from rslightning.errors import UserError
from rslightning.launch import Started, choose_devices, started_processes

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12"}
SLURM = {"SLURM_NTASKS": "10", "SLURM_NTASKS_PER_NODE": "5", "SLURM_NNODES": "2"}
SLURM |= {"SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "tune"}


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({}, None),
        (TORCHRUN, Started("torchrun", 4, 3)),
        (SLURM, Started("SLURM", 5, 2)),
        (SLURM | TORCHRUN, Started("torchrun", 4, 3)),  # started by it, in a job of the other
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, None),
        ({"SLURM_NTASKS": "1"}, Started("SLURM", 1, 1)),  # without srun, on its own
    ],
)
def test_what_was_started(environment, started):
    assert started_processes(environment) == started


@pytest.mark.parametrize("devices", ["auto", -1, "-1", 4, "4", [0, 1, 2, 3], "0,1,2,3"])
@pytest.mark.parametrize("num_nodes", [1, 3])
def test_devices_are_what_was_started(devices, num_nodes):
    expected = 4 if devices in ("auto", -1, "-1") else devices
    assert choose_devices(devices, num_nodes, TORCHRUN) == (expected, 3)


def test_devices_stay_where_nothing_is_known():
    assert choose_devices("auto", 2, {}) == ("auto", 2)
    assert choose_devices("3,", 1, {}) == ("3,", 1)


@pytest.mark.parametrize(
    ("devices", "num_nodes", "environment", "message"),
    [
        (
            8,
            1,
            TORCHRUN,
            "torchrun started 4 processes per node (nodes: 3), but trainer.devices is 8: give "
            "--trainer.devices 4, or tell torchrun to start 8.",
        ),
        (
            "3,",
            1,
            TORCHRUN,
            "torchrun started 4 processes per node (nodes: 3), but trainer.devices is 3,: give "
            "--trainer.devices 4, or tell torchrun to start 1.",
        ),
        (
            5,
            4,
            SLURM,
            "SLURM started 5 processes per node (nodes: 2), but trainer.num_nodes is 4: give "
            "--trainer.num_nodes 2, or tell SLURM to use 4.",
        ),
        (
            2,
            1,
            {"SLURM_NTASKS": "1"},
            "SLURM started 1 processes per node (nodes: 1), but trainer.devices is 2: give "
            "--trainer.devices 1, or tell SLURM to start 2.",
        ),
        ("all", 1, TORCHRUN, "trainer.devices is a number, a list or auto, got 'all'."),
        (
            "auto",
            1,
            {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"},
            "SLURM holds 10 tasks and this process was not started by srun, so it would wait for "
            "the others forever: write srun before the command.",
        ),
        (
            "auto",
            1,
            {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"},
            "SLURM was given --ntasks=10: give --ntasks-per-node=5 in its place, from which the "
            "processes learn where they are.",
        ),
    ],
)
def test_contradictions_are_one_sentence(devices, num_nodes, environment, message):
    with pytest.raises(UserError) as raised:
        choose_devices(devices, num_nodes, environment)
    assert str(raised.value) == message


# --- processes of which nothing must be left ------------------------------------------------------


class Ended(NamedTuple):
    """A command that is over."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def told(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("rslightning: ")]


def marked(mark: str) -> list[int]:
    """Return the running processes whose environment holds `mark`, in whatever session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            alive = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and mark.encode() in folder.joinpath("environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def run(command, folder: Path, seconds: float, **environment) -> Ended:
    """Run a command that starts others; fail if it, or one of them, does not end."""
    mark = f"RSLIGHTNING_TEST={uuid.uuid4()}"
    name, _, value = mark.partition("=")
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    began = time.monotonic()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env=inherited | {name: value} | environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            took, limit = time.monotonic() - began, time.monotonic() + 15
            while marked(mark) and time.monotonic() < limit:
                time.sleep(0.05)
            assert marked(mark) == [], (folder / "err").read_text()
        finally:
            for left in marked(mark):
                os.kill(left, signal.SIGKILL)
            process.wait(10)
    return Ended(status, (folder / "out").read_text(), (folder / "err").read_text(), took)


# --- ending together: processes without torch, which start in no time -----------------------------

RANKS = """
import os, signal, subprocess, sys, time
from types import SimpleNamespace
from rslightning.errors import StoppedError, UserError
from rslightning.launch import CHILDREN, ending_together

words, alone = sys.argv[1:], "LOCAL_RANK" not in os.environ
rank = int(os.environ.get("LOCAL_RANK", 0))


def start():
    for child in range(1, len(words)):
        environment = os.environ | {"LOCAL_RANK": str(child)}
        command = [sys.executable, __file__, *words]
        launcher.procs.append(subprocess.Popen(command, env=environment))


def act(word):
    if word == "wait":
        time.sleep(100)
    time.sleep(0.5)  # by now all are there
    if word == "late":
        time.sleep(1)
        raise RuntimeError("a late fault")
    if word == "slow":
        time.sleep(1)
        print("slow is over", flush=True)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "fault":
        raise RuntimeError("a fault")
    if word == "user":
        raise UserError("a mistake")
    if word in ("stop", "turn"):
        raise StoppedError(signal.SIGTERM if word == "stop" else signal.SIGUSR1, 7)
    if word == "interrupt":
        raise KeyboardInterrupt
    if word == "lost":
        time.sleep(0.5)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


environment = SimpleNamespace(creates_processes_externally=not alone)
launcher = SimpleNamespace(procs=[], num_processes=len(words), cluster_environment=environment)
with ending_together():
    CHILDREN.watch(launcher)
    if alone:
        start()
    act(words[rank])
"""

ADVICE = "the run has ended; --ckpt_path last goes on with it."
LOST = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer"
KILLED = f"rslightning: rank 1 was killed by SIGKILL: {ADVICE}"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the function that runs processes of which each does what one word says."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    return lambda *words: run([sys.executable, "ranks.py", *words], folder, 40)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("wait", "kill", "wait"), 1, [KILLED]),
        (("lost", "kill", "lost"), 1, [KILLED]),  # what follows from it is not told
        (("kill", "wait", "wait"), -9, [f"rslightning: rank 0 is gone: {ADVICE}"]),
        (("user", "user", "user"), 2, ["rslightning: a mistake"]),
        (
            ("wait", "user", "wait"),
            2,
            ["rslightning: a mistake", f"rslightning: rank 1 ended with status 2: {ADVICE}"],
        ),
        (("interrupt", "interrupt", "interrupt"), 130, ["rslightning: interrupted"]),
        (("lost", "wait", "wait"), 1, [f"rslightning: rank 0 failed in communication: {LOST}"]),
    ],
)
def test_the_first_that_dies_ends_all_and_is_told_once(ranks, words, status, told):
    ended = ranks(*words)
    assert (ended.status, ended.told) == (status, told)
    assert "Traceback" not in ended.err
    assert ended.seconds < 15


UNEXPECTED = r"\(this is unexpected: (\S+rslightning-error-\d+\.txt) shows where it happened\)"


@pytest.mark.parametrize(
    ("words", "fault", "told"),
    [
        (("late", "fault", "fault"), "a late fault", []),  # the others leave the word to rank 0
        (("fault", "wait", "lost"), "a fault", []),
        (("wait", "wait", "fault"), "a fault", [f"rank 2 ended with status 1: {ADVICE}"]),
        (("lost", "fault", "lost"), "a fault", [f"rank 1 ended with status 1: {ADVICE}"]),
        (("end", "end", "late"), "a late fault", [f"rank 2 ended with status 1: {ADVICE}"]),
    ],
)
def test_what_is_unexpected_is_told_once_and_its_traceback_kept(ranks, words, fault, told):
    ended = ranks(*words)
    assert ended.status == 1
    first, *rest = (line.removeprefix("rslightning: ") for line in ended.told)
    found = re.fullmatch(f"RuntimeError: {fault} {UNEXPECTED}", first)
    assert found
    kept = Path(found[1])
    assert f"RuntimeError: {fault}" in kept.read_text()
    kept.unlink()
    assert rest == told
    assert "Traceback" not in ended.err
    assert LOST not in ended.err


def test_the_traceback_is_shown_on_request(ranks, monkeypatch):
    monkeypatch.setenv("RSLIGHTNING_DEBUG", "1")
    ended = ranks("fault", "fault", "fault")
    assert ended.err.count("Traceback") == 1
    Path(re.search(UNEXPECTED, ended.err)[1]).unlink()


@pytest.mark.parametrize("others", [("stop", "stop"), ("stop", "stop", "stop")])
def test_a_run_that_a_signal_has_stopped_ends_with_its_status(ranks, others):
    ended = ranks("stop", *others)
    assert (ended.status, ended.told) == (143, ["rslightning: stopped by SIGTERM after step 7"])
    assert "Traceback" not in ended.err
    assert ended.seconds < 10


def test_slurm_is_asked_for_another_turn(ranks, tmp_path, monkeypatch):
    controller = tmp_path / "bin" / "scontrol"
    controller.parent.mkdir()
    controller.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    controller.chmod(0o755)
    monkeypatch.setenv("PATH", f"{controller.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert ranks("stop", "stop").status == 143
    assert not (tmp_path / "asked").exists()  # it was to end
    assert ranks("turn", "turn").status == 138
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "42")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert ranks("turn", "turn").status == 138
    assert (tmp_path / "asked").read_text() == "requeue 4711\nrequeue 42_7\n"


def test_rank_0_waits_for_the_others(ranks):
    ended = ranks("end", "end", "slow")
    assert (ended.status, ended.out, ended.err) == (0, "slow is over\n", "")


def test_no_process_outlives_the_agent_of_torchrun(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    (tmp_path / "agent.py").write_text(
        textwrap.dedent("""
        import os, signal, subprocess, sys, time
        for rank in "01":
            environment = os.environ | {"LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "none"}
            subprocess.Popen([sys.executable, "ranks.py", "wait", "wait"], env=environment)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    ended = run([sys.executable, "agent.py"], tmp_path, 40)
    assert ended.status == -9
    assert ended.told == [f"rslightning: torchrun is gone: {ADVICE}"]


# --- real runs on two processes -------------------------------------------------------------------

FAULT = '''
import os, signal, time
from lightning.pytorch import Callback


class Fault(Callback):
    """Let one rank die before its fourth step."""

    def __init__(self, how: str, rank: int) -> None:
        self.how, self.rank = how, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_step, trainer.global_rank) == (3, self.rank):
            with open("died", "w") as file:
                file.write(str(time.time()))
            if self.how == "raise":
                raise RuntimeError("a fault of one rank")
            os.kill(os.getpid(), getattr(signal, self.how))
'''


def config(base: Path, data: Path) -> dict:
    return {
        "seed_everything": 1,
        "model": {
            "base_model": str(base),
            "dtype": "float32",
            "adapter": {"rank": 3, "alpha": 5.0},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        },
        "data": {
            "class_path": "rslightning.data.OpenOrca",
            "init_args": {"path": str(data), "max_length": 128, "batch_size": 2},
        },
        "merge_adapters": None,
        "checkpoint": {"every_n_steps": 2},
        "trainer": {
            "max_steps": 5,
            "limit_val_batches": 0,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": "tiny", "default_hp_metric": False},
            },
        },
    }


CONSOLE = (str(Path(sys.executable).with_name("rslightning")),)
TORCHRUN_COMMAND = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *("--nproc-per-node", "2", "-m", "rslightning"),
)
DDP = ("fit", "--config", "tiny.yaml", "--config", "configs/strategy/ddp.yaml")
TWO = ("--trainer.devices", "2")


@pytest.fixture(scope="module")
def fit(tmp_path_factory, model_folder, orca_folder):
    """Return the function that fits in a folder: name, launcher, options."""
    root = tmp_path_factory.mktemp("launched")

    def start(name: str, *options, launcher=CONSOLE) -> Ended:
        folder = root / name
        folder.mkdir(exist_ok=True)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(config(model_folder, orca_folder)))
        (folder / "fault.py").write_text(FAULT)
        return run(
            [*launcher, *DDP, *options], folder, 240, PYTHONPATH=str(folder), OMP_NUM_THREADS="1"
        )

    start.root = root
    return start


def fault(how: str, rank: int) -> tuple[str, ...]:
    return (
        "--trainer.callbacks+=fault.Fault",
        f"--trainer.callbacks.how={how}",
        f"--trainer.callbacks.rank={rank}",
    )


def last(folder: Path, version: int = 0) -> Path:
    return folder / f"runs/tiny/version_{version}/checkpoints/last.ckpt"


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def seconds_since_the_death(folder: Path) -> float:
    return (folder / "err").stat().st_mtime - float((folder / "died").read_text())


@pytest.fixture(scope="module")
def whole(fit) -> dict:
    """The last checkpoint of a run that nothing disturbed, from the console on two processes."""
    ended = fit("whole", *TWO)
    assert ended.status == 0, ended.err
    assert "Traceback" not in ended.err
    assert "x 2 devices" in ended.err
    assert ended.told == []
    return read(last(fit.root / "whole"))


def test_a_child_s_death_is_told_while_signals_are_taken(monkeypatch):
    """As they are in training (`StopOnSignal`): Lightning, which looks later, names no rank."""
    said = []
    monkeypatch.setattr(launch, "_leave", lambda *arguments: said.append(arguments))
    children = launch.Children()
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        child = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
        children._follow(1, child)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == [(KILLED.removeprefix("rslightning: "), 1)]


@pytest.mark.slow
def test_a_run_goes_on_after_a_rank_was_killed(fit, whole):
    ended = fit("killed", *TWO, *fault("SIGKILL", 1))
    folder = fit.root / "killed"
    assert (ended.status, ended.told) == (1, [KILLED])
    assert "Traceback" not in ended.err
    assert seconds_since_the_death(folder) < 10
    assert read(last(folder))["global_step"] == 2
    assert sorted(path.name for path in last(folder).parent.iterdir()) == [
        "last.ckpt",
        "step-2.ckpt",
    ]
    # It goes on under torchrun, which says how many there are.
    resumed = fit("killed", "--ckpt_path", last(folder), launcher=TORCHRUN_COMMAND)
    assert resumed.status == 0, resumed.err
    assert "x 2 devices" in resumed.err
    assert_same(read(last(folder, 1)), whole)


def assert_same(resumed: dict, whole: dict) -> None:
    assert resumed["global_step"] == whole["global_step"] == 5
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [CONSOLE, TORCHRUN_COMMAND], ids=["console", "torchrun"])
def test_a_run_of_which_one_rank_is_told_to_end_saves_and_goes_on(fit, whole, launcher):
    name = "told" if launcher == CONSOLE else "told_by_torchrun"
    devices = TWO if launcher == CONSOLE else ()
    ended = fit(name, *devices, *fault("SIGTERM", 1), launcher=launcher)
    assert ended.told == ["rslightning: stopped by SIGTERM after step 4"]
    assert ended.status == (143 if launcher == CONSOLE else 1)
    assert (
        "errors.StoppedError" not in ended.err
    )  # in no traceback, though torchrun has one of its own
    folder = fit.root / name
    assert read(last(folder))["global_step"] == 4
    resumed = fit(name, *devices, "--ckpt_path", "last", launcher=launcher)
    assert resumed.status == 0, resumed.err
    assert_same(read(last(folder, 1)), whole)


@pytest.mark.slow
def test_a_run_ends_after_rank_0_was_killed(fit):
    ended = fit("orphans", *TWO, *fault("SIGKILL", 0))
    folder = fit.root / "orphans"
    assert (ended.status, ended.told) == (-9, [f"rslightning: rank 0 is gone: {ADVICE}"])
    assert "Traceback" not in ended.err
    assert read(last(folder))["global_step"] == 2


@pytest.mark.slow
def test_an_exception_of_one_rank_is_shown_once_and_ends_the_run(fit):
    ended = fit("raised", *TWO, *fault("raise", 1))
    assert (ended.status, len(ended.told)) == (1, 2)
    assert ended.told[1] == f"rslightning: rank 1 ended with status 1: {ADVICE}"
    assert ended.err.count("RuntimeError: a fault of one rank") == 1
    assert "Traceback" not in ended.err
    Path(re.search(UNEXPECTED, ended.err)[1]).unlink()
    assert seconds_since_the_death(fit.root / "raised") < 15


@pytest.mark.slow
def test_torchrun_names_the_rank_that_died(fit):
    ended = fit("agent", *fault("SIGKILL", 1), launcher=TORCHRUN_COMMAND)
    assert ended.status == 1
    cause = ended.err.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", cause)
    assert "SIGKILL" in cause
    assert "during handling" not in ended.err.lower()
    assert seconds_since_the_death(fit.root / "agent") < 15
    assert read(last(fit.root / "agent"))["global_step"] == 2
