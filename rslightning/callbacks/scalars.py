"""Write many scalars at once, at the step where the Trainer writes its own."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary


def optimizer_step(trainer: Trainer) -> int:
    """Return the number of the current optimizer step, from 0: the x-axis of `train/loss`.

    It is the x at which `self.log` writes what it gets until the step is over. All micro-batches of
    a step share it. Ask before the optimizer has stepped: in `on_train_batch_end` it is too late.

    Under manual optimization several optimizers may step in one batch, and Lightning's x is the
    number of the batch.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx


def write_scalars(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Write `values` to all loggers of the trainer, from the first process only.

    TensorBoard gets them as one event, which costs microseconds per value; `self.log` would cost
    half a millisecond per value, on every step.

    Args:
        trainer: Whose loggers write; without a logger nothing happens.
        values: Tag -> value.
        step: The x-axis, see `optimizer_step`.
    """
    if not trainer.is_global_zero or not values:
        return
    for logger in trainer.loggers:
        if not _write_event(logger, values, step):
            logger.log_metrics(dict(values), step)


def _write_event(logger: Logger, values: Mapping[str, float], step: int) -> bool:
    """Write one event, if `logger` is TensorBoard's with an open file; tell whether it was."""
    if not isinstance(logger, TensorBoardLogger):
        return False
    writer = logger.experiment.file_writer
    if writer is None:  # the fit before has closed it; `log_metrics` opens another
        return False
    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    points = [Summary.Value(tag=prefix + tag, simple_value=y) for tag, y in values.items()]
    writer.add_summary(Summary(value=points), step)
    return True
