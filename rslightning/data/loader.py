"""Batches in an order that is a pure function of (seed, pass), resumable after any batch.

A loader of Lightning's or torch's repeats rows after a resume in mid-pass; this one starts again
where its state says, with any number of workers and processes.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


class OrderedLoader(Generic[T]):
    """Iterates over a map-style data set, one pass per `iter`.

    Process k of n takes batches k, k + n, ... of the pass; all of them see the same number of
    batches, and the last ones are filled up with `None` for the rows that are not there.

    Args:
        dataset: What `dataset[index]` returns goes to `collate`.
        batch_size: Rows per batch and process.
        collate: (rows, what `step_value` returned) -> batch; a row is None where the pass ran out.
        shuffle: Whether the order changes from pass to pass; else it is that of `dataset`.
        seed: Draws the order.
        rank: Which process this is.
        world_size: How many there are.
        num_workers: Processes that read and collate ahead.
        step_value: Optionally, a number for each batch of the pass, computed from the rows of all
            processes: the argument is the pass's order, [batch][process][row index or None].
        limit: Returns after how many batches a pass is cut short.
        pin_memory: Hand batches over in page-locked memory.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        batch_size: int,
        collate: Callable[[Sequence[Any], Any], T],
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        step_value: Callable[[list[list[list[int | None]]]], Sequence[Any]] | None = None,
        limit: Callable[[], float] = lambda: math.inf,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.step_value = num_workers, step_value
        self.limit, self.pin_memory = limit, pin_memory
        self._pass = 0
        self._yielded = 0
        self._resumed = False

    def __len__(self) -> int:
        """Batches of one pass, for each process."""
        return -(-len(self.dataset) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[T]:
        if self._yielded >= min(len(self), self.limit()) or not self._resumed:
            self._pass += 1 if self._yielded else 0
            self._yielded = 0
        self._resumed = False
        batches = self.order(self._pass)
        values = self.step_value(batches) if self.step_value else [None] * len(batches)
        todo = [(batch[self.rank], value) for batch, value in zip(batches, values, strict=True)][
            self._yielded :
        ]
        loader = DataLoader(
            _Batches(self.dataset, todo, self.collate),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        for batch in loader:
            self._yielded += 1
            yield batch

    def order(self, number: int) -> list[list[list[int | None]]]:
        """Return the row indices of a pass: [batch][process][row], None where rows ran out."""
        rows: list[int | None] = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(f"{self.seed}/{number}").shuffle(rows)
        size = self.batch_size
        rows += [None] * (len(self) * size * self.world_size - len(rows))
        shards = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [shards[i : i + self.world_size] for i in range(0, len(shards), self.world_size)]

    def state_dict(self) -> dict[str, int]:
        """Return where the loader is; the same on every process."""
        return {"pass": self._pass, "yielded": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken, at the next `iter`."""
        self._pass, self._yielded = state["pass"], state["yielded"]
        self._resumed = True


class _Batches(Dataset[Any]):
    """The batches of (the rest of) one pass, by position."""

    def __init__(
        self,
        dataset: Sequence[Any],
        batches: list[tuple[list[int | None], Any]],
        collate: Callable[[Sequence[Any], Any], Any],
    ) -> None:
        self.dataset, self.batches, self.collate = dataset, batches, collate

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        rows, value = self.batches[index]
        return self.collate([None if i is None else self.dataset[i] for i in rows], value)
