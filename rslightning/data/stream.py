"""Data sets that do not fit: read in chunks that are shuffled, encoded and packed as they come.

The rows of a split, in their order, are cut into chunks. Chunk c of pass p belongs to process
(c + p) mod n, which shuffles its rows, packs them, and shuffles the blocks, by a seed made of
(seed, p, c): what a process sees is a function of seed, process and number of processes alone, not
of workers. A stream never ends; after the last row the next pass begins.
"""

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rslightning.data.blocks import Block, count_targets, join
from rslightning.data.build import Encoding, RowEncoder, refuse_if_all_skipped
from rslightning.data.encode import Counts
from rslightning.data.packing import pack
from rslightning.data.rows import Rows, Table
from rslightning.errors import UserError

T = TypeVar("T")

STATE: Final = ("positions", "done", "yielded")


class Position(NamedTuple):
    """Where a process is: pass, chunk of the pass, batch of the chunk."""

    pass_number: int = 0
    chunk: int = 0
    batch: int = 0


class Chunk(NamedTuple):
    """Packed rows, what became of those that were cut, and the first bad one that was skipped."""

    position: Position
    blocks: list[Block]
    counts: Counts
    first_skipped: str


@dataclass(frozen=True)
class ChunkReader:
    """Reads, encodes and packs the chunks of one process.

    Attributes:
        rows: The rows of the split.
        encoding: How rows become blocks.
        chunk_rows: Rows that are shuffled and packed together.
        skip_rows: How many rows at the beginning of a pass are left out, because they are held out.
        seed: Draws the order within a chunk.
        rank: Which process this is.
        world_size: How many there are.
    """

    rows: Rows
    encoding: Encoding
    chunk_rows: int
    skip_rows: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def read(self, start: Position, worker: int = 0, workers: int = 1) -> Iterator[Chunk]:
        """Yield this worker's share of the chunks from `start` on: each `workers`-th one, for ever.

        Raises:
            UserError: If there are no rows, or one cannot be used and is not to be skipped.
        """
        number = 0
        for pass_number in count(start.pass_number):
            chunk = -1
            for chunk, table in enumerate(self._tables()):
                if (chunk + pass_number) % self.world_size != self.rank:
                    continue
                if pass_number == start.pass_number and chunk < start.chunk:
                    continue
                if number % workers == worker:
                    yield self._encode(Position(pass_number, chunk), table)
                number += 1
            if chunk < 0:
                raise UserError(f"{self.rows.name} has no rows to train on.")

    def _tables(self) -> Iterator[Table]:
        """Yield the rows of a pass chunk by chunk, without those that are held out."""
        skip = self.skip_rows
        for table in self.rows.tables(self.chunk_rows):
            left_out = min(skip, len(table.rows))
            skip -= left_out
            if left_out < len(table.rows):
                yield table.after(left_out)

    def _encode(self, position: Position, table: Table) -> Chunk:
        draw = random.Random(f"{self.seed}/{position.pass_number}/{position.chunk}")
        rows = table.pick()
        draw.shuffle(rows)
        encoder = RowEncoder(self.encoding)
        examples = list(encoder.encode(rows))
        groups: Sequence[Sequence[int]] = [[index] for index in range(len(examples))]
        if self.encoding.packing:
            groups = pack([len(e.input_ids) for e in examples], self.encoding.max_length)
        blocks = [join([examples[index] for index in group]) for group in groups]
        draw.shuffle(blocks)
        return Chunk(position, blocks, encoder.counts, encoder.first_skipped)


