"""Where rows come from: a Hub name, a folder or a file.

Rows are read in sweeps, table by table, so that memory does not grow with the data: files as they
are, data sets of the Hub through `datasets`, which keeps a copy on disk unless they are streamed.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from rslightning.assets import resolve_asset
from rslightning.data.cache import file_digest
from rslightning.data.files import (
    LOADERS,
    Content,
    TextUnit,
    check_file,
    file_tables,
    python_rows,
    reading,
    reason,
)
from rslightning.data.splits import SPLIT_NAMES, files_of_split
from rslightning.errors import UserError

ROWS_PER_TABLE: Final = 1000
NAMED: Final = 8  # columns, in an error


class Row(NamedTuple):
    """A row and where it stands: the file (or Hub name) and its number there, from 1."""

    place: str
    number: int
    values: dict[str, Any]


class Table(NamedTuple):
    """Rows in succession; `first` is the number of the first one at `place`, from 1."""

    place: str
    first: int
    rows: Content

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.rows[0]) if isinstance(self.rows, list) else self.rows.column_names

    def after(self, count: int) -> "Table":
        """Return the table without its first `count` rows."""
        left = self.rows[count:] if isinstance(self.rows, list) else self.rows.slice(count)
        return Table(self.place, self.first + count, left)

    def pick(self, indices: Sequence[int] | np.ndarray | None = None) -> list[Row]:
        """Return the rows at these positions of the table, or all of them.

        Raises:
            UserError: If a text is not UTF-8.
        """
        chosen = np.arange(len(self.rows)) if indices is None else np.asarray(indices, dtype=int)
        return [
            Row(self.place, self.first + int(index), row)
            for index, row in zip(chosen, self._values(chosen), strict=True)
        ]

    def _values(self, chosen: np.ndarray) -> list[dict[str, Any]]:
        if isinstance(self.rows, list):
            return [self.rows[index] for index in chosen]
        rows = _take(self.rows, chosen)
        try:
            return python_rows(rows)
        except UnicodeDecodeError:
            number = self.first + int(chosen[_first_undecodable(rows)])
            raise UserError(f"{self.place}, row {number}, is not UTF-8 text.") from None


class HubSplit(NamedTuple):
    """A split of a data set on the Hub."""

    name: str
    subset: str | None
    split: str


class Rows:
    """The rows of one split, not yet read.

    Args:
        source: Local files, whose rows follow one another, or a split on the Hub.
        streaming: Whether a Hub data set is read over the network instead of kept on disk.
        text_unit: What a row of a text file is; see `text_tables`.
    """

    def __init__(
        self,
        source: Sequence[Path] | HubSplit,
        streaming: bool = False,
        text_unit: TextUnit = "line",
    ) -> None:
        self.source, self.streaming, self.text_unit = source, streaming, text_unit

    @property
    def name(self) -> str:
        """What a person calls the place that the rows come from."""
        if isinstance(self.source, HubSplit):
            return self.source.name
        return ", ".join(map(str, self.source))

    def tables(self, size: int = ROWS_PER_TABLE) -> Iterator[Table]:
        """Yield all rows in order, `size` at a time (fewer at the end of a file).

        Raises:
            UserError: If there are none, or they cannot be read; of JSON lines the first bad one is
                named.
        """
        table = None
        for table in self._sweeps(size):
            yield table
        if table is None:
            raise UserError(f"{self.name} has no rows.")

    def _sweeps(self, size: int) -> Iterator[Table]:
        if isinstance(self.source, HubSplit):
            tables = self._hub_set().with_format("arrow").iter(batch_size=size)
            yield from _number(self.source.name, tables)
            return
        for path in self.source:
            yield from _number(str(path), file_tables(path, self.text_unit, size))

    def pick(self, numbers: np.ndarray | None = None) -> Iterator[Row]:
        """Yield the rows at these positions (ascending, from 0), or all of them, in one sweep."""
        start = 0
        for table in self.tables():
            end = start + len(table.rows)
            if numbers is None:
                yield from table.pick()
            else:
                low, high = np.searchsorted(numbers, [start, end])
                yield from table.pick(numbers[low:high] - start)
                if high == len(numbers):
                    return
            start = end

    def columns(self) -> list[str]:
        """Return the names of the columns.

        Raises:
            UserError: As `tables`.
        """
        return next(self.tables()).columns

    def count(self) -> int:
        """Return the number of rows; all but Parquet files must be read for it."""
        if isinstance(self.source, HubSplit) or any(p.suffix != ".parquet" for p in self.source):
            return sum(len(table.rows) for table in self.tables())
        from pyarrow import parquet

        total = 0
        for path in self.source:
            with reading(path):
                total += parquet.read_metadata(path).num_rows
        return total

    def identity(self) -> Any:
        """Return JSON values that change when the rows do, without tokenizing them."""
        if isinstance(self.source, HubSplit):
            return [*self.source, self._hub_set()._fingerprint]
        return [[file_digest(path), LOADERS[path.suffix]] for path in self.source]

    def _hub_set(self) -> Any:
        import datasets

        assert isinstance(self.source, HubSplit)
        name, subset, split = self.source
        return datasets.load_dataset(name, subset, split=split, streaming=self.streaming)


def find_rows(
    path: str,
    split: str,
    subset: str | None = None,
    streaming: bool = False,
    text_unit: TextUnit = "line",
) -> Rows | None:
    """Return the rows of one split, or None where the data has no such split.

    Args:
        path: Hub name, folder (see `files_of_split`) or single file (which is the training split),
            or `asset:NAME`.
        split: `train`, `held_out` (a validation split, else the test split) or `test` (the other
            way round).
        subset: Configuration of a Hub data set that has several.
        streaming: See `Rows`.
        text_unit: See `Rows`.

    Raises:
        UserError: If nothing readable is at `path`, or it is not clear which files are the split's.
    """
    local = Path(resolve_asset(path)).expanduser()
    if local.is_dir():
        files = files_of_split(local, split)
    elif local.suffix in LOADERS or local.exists():
        files = [local] if split == "train" else []
    elif path.startswith((".", "/", "~")):
        raise UserError(f"{path} does not exist.")
    else:
        return _find_on_hub(path, split, subset, streaming)
    for file in files:
        check_file(file)
    return Rows(files, streaming, text_unit) if files else None


def check_columns(columns: Sequence[str], needed: Sequence[str], path: str) -> None:
    """Raise `UserError` unless all `needed` are among `columns`."""
    missing = [name for name in needed if name not in columns]
    if missing:
        named, more = ", ".join(columns[:NAMED]), len(columns) - NAMED
        others = f" and {more} more" if more > 0 else ""
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are {named}{others}.")


def _number(place: str, tables: Iterable[Content]) -> Iterator[Table]:
    first = 1
    for table in tables:
        yield Table(place, first, table)
        first += len(table)


def _take(rows: pa.Table, chosen: np.ndarray) -> pa.Table:
    try:
        return rows.take(chosen)
    except pa.ArrowNotImplementedError:  # of some types, as string_view
        return pa.concat_tables([rows.slice(0, 0), *(rows.slice(int(n), 1) for n in chosen)])


def _first_undecodable(rows: pa.Table) -> int:
    """Return the position of the first row with a text that is not UTF-8."""
    for index in range(len(rows)):
        try:
            rows.slice(index, 1).to_pylist()
        except UnicodeDecodeError:
            return index
    raise AssertionError("all rows are UTF-8")


def _find_on_hub(name: str, split: str, subset: str | None, streaming: bool) -> Rows | None:
    import datasets

    try:
        available = datasets.get_dataset_split_names(name, subset)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is neither a file or folder here nor a data set that can be fetched: "
            f"{reason(error)}."
        ) from None
    found = next((s for names in SPLIT_NAMES[split] for s in names if s in available), None)
    return Rows(HubSplit(name, subset, found), streaming) if found else None
