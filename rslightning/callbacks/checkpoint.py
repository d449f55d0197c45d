"""Checkpoints that are counted in optimizer steps, of the trainable state."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import final


@final
class TrainableCheckpoint(ModelCheckpoint):
    """Save every n optimizer steps and at the end of training; keep the newest few.

    Files are `checkpoints/step-N.ckpt` in the run folder, and `last.ckpt` beside them. What they
    hold is the module's business: a `CausalLMModule` saves its trainable state, the optimizer's and
    the loops'.

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state, whatever the interval; a dry run leaves nothing.

        The base class would keep the state of the last interval, and save in dry runs, too.
        """
        if trainer.fast_dev_run or not self.dirpath:
            return
        self.last_model_path = str(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}.ckpt")
        trainer.save_checkpoint(self.last_model_path, weights_only=False)
