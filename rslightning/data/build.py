"""Build one part of a data set (training or held-out): rows -> turns -> examples -> blocks."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tqdm.auto import tqdm

from rslightning.data.blocks import Blocks, write_blocks
from rslightning.data.encode import Counts, Example, Turns, encode_rows
from rslightning.data.packing import pack
from rslightning.data.rows import check_columns
from rslightning.errors import UserError

ROWS_AT_ONCE: Final = 1000
"""Rows that are rendered and tokenized together."""

BLOCKS_FILE: Final = "blocks.arrow"
COUNTS_FILE: Final = "counts.json"
TEXTS_FILE: Final = "texts.json"


class BadRowError(ValueError):
    """A row cannot be used; the message says why, and is completed with its place."""


@dataclass(frozen=True)
class Encoding:
    """How rows become blocks.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        render: Row -> (prompt, response) pairs; may raise `BadRowError`.
        columns: Text columns that `render` reads; empty: it checks the row itself.
        optional_columns: Those of them that may be null or empty.
        templated: Whether rendered texts carry their special tokens already.
        max_length: Tokens per example and per block.
        packing: Whether a block holds several examples.
        train_on_prompt: Whether the prompts' tokens are targets too.
        skip_bad_rows: Whether a row that cannot be used is counted instead of refused.
    """

    tokenizer: Any
    render: Callable[[Mapping[str, Any]], Turns]
    columns: Sequence[str]
    optional_columns: Collection[str]
    templated: bool
    max_length: int
    packing: bool
    train_on_prompt: bool
    skip_bad_rows: bool


class PartBuilder:
    """Encodes the chosen rows and writes blocks, counts and texts into a folder.

    Args:
        encoding: How rows become blocks.
        rows: A `datasets.Dataset`.
        numbers: Which of the rows, in this order.
        place: Where the rows come from, for messages.
    """

    def __init__(self, encoding: Encoding, rows: Any, numbers: Sequence[int], place: str) -> None:
        self.encoding, self.numbers, self.place = encoding, numbers, place
        if encoding.columns:
            check_columns(rows.column_names, encoding.columns, place)
            rows = rows.select_columns(list(encoding.columns))
        self.rows = rows
        self.counts = Counts()
        self.texts: list[tuple[str, str]] = []

    def write(self, folder: Path, keep_texts: bool) -> None:
        """Fill an empty folder.

        Raises:
            UserError: If a row cannot be used and is not to be skipped.
        """
        single = folder / "encoded.arrow"
        write_blocks(single, ([example] for example in self._examples(keep_texts)))
        if self.encoding.packing:
            encoded = Blocks(single)
            groups = pack(encoded.sizes(), self.encoding.max_length)
            blocks = ([encoded[index] for index in group] for group in groups)
            write_blocks(folder / BLOCKS_FILE, blocks)
            single.unlink()
        else:
            single.rename(folder / BLOCKS_FILE)
        (folder / COUNTS_FILE).write_text(json.dumps(self.counts.as_dict()), encoding="utf-8")
        (folder / TEXTS_FILE).write_text(json.dumps(self.texts), encoding="utf-8")

    def _examples(self, keep_texts: bool) -> Iterator[Example]:
        encoding = self.encoding
        with tqdm(total=len(self.numbers), desc="tokenizing", unit="row", leave=False) as bar:
            for start in range(0, len(self.numbers), ROWS_AT_ONCE):
                rows = list(self._turns(self.numbers[start : start + ROWS_AT_ONCE]))
                if keep_texts:
                    self.texts += [last_pair(turns) for turns in rows]
                for example in encode_rows(
                    encoding.tokenizer, rows, encoding.train_on_prompt, encoding.templated
                ):
                    if cut := self.counts.cut(example, encoding.max_length):
                        yield cut
                bar.update(min(ROWS_AT_ONCE, len(self.numbers) - start))

    def _turns(self, numbers: Sequence[int]) -> Iterator[Turns]:
        for number, row in zip(numbers, self._read(numbers), strict=True):
            try:
                turns = self.encoding.render(self._checked(row))
                if not turns or not all(response for _, response in turns):
                    raise BadRowError("there is no response to learn from")
                yield turns
            except BadRowError as error:
                if not self.encoding.skip_bad_rows:
                    raise UserError(
                        f"{self.place}, row {number + 1}: {error}; mend it, or count such rows "
                        "with data.on_bad_row: skip."
                    ) from None
                self.counts.rows_skipped += 1

    def _read(self, numbers: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        try:
            yield from self.rows.select(numbers)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.place} cannot be read: {error}.") from None

    def _checked(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the row with its optional nulls as empty texts, every other column a text."""
        texts = dict(row)
        for name in self.encoding.columns:
            optional = name in self.encoding.optional_columns
            if texts[name] is None and optional:
                texts[name] = ""
            if not isinstance(texts[name], str):
                raise BadRowError(f"column {name!r} is {texts[name]!r}, not a text")
            if not optional and not texts[name].strip():
                raise BadRowError(f"column {name!r} is empty")
        return texts


def last_pair(turns: Turns) -> tuple[str, str]:
    """Return everything before the last response, and that response."""
    *earlier, (prompt, response) = turns
    return "".join(text for pair in earlier for text in pair) + prompt, response
