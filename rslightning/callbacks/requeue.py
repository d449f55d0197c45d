"""A job of SLURM that is near its time limit: save, and ask for another turn."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import final

from rslightning.callbacks.checkpoint import save_whole


@final
class RequeueOnSignal(Callback):
    """On SIGUSR1, save after the step and ask SLURM to queue the job again.

    Lightning does both inside the signal's handler. The processes are then at different places: one
    saves and waits for the others, another computes a gradient and waits for the first, and the
    job's time runs out. Here the handler only notes the signal, and the processes, which agree on
    it once per optimizer step, save together. Where this callback is, Lightning leaves SIGUSR1 to
    it; the file has the name under which Lightning looks for it when the job starts again,
    `hpc_ckpt_N.ckpt` in the Trainer's `default_root_dir`.

    A validation is not interrupted: let SLURM send the signal earlier than the longest one takes.
    """

    def __init__(self) -> None:
        self._noted = self._asked = False
        self._step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signal; Lightning, which asks later, leaves one that is taken."""
        signal.signal(signal.SIGUSR1, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and ask, once, if any process was told."""
        if self._asked or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        noted = torch.tensor(float(self._noted), device=trainer.strategy.root_device)
        if float(trainer.strategy.reduce(noted, reduce_op="sum")) == 0:
            return
        self._asked = True  # once: others may note the same signal a step later
        path = _next_path(Path(trainer.default_root_dir))
        save_whole(trainer, path)
        rank_zero_info(f"SIGUSR1: saved {path}, and asking SLURM for another turn")
        if trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", _job()], check=False)

    def _note(self, number: int, frame: Any) -> None:
        self._noted = True


def _next_path(folder: Path) -> Path:
    numbers = [path.stem.rpartition("_")[2] for path in folder.glob("hpc_ckpt_*.ckpt")]
    newest = max((int(number) for number in numbers if number.isdigit()), default=0)
    return folder / f"hpc_ckpt_{newest + 1}.ckpt"


def _job() -> str:
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]
