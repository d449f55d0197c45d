"""A validation that was due when a run ended: the run that goes on makes it.

Lightning takes a checkpoint of a step to come from behind the validation that follows the step. It
may come from before or within: the callbacks that wait for the loss would then never see it.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer import call


def is_validation_due(trainer: Trainer) -> bool:
    """Tell, at the end of a batch, whether Lightning is about to validate."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def let_begin(trainer: Trainer, step: int) -> int | None:
    """Let a fit begin that goes on from its last step: Lightning would leave it at that.

    Returns:
        The `max_steps` to give back once it has begun; None if it begins by itself.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    limit: int = loop.max_steps
    if not 0 < limit <= step:
        return None
    loop.max_steps = step + 1
    return limit


def validate_now(trainer: Trainer) -> None:
    """Validate before the first step, as Lightning does after one."""
    loop: Any = trainer.fit_loop.epoch_loop
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter
    loop.val_loop.restarting = False  # a whole pass
    trainer.validating = True
    call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
    loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_iteration