class StreamLoader(Generic[T]):
    """Batches of a stream, resumable after any batch.

    The last batch of a chunk may be smaller than the others. Batches are drawn in windows of one
    optimizer step; at the start of each the processes exchange their target counts and positions,
    so that the loss is exact over the step and a state holds for all of them.

    Args:
        reader: The chunks of this process.
        batch_size: Rows per batch.
        collate: (blocks, targets of the whole optimizer step) -> batch.
        num_workers: Processes that read, encode and pack ahead.
        length: Batches until the loader stops; None goes on for ever.
        limit: Returns after how many batches an iteration is cut short.
        window: Number of batch -> batches of the optimizer step that begins there.
        gather: Tensor [4] of this process -> tensor [processes, 4] of all.
        on_chunk: Called with the counts of each chunk that is begun.
    """

    def __init__(
        self,
        reader: ChunkReader,
        batch_size: int,
        collate: Callable[[Sequence[Block], Tensor], T],
        *,
        num_workers: int = 0,
        length: int | None = None,
        limit: Callable[[], float] = lambda: math.inf,
        window: Callable[[int], int] = lambda batch: 1,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor[None],
        on_chunk: Callable[[Counts], None] = lambda counts: None,
    ) -> None:
        self.reader, self.batch_size, self.collate = reader, batch_size, collate
        self.num_workers, self.length = num_workers, length
        self.limit, self.window = limit, window
        self.gather, self.on_chunk = gather, on_chunk
        self._positions = torch.zeros(reader.world_size, len(Position._fields), dtype=torch.int64)
        self._done = 0  # batches of the window that begins at these positions
        self._yielded = 0
        self._resumed = False

    def __len__(self) -> int:
        """Batches until the loader stops, for each process."""
        if self.length is None:
            raise TypeError("a stream has no length")
        return self.length

    def __iter__(self) -> Iterator[T]:
        if not self._resumed or self._yielded in (self.length, self.limit()):
            self._yielded = 0
        self._resumed = False
        skip, first = self._done, self._yielded - self._done
        batches = self._batches(Position(*self._positions[self.reader.rank].tolist()))
        while self.length is None or self._yielded < self.length:
            # A window that an earlier `iter` left is over where that one stopped.
            size = max(1, self.window(first)) if first >= 0 else skip
            for batch in self._window(list(islice(batches, size)), skip):
                yield batch
                if self._yielded == self.length:
                    return
            skip, first = 0, self._yielded

    def _window(self, batches: list[tuple[Position, list[Block]]], skip: int) -> Iterator[T]:
        """Yield the batches of an optimizer step, but for the first `skip`."""
        targets = sum(count_targets(blocks) for _, blocks in batches)
        table = self.gather(torch.tensor([targets, *batches[0][0]]))
        self._positions = table[:, 1:]
        step_targets = table[:, 0].sum().clamp(min=1)
        for number, (_, blocks) in enumerate(batches):
            if number < skip:
                continue
            self._done = number + 1
            self._yielded += 1
            yield self.collate(blocks, step_targets)

    def _batches(self, start: Position) -> Iterator[tuple[Position, list[Block]]]:
        """Yield this process's batches from `start` on."""
        empty_since, empty, first_skipped = start.pass_number, Counts(), ""
        for chunk in self._chunks(start):
            self.on_chunk(chunk.counts)
            here = chunk.position
            skip = start.batch if here[:2] == start[:2] else 0
            for number in range(skip, -(-len(chunk.blocks) // self.batch_size)):
                first = number * self.batch_size
                yield here._replace(batch=number), chunk.blocks[first : first + self.batch_size]
            empty.add(chunk.counts)
            first_skipped = first_skipped or chunk.first_skipped
            if chunk.blocks:
                empty_since, empty, first_skipped = here.pass_number, Counts(), ""
            elif here.pass_number - empty_since > self.reader.world_size:
                refuse_if_all_skipped(empty, first_skipped)
                raise UserError(
                    f"No row of {self.reader.rows.name} has a target within max_length = "
                    f"{self.reader.encoding.max_length} tokens; raise data.max_length."
                )

    def _chunks(self, start: Position) -> Iterator[Chunk]:
        loader = DataLoader(
            _Chunks(self.reader, start),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
        )
        for item in loader:
            if isinstance(item, UserError):  # of a worker, which would add its traceback
                raise item
            yield item

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is; the same on every process."""
        values = (self._positions.tolist(), self._done, self._yielded)
        return dict(zip(STATE, values, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at the next `iter`.

        Raises:
            UserError: If it was taken with another number of processes.
        """
        positions, self._done, self._yielded = (state[name] for name in STATE)
        if len(positions) != self.reader.world_size:
            raise UserError(
                f"The checkpoint's stream was read by {len(positions)} processes, this run has "
                f"{self.reader.world_size}; resume with {len(positions)}."
            )
        self._positions = torch.tensor(positions)
        self._resumed = True


class _Chunks(IterableDataset[Any]):
    """The chunks of a process from a position on; workers take them in turns."""

    def __init__(self, reader: ChunkReader, start: Position) -> None:
        self.reader, self.start = reader, start

    def __iter__(self) -> Iterator[Chunk | UserError]:
        share = (0, 1)
        if worker := get_worker_info():
            share = (worker.id, worker.num_workers)
            # A forked process lacks the threads of the tokenizer's pool, and would wait for them.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            yield from self.reader.read(self.start, *share)
        except UserError as error:
            yield error


def _as_it_is(item: Any) -> Any:
    return item
