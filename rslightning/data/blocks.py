"""Blocks of tokens on disk, memory-mapped: what an encoded and packed data set is kept as.

An Arrow file has one row per block: `input_ids` and `labels` of its examples one after the other,
and `lengths`, the tokens of each example. An unpacked data set has one example per block.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rslightning.batch import IGNORED
from rslightning.data.encode import Example

SCHEMA: Final = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("targets", pa.int32()),
    ]
)
ROWS_PER_CHUNK: Final = 256


class Block(NamedTuple):
    """Examples in a row: token ids, labels, and the tokens of each example."""

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class Blocks(Sequence[Block]):
    """Read access to a file of blocks; nothing is loaded but what is asked for.

    Args:
        path: An Arrow file that `write_blocks` wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        self.targets: np.ndarray = self._table["targets"].to_numpy()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Block:  # type: ignore[override]  # no slices
        row = self._table.slice(range(len(self))[index], 1)  # out of range: IndexError
        columns = (row[name].chunk(0).flatten().to_numpy() for name in Block._fields)
        return Block(*columns)

    def __getstate__(self) -> Path:
        return self.path  # a worker maps the file itself

    def __setstate__(self, path: Path) -> None:
        self.path = path
        self._open()

    def largest_token_id(self) -> int:
        """Return the largest id of all blocks."""
        chunks = self._table["input_ids"].chunks
        return max((int(c.flatten().to_numpy().max()) for c in chunks if len(c)), default=0)

    def sizes(self) -> list[int]:
        """Return the number of tokens of each block."""
        sizes: list[int] = pc.list_value_length(self._table["input_ids"]).to_pylist()
        return sizes


def write_blocks(path: Path, blocks: Iterable[Sequence[Example | Block]]) -> None:
    """Write each group of examples as one block."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for rows in _chunks(map(_row, blocks), ROWS_PER_CHUNK):
            arrays = [
                pa.array(column, type=field.type)
                for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))


def join(examples: Sequence[Example | Block]) -> Block:
    """Return one block of examples, one after the other."""
    return Block(
        np.concatenate([np.asarray(e.input_ids, dtype=np.int32) for e in examples]),
        np.concatenate([np.asarray(e.labels, dtype=np.int32) for e in examples]),
        np.asarray([len(e.input_ids) for e in examples], dtype=np.int32),
    )


def count_targets(blocks: Iterable[Block]) -> int:
    """Return how many tokens of the blocks the model must write."""
    return sum(int((block.labels != IGNORED).sum()) for block in blocks)


def _row(examples: Sequence[Example | Block]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    block = join(examples)
    return (*block, count_targets([block]))


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
