"""What an optimizer step is made of: micro-batches and processes, as a Trainer runs them."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class OptimizerSteps:
    """Tells which batches share an optimizer step; asks the trainer anew each time.

    Args:
        trainer: None is one process without accumulation.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self.trainer = trainer

    @property
    def rank(self) -> int:
        """Which process this is."""
        return self.trainer.global_rank if self.trainer else 0

    @property
    def processes(self) -> int:
        """How many there are."""
        return self.trainer.world_size if self.trainer else 1

    @property
    def shares(self) -> int:
        """By what Lightning divides a loss: micro-batches (in short steps, too) times processes.

        nats / (targets of the step / shares) makes of it the mean over the step's targets.
        """
        return self.processes * (self.trainer.accumulate_grad_batches if self.trainer else 1)

    def limit(self) -> float:
        """Return after how many batches a pass is over; infinity where none is known."""
        return self.trainer.num_training_batches if self.trainer else math.inf

    def window(self, first: int) -> int:
        """Return how many batches the step has that begins with batch `first` of a pass.

        The last one of a pass, or of what `limit_train_batches` leaves of it, may have fewer.
        """
        if self.trainer is None:
            return 1
        left = self.limit() - first
        return int(max(1, min(self.trainer.accumulate_grad_batches, left)))

    def share_targets(self, counts: Sequence[int]) -> list[float]:
        """Return for each batch of a pass `Batch.step_targets`.

        Args:
            counts: Targets of each batch, over all processes.
        """
        values: list[float] = []
        while (first := len(values)) < len(counts):
            size = self.window(first)
            total = max(1, sum(counts[first : first + size]))
            values += [total / self.shares] * size
        return values[: len(counts)]

    def gather(self, values: Tensor) -> Tensor:
        """Return the values [n] of all processes as [processes, n], on the processes' device."""
        if self.trainer is None or self.processes == 1:
            return values[None]
        mine = values.to(self.trainer.strategy.root_device)
        table = [torch.empty_like(mine) for _ in range(self.processes)]
        torch.distributed.all_gather(table, mine)
        return torch.stack(table)
