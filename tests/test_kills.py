"""A run that is killed again and again ends with the weights of one that nothing disturbed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from rslightning.__main__ import main

KILLS = int(os.environ.get("RSLIGHTNING_TEST_KILLS", "3"))
"""How many, in each of the tests; 30 take about four minutes."""

STEPS = 60

pytestmark = pytest.mark.slow


def config(base: Path, data: Path, streaming: bool) -> dict:
    return {
        "seed_everything": 1,
        "model": {
            "base_model": str(base),
            "dtype": "float32",
            "adapter": {"rank": 3, "alpha": 5.0, "dropout": 0.1},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.LinearLR",
                "init_args": {"total_iters": STEPS},
            },
        },
        "data": {
            "class_path": "rslightning.data.OpenOrca",
            "init_args": {
                "path": str(data),
                "max_length": 128,
                "batch_size": 2,
                "packing": True,
                "streaming": streaming,
                "held_out_examples": 4,
                "shuffle_buffer": 9,
            },
        },
        "merge_adapters": None,
        "checkpoint": {"every_n_steps": 3},
        "trainer": {
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "limit_val_batches": 0,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": "killed", "default_hp_metric": False},
            },
        },
    }


def options(processes: int) -> list[str]:
    one = ["fit", "--config", "recipe.yaml", "--auto_resume", "true"]
    many = ["--config", "configs/strategy/ddp.yaml", "--trainer.devices", str(processes)]
    return one + (many if processes > 1 else [])


def start(processes: int, port: int) -> list[int]:
    """Start a run, as torchrun would."""
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            with Path("output").open("a") as output:
                for descriptor in (1, 2):
                    os.dup2(output.fileno(), descriptor)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
            torch.set_num_threads(1)
            os._exit(main(options(processes)))
        children.append(child)
    return children


def wait(children: list[int], seconds: float) -> list[int]:
    """Return how the processes have ended, within a time; they are killed then, one first."""
    statuses, end = {}, time.monotonic() + seconds
    while len(statuses) < len(children):
        for child in set(children) - set(statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for child in random.sample(children, len(children)):
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.002)
    return [statuses[child] for child in children]


def last() -> dict:
    """Return the last checkpoint of the one run; a life may end before it has begun to write."""
    (path,) = Path("runs/killed").glob("version_*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


def assert_same(one, other, where="") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("processes", "streaming"), [(1, False), (1, True), (2, False)], ids=["1", "1 stream", "2"]
)
def test_killed_at_random(
    tmp_path, monkeypatch, model_folder, orca_folder, capsys, free_ports, processes, streaming
):
    def run_in(folder: Path):
        folder.mkdir()
        monkeypatch.chdir(folder)
        content = config(model_folder, orca_folder, streaming)
        Path("recipe.yaml").write_text(yaml.safe_dump(content))

    run_in(tmp_path / "whole")
    began = time.monotonic()
    assert wait(start(processes, free_ports()), 300) == [0] * processes, Path("output").read_text()
    took = time.monotonic() - began
    whole = last()
    run_in(tmp_path / "killed")
    chance = random.Random(KILLS)
    kills = lives = 0
    while kills < KILLS:
        lives += 1
        statuses = wait(start(processes, free_ports()), took * chance.uniform(0.2, 0.9))
        kills += -signal.SIGKILL in statuses
        assert lives < 5 * KILLS, "it comes to its end too soon to be killed"
        if set(statuses) == {0}:  # to its end: begin anew
            assert_same(last()["state_dict"], whole["state_dict"])
            Path("runs").rename(f"runs-{lives}")
    assert wait(start(processes, free_ports()), 300) == [0] * processes, Path("output").read_text()
    killed = last()
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(killed[part], whole[part], part)
    with capsys.disabled():
        print(f"\n{kills} kills in {lives} lives on {processes} processes: the same weights")
