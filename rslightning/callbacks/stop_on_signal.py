"""A run that is told to end: finish the step, save, and end with a status that says so."""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import final

from rslightning.callbacks.taken_signals import TakenSignals
from rslightning.errors import STOP_SIGNALS, StoppedError


class StopNow(KeyboardInterrupt):
    """A second interrupt: nothing more is waited for, nor saved."""


@final
class StopOnSignal(Callback):
    """On SIGTERM, SIGINT, SIGUSR1 and SIGHUP, end the run after the step, with its state saved.

    The handler only notes the signal. The processes, which agree on it once per optimizer step,
    then stop at the same one, also where a single process was told; `TrainableCheckpoint` saves
    what that step left. On one process a validation is interrupted, too. A second SIGINT stops at
    once. Outside of training, signals do what they did before. Under `nohup` SIGHUP stays ignored.

    Lightning's own handlers, which are replaced in the meantime, save or broadcast from within:
    the processes are then at different places, and wait for each other for ever.

    Raises:
        StoppedError: When all processes have been told.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._step = -1
        self._signals = TakenSignals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals."""
        self._noted, self._step = 0, trainer.global_step
        self._signals.take(STOP_SIGNALS, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if an optimizer step has ended and any process was told."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        noted = self._noted
        if trainer.world_size > 1:
            mine = torch.tensor(float(noted), device=trainer.strategy.root_device)
            noted = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if noted:
            raise StoppedError(noted, trainer.global_step)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any
    ) -> None:
        """Stop; several processes may have different numbers of batches, and end the pass first."""
        if self._noted and trainer.world_size == 1:
            raise StoppedError(self._noted, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._signals.give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back, but for those that would disturb the saving."""
        if not isinstance(exception, StoppedError):
            self._signals.give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted == number:
            raise StopNow
        self._noted = number
        again = "; once more stops at once" if number == signal.SIGINT else ""
        said = f"\n{signal.Signals(number).name}: stopping after this step{again}\n"
        # Not through sys.stderr, into which a line may be half written; a terminal may be gone.
        with suppress(OSError):
            os.write(2, said.encode())
