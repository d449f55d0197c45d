import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rslightning.callbacks.requeue import RequeueOnSignal


class Told(Callback):
    """Send SIGUSR1 to one process while the second step is computed, to another in the third."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_after_backward(self, trainer, pl_module):
        place = (trainer.global_step, trainer.global_rank)
        if place in ((1, self.rank), (2, 1 - self.rank)):
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Stand in a job of SLURM; return the file in which its controller notes what it was asked."""
    controller = tmp_path / "bin" / "scontrol"
    controller.parent.mkdir()
    controller.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    controller.chmod(0o755)
    monkeypatch.setenv("PATH", f"{controller.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    before = signal.getsignal(signal.SIGUSR1)
    yield tmp_path / "asked"
    signal.signal(signal.SIGUSR1, before)


def saved(folder: Path) -> dict[str, int]:
    return {
        path.name: torch.load(path, weights_only=True)["global_step"]
        for path in sorted(folder.glob("*.ckpt"))
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_save_when_one_is_told(
    job, run_processes, make_trainer, make_module, make_data, tmp_path, rank
):
    module, data = make_module(), make_data()

    def fit(_):
        callbacks = [RequeueOnSignal(), Told(rank)]
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        trainer = make_trainer(max_steps=3, limit_val_batches=0, callbacks=callbacks, **options)
        trainer.fit(module, data)

    assert run_processes(2, fit) == [0, 0]
    assert saved(tmp_path) == {"hpc_ckpt_1.ckpt": 2}
    assert job.read_text() == "requeue 4711\n"


def test_a_second_turn_keeps_the_first_s_file(
    job, make_trainer, make_module, make_data, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "42")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    options = {"limit_val_batches": 0, "max_steps": 4, "accumulate_grad_batches": 2}
    for _ in range(2):
        trainer = make_trainer(callbacks=[RequeueOnSignal(), Told(0)], **options)
        trainer.fit(make_module(), make_data())
    assert saved(tmp_path) == {"hpc_ckpt_1.ckpt": 2, "hpc_ckpt_2.ckpt": 2}
    assert job.read_text() == "requeue 42_7\n" * 2


def test_nothing_is_saved_without_a_signal(job, make_trainer, make_module, make_data, tmp_path):
    trainer = make_trainer(callbacks=[RequeueOnSignal()], max_steps=2, limit_val_batches=0)
    trainer.fit(make_module(), make_data())
    assert saved(tmp_path) == {}
    assert not job.exists()
