"""Plain text files: one document per line, or per paragraph."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

import pyarrow as pa

TextUnit = Literal["line", "paragraph"]


def text_tables(path: Path, unit: TextUnit, size: int) -> Iterator[pa.Table]:
    """Yield the documents of a file in a column `text`, `size` of them at a time.

    Args:
        path: UTF-8, with or without a byte order mark, which is no text.
        unit: What a document is: a `line` that is not blank, or a `paragraph`, that is, successive
            ones of them. A blank line has nothing but white space.
        size: Documents per table.

    Raises:
        UnicodeDecodeError: If the file is not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as file:
        lines = (line.removesuffix("\n") for line in file)
        documents = _paragraphs(lines) if unit == "paragraph" else filter(_is_text, lines)
        while texts := list(islice(documents, size)):
            yield pa.table({"text": pa.array(texts, pa.string())})


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for is_text, successive in groupby(lines, _is_text):
        if is_text:
            yield "\n".join(successive)


def _is_text(line: str) -> bool:
    return bool(line.strip())
