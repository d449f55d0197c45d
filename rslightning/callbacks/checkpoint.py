"""Checkpoints that are counted in optimizer steps, of the trainable state."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import final

from rslightning.callbacks.non_finite_guard import NonFiniteError
from rslightning.storage import put_in_place, remove


@final
class TrainableCheckpoint(ModelCheckpoint):
    """Save every n optimizer steps and at the end of training; keep the newest few.

    Files are `checkpoints/step-N.ckpt` in the run folder, and `last.ckpt` beside them. What they
    hold is the module's business: a `CausalLMModule` saves its trainable state, the optimizer's and
    the loops'. Each is written under another name and gets its own when it is whole: whenever a
    process dies, a checkpoint of before can be read.

    An exception leaves the state before it. Where there are several processes, only one that all of
    them raise at the same step does (`NonFiniteGuard`'s, and a signal to terminate): for any other
    those that save would wait for those that compute, and the run would hang.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        keep_last: How many of the newest stay.
    """

    def __init__(self, every_n_steps: int = 500, keep_last: int = 2) -> None:
        super().__init__(
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep_last,
            save_last=True,
            save_on_exception=True,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimizer steps only: gradients of a begun one are in no checkpoint.

        A run that goes on from step n would else save it again after its first micro-batch.
        """
        if not trainer.fit_loop._should_accumulate():
            if trainer.global_step % self._every_n_train_steps == 0:
                # Lightning does so after the save: were the process killed between the two, the
                # run that goes on would lack this step's loss.
                trainer._logger_connector.update_train_step_metrics()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state, whatever the interval; a dry run leaves nothing.

        The base class would keep the state of the last interval, and save in dry runs, too.
        """
        if trainer.fast_dev_run or not self.dirpath:
            return
        self.last_model_path = str(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}.ckpt")
        self._save_checkpoint(trainer, self.last_model_path)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the state before the exception, if all processes are here to save it."""
        if trainer.world_size == 1 or isinstance(exception, NonFiniteError | SIGTERMException):
            super().on_exception(trainer, pl_module, exception)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save under the name of a whole file: the base class writes into what it replaces.

        What was logged up to here is on its way to the disk before.
        """
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.save()
        save_whole(trainer, Path(filepath), self.save_weights_only)
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.after_save_checkpoint(self)


def save_whole(trainer: Trainer, path: Path, weights_only: bool = False) -> None:
    """Save a checkpoint, file or folder, that has its name when it is whole; all processes call it.

    Args:
        trainer: Whose state is saved, as its strategy does.
        path: The file or folder, the same on all processes; it may replace another.
        weights_only: Whether to leave out the optimizer's and the loops' state.
    """
    aside = path.with_name(".partial.ckpt")
    if trainer.is_global_zero:
        remove(aside)  # what a run that died left
    trainer.strategy.barrier()
    try:
        trainer.save_checkpoint(aside, weights_only)
        if trainer.is_global_zero:
            put_in_place(aside, path)
    finally:
        if trainer.is_global_zero:
            remove(aside)
