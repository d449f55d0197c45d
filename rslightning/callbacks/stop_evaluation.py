"""An evaluation that is told to end: after its batch, with a status that says so."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import final

from rslightning.callbacks.taken_signals import TakenSignals
from rslightning.errors import STOP_SIGNALS, StoppedError


@final
class StopEvaluation(Callback):
    """On SIGTERM, SIGUSR1 and SIGHUP, end `validate`, `test` or `predict` after the batch.

    No state is saved, so that the processes need not agree on it; SIGINT interrupts at once, as it
    does anyway. Lightning's own handler of SIGTERM, which is replaced in the meantime, ends the
    command as if all were well, or goes on. Under `nohup` SIGHUP stays ignored.

    Raises:
        StoppedError: When this process was told.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._signals = TakenSignals()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals."""
        self._noted = 0
        self._signals.take(set(STOP_SIGNALS) - {signal.SIGINT}, self._note)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *arguments: Any, **options: Any
    ) -> None:
        """Stop if this process was told."""
        if self._noted:
            raise StoppedError(self._noted)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._signals.give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._signals.give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
