"""Build one part of a data set (training or held-out): rows -> turns -> examples -> blocks."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm.auto import tqdm

from rslightning.data.blocks import Blocks, write_blocks
from rslightning.data.encode import Counts, Example, Turns, encode_rows
from rslightning.data.packing import pack
from rslightning.data.rows import Row
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


class RowEncoder:
    """Turns rows into examples, and counts what becomes of them.

    Args:
        encoding: How rows become blocks.
        keep_texts: Whether prompts and responses are kept, too.
    """

    def __init__(self, encoding: Encoding, keep_texts: bool = False) -> None:
        self.encoding, self.keep_texts = encoding, keep_texts
        self.counts = Counts()
        self.first_skipped = ""  # where it stands, and why
        self.texts: list[tuple[str, str]] = []

    def encode(self, rows: Iterable[Row]) -> Iterator[Example]:
        """Yield the examples of rows that have a target, in their order.

        Raises:
            UserError: If a row cannot be used and is not to be skipped.
        """
        encoding, rows = self.encoding, iter(rows)
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            dialogues = list(self._turns(batch))
            if self.keep_texts:
                self.texts += [last_pair(turns) for turns in dialogues]
            for example in encode_rows(
                encoding.tokenizer, dialogues, encoding.train_on_prompt, encoding.templated
            ):
                if cut := self.counts.cut(example, encoding.max_length):
                    yield cut

    def _turns(self, rows: Iterable[Row]) -> Iterator[Turns]:
        for place, number, values in rows:
            try:
                turns = self.encoding.render(self._checked(values))
                if not turns or not all(response for _, response in turns):
                    raise BadRowError("there is no response to learn from")
                yield turns
            except BadRowError as error:
                wrong = f"{place}, row {number}: {error}"
                if not self.encoding.skip_bad_rows:
                    raise UserError(
                        f"{wrong}; mend it, or count such rows with data.on_bad_row: skip."
                    ) from None
                self.counts.rows_skipped += 1
                self.first_skipped = self.first_skipped or wrong

    def _checked(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the row with its optional nulls as empty texts, every other column a text."""
        texts = dict(row)
        for name in self.encoding.columns:
            optional = name in self.encoding.optional_columns
            text = texts.get(name)
            if text is None and optional:
                text = ""
            if not isinstance(text, str):
                raise BadRowError(f"column {name!r} is {text!r}, not a text")
            if not optional and not text.strip():
                raise BadRowError(f"column {name!r} is empty")
            texts[name] = text
        return texts


def write_part(
    folder: Path, encoding: Encoding, rows: Iterable[Row], total: int, keep_texts: bool, seed: int
) -> None:
    """Encode rows and write blocks, counts and texts into an empty folder.

    What is packed is shuffled before, or blocks would hold neighbours of the same length.

    Args:
        folder: Where to write.
        encoding: How rows become blocks.
        rows: The rows.
        total: How many there are, for the progress bar.
        keep_texts: Whether prompts and responses are kept, too.
        seed: Draws which of the examples of the same length share a block.

    Raises:
        UserError: If a row cannot be used and is not to be skipped, or none can.
    """
    encoder = RowEncoder(encoding, keep_texts)
    single = folder / "encoded.arrow"
    with tqdm(rows, total=total, desc="tokenizing", unit="row", leave=False) as shown:
        write_blocks(single, ([example] for example in encoder.encode(shown)))
    refuse_if_all_skipped(encoder.counts, encoder.first_skipped)
    if encoding.packing:
        encoded = Blocks(single)
        order = np.random.RandomState(seed % 2**32).permutation(len(encoded))
        groups = pack(np.asarray(encoded.sizes())[order].tolist(), encoding.max_length)
        blocks = ([encoded[order[i]] for i in group] for group in groups)
        write_blocks(folder / BLOCKS_FILE, blocks)
        single.unlink()
    else:
        single.rename(folder / BLOCKS_FILE)
    (folder / COUNTS_FILE).write_text(json.dumps(encoder.counts.as_dict()), encoding="utf-8")
    (folder / TEXTS_FILE).write_text(json.dumps(encoder.texts), encoding="utf-8")


def refuse_if_all_skipped(counts: Counts, first: str) -> None:
    """Raise `UserError` that names the `first` bad row if there was no other kind."""
    if counts.rows_skipped and not counts.rows:
        raise UserError(
            f"No row can be used: {counts.rows_skipped} bad rows were skipped, the first of them "
            f"{first}."
        )


def last_pair(turns: Turns) -> tuple[str, str]:
    """Return everything before the last response, and that response."""
    *earlier, (prompt, response) = turns
    return "".join(text for pair in earlier for text in pair) + prompt, response
