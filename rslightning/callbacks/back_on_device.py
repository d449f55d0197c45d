"""Bring a module back to the device that it was trained on."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer


@contextmanager
def back_on_device(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Undo for a while that Lightning moves a module to the CPU before it calls `on_fit_end`.

    There a large model would take minutes for what takes a GPU a second; and what processes tell
    each other through NCCL, and the parts of a sharded weight, must be on the GPUs.
    """
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.cpu()
