"""The rows of one file, read table by table: JSON lines, Parquet, CSV or plain text.

Nothing is copied to disk, and no more than a table is kept in memory (of JSON that is not one
object per line, the file). What JSON and CSV say is what a row holds: no type is guessed.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Final, TypeAlias

import pyarrow as pa

from rslightning.data.text_file import TextUnit, text_tables
from rslightning.errors import UserError

LOADERS: Final = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst", ".zip")
SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
WHITESPACE: Final = re.compile(r"\s*")
LONGEST_CELL: Final = 2**31 - 1

Content: TypeAlias = pa.Table | list[dict[str, Any]]
"""Rows in succession: as columns, not yet values, or each with its values."""


def file_tables(path: Path, text_unit: TextUnit, size: int) -> Iterator[Content]:
    """Yield a file's rows in order, at most `size` at a time.

    Args:
        path: A file whose suffix is among `LOADERS`.
        text_unit: What a row of a text file is; see `text_tables`.
        size: Rows per table.

    Raises:
        UserError: If the file cannot be read; of JSON and CSV a line is named.
    """
    kind = LOADERS[path.suffix]
    with reading(path):
        if kind == "json":
            yield from _in_tables(_json_rows(path), size)
        elif kind == "csv":
            yield from _in_tables(_csv_rows(path), size)
        elif kind == "parquet":
            yield from _parquet_tables(path, size)
        else:
            yield from text_tables(path, text_unit, size)


def check_file(path: Path) -> None:
    """Raise `UserError` unless a file is there and of a kind that can be read."""
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if path.suffix in COMPRESSED:
        raise UserError(f"{path} is compressed; unpack it first.")
    if path.suffix not in LOADERS:
        raise UserError(f"{path} is no {', '.join(LOADERS)} file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty.")


def python_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table; of columns that `datasets` keeps as JSON, what that says."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for field in table.schema:
        if decode := _json_decoder(field.type):
            for row in rows:
                row[field.name] = decode(row[field.name])
    return rows


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return a function that decodes the JSON in values of a type, None if that has none."""
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        decoders = {f.name: decode for f in kind.fields if (decode := _json_decoder(f.type))}
        if decoders:
            return lambda value: (
                value and value | {name: decode(value[name]) for name, decode in decoders.items()}
            )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        decode = _json_decoder(kind.value_type)
        if decode:
            return lambda values: values and [decode(value) for value in values]
    return None


def reason(error: Exception) -> str:
    """Return the first line of what went wrong; `datasets` wraps the errors of its readers."""
    lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".!")


def _parquet_tables(path: Path, size: int) -> Iterator[pa.Table]:
    """Read in step with whoever uses the rows.

    `datasets` reads Parquet with pyarrow's scanner, which runs ahead of a slow user until the whole
    file is in memory.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(size, use_threads=False):
            yield pa.Table.from_batches([batch])


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield rows of texts; the cells that a short line lacks are None."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        lines = filter(None, reader)  # blank lines are no rows
        try:
            names = next(lines, [])
            repeated = next((name for name in names if name and names.count(name) > 1), None)
            if repeated is not None:
                raise UserError(f"{path} has more than one column {repeated!r}.")
            for cells in lines:
                if len(cells) > len(names):
                    raise UserError(
                        f"{path}, line {reader.line_num}, has {len(cells)} cells, "
                        f"the first line {len(names)}."
                    )
                yield dict(zip_longest(names, cells))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}, is not CSV: {error}.") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lines, or of a file that is JSON in another form."""
    return _json_lines(path) if _starts_with_object(path) else _json_values(path)


def _starts_with_object(path: Path) -> bool:
    """Tell whether the first line that is not blank is a whole JSON object."""
    with path.open("rb") as file:
        first = next(filter(bytes.strip, file), b"{}").removeprefix(codecs.BOM_UTF8).strip()
    try:
        return first.startswith(b"{") and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one per line.

    Raises:
        UserError: If a line is no object, naming it.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = _without_half_characters(json.loads(text, object_pairs_hook=_object), text)
            except UnicodeError:
                raise UserError(f"{path}, line {number}, is not UTF-8 text.") from None
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}, is JSON, but no object of columns.")
            yield row


def _json_values(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that is an array of objects or texts, or objects over many lines.

    Raises:
        UserError: If it is neither; the line is named, or of an array the row.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {number}, is not UTF-8 text.") from None
    try:
        values = _without_half_characters(list(_decode_all(text)), text)
    except UnicodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        if text.startswith("["):
            message = f"{path}, line {error.lineno}, is not JSON: {error}."
            raise UserError(message) from None
        values = None
    if values and isinstance(values[0], list) and len(values) == 1:
        values = [{"text": value} if isinstance(value, str) else value for value in values[0]]
    elif not values or not all(isinstance(value, dict) for value in values):
        values = _json_lines(path)  # says which line is not what it should be
    for number, row in enumerate(values, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}, is JSON, but no object of columns.")
        yield row


def _decode_all(text: str) -> Iterator[Any]:
    """Yield the JSON values of a text that follow one another."""
    decoder, end = json.JSONDecoder(object_pairs_hook=_object), 0
    while end < len(text):
        value, end = decoder.raw_decode(text, end)
        yield value
        end = WHITESPACE.match(text, end).end()  # type: ignore[union-attr]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise `ValueError` if a key has several values: one would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {repeated!r} more than once")
    return values


def _without_half_characters(value: Any, text: str) -> Any:
    """Return what JSON text says; raise `UnicodeError` if it escapes half of a character."""
    if SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _in_tables(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows with None for each column that the file has had so far and the row has not."""
    columns: dict[str, Any] = {}
    while table := list(islice(rows, size)):
        for row in table:
            columns.update(dict.fromkeys(row))
        yield [columns | row for row in table]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a reader says of a broken file into one sentence."""
    try:
        yield
    except GeneratorExit:  # perhaps as the interpreter ends, when modules hold nothing any more
        raise
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        RecursionError,  # of JSON that is nested too deep
        pa.ArrowException,
    ) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}.") from None
