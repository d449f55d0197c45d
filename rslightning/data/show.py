"""Show what the model sees: decoded examples, targets told from the rest, and how long they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, Final, NamedTuple, TextIO

import numpy as np

from rslightning.batch import IGNORED
from rslightning.data.base import TextDataModule
from rslightning.data.blocks import Block
from rslightning.data.loader import OrderedLoader
from rslightning.data.packing import pack

BINS: Final = 8
BAR_WIDTH: Final = 40


class Marks(NamedTuple):
    """What stands before and after the text that is given and the text that is a target."""

    legend: str
    given: tuple[str, str]
    target: tuple[str, str]

    def wrap(self, text: str, is_target: bool) -> str:
        """Return the text between its marks."""
        before, after = self.target if is_target else self.given
        return f"{before}{text}{after}"


PLAIN: Final = Marks(
    "Targets, which the model must write, stand between « and ».", ("", ""), ("«", "»")
)
COLOURS: Final = Marks(
    "\x1b[32mTargets, which the model must write, are green;\x1b[0m "
    "\x1b[2mwhat it is only given is dim.\x1b[0m",
    ("\x1b[2m", "\x1b[0m"),
    ("\x1b[32m", "\x1b[0m"),
)


def choose_marks(stream: TextIO, environment: Mapping[str, str]) -> Marks:
    """Return colours for a terminal, else marks that a pipe and a file keep readable.

    Args:
        stream: Where the text goes.
        environment: A `NO_COLOR` in it that is not empty refuses colours (no-color.org).
    """
    return COLOURS if stream.isatty() and not environment.get("NO_COLOR") else PLAIN


def describe_data(
    data: TextDataModule, count: int, marks: Marks = PLAIN, ids: bool = False
) -> Iterator[str]:
    """Yield the blocks that training begins with, all lengths, and what packing saves.

    Args:
        data: Has been set up for fit.
        count: How many blocks.
        marks: Tell targets from the rest.
        ids: Whether to list the tokens, too.

    Returns:
        Texts to print, one after the other.
    """
    blocks = data.training_blocks()
    rows = range(len(blocks)) if data.streaming else _shuffled(len(blocks), data.seed)
    shown = (blocks[row] for row in rows)
    yield from describe_blocks(shown, data.tokenizer, count, marks, ids)
    lengths = example_lengths(blocks)
    examples = [length for block in lengths for length in block]
    which = "examples of the stream's first chunk" if data.streaming else "training examples"
    yield f"== lengths of the {len(examples):,} {which}, in tokens"
    yield from histogram(examples, data.max_length)
    yield f"== packing (data.packing: {str(data.packing).lower()})"
    packed = map(sum, lengths) if data.packing else packed_sizes(examples, data.max_length)
    yield from describe_packing(examples, [*packed], data.max_length, data.batch_size, data.seed)


def describe_blocks(
    blocks: Iterable[Block], tokenizer: Any, count: int, marks: Marks = PLAIN, ids: bool = False
) -> Iterator[str]:
    """Yield the legend, then a header for each of the first blocks and a text for each example.

    Args:
        blocks: No more than `count` of them are read.
        tokenizer: Decodes the ids.
        count: How many blocks.
        marks: Tell targets from the rest.
        ids: Whether to list the tokens below each text.

    Returns:
        Texts to print, one after the other.
    """
    yield marks.legend
    for number, block in enumerate(islice(blocks, count), 1):
        yield f"== block {number}: {len(block.input_ids)} tokens, {len(block.lengths)} examples"
        for end, length in zip(block.lengths.cumsum(), block.lengths, strict=True):
            tokens = block.input_ids[end - length : end].tolist()
            labels = block.labels[end - length : end].tolist()
            targets = sum(label != IGNORED for label in labels)
            yield f"-- {length} tokens, {targets} targets\n{mark(tokenizer, tokens, labels, marks)}"
            if ids:
                yield "\n".join(token_lines(tokenizer, tokens, labels, marks))


def mark(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], marks: Marks = PLAIN) -> str:
    """Decode an example, its runs of targets and of the rest between their marks.

    A run is what it adds to the text before it: decoded alone it would lose its leading space,
    which tokenizers of the Llama family put there and which the model sees. A character whose
    tokens are in two runs stands in the latter.

    Args:
        tokenizer: Decodes the ids.
        ids: Tokens of the example.
        labels: The same, `IGNORED` where the token is no target.
        marks: Tell targets from the rest.

    Returns:
        The text.
    """
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    pieces, end, start = [], 0, 0
    for is_target, run in groupby(labels, key=lambda label: label != IGNORED):
        end += len(list(run))
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        while not whole.startswith(text):  # it ends in a part of a character
            text = text[:-1]
        pieces.append(marks.wrap(whole[start : len(text)], is_target))
        start = len(text)
    return "".join(pieces)


def token_lines(
    tokenizer: Any, ids: Sequence[int], labels: Sequence[int], marks: Marks = PLAIN
) -> list[str]:
    """Return a line per token: position, id, the vocabulary's piece, `target` where it is one.

    The loss at a target is that of predicting this token from those above it.

    Args:
        tokenizer: Knows the pieces.
        ids: Tokens of the example.
        labels: The same, `IGNORED` where the token is no target.
        marks: Only colours are used here, the word says it otherwise.

    Returns:
        The lines, in columns.
    """
    pieces = [repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    width = max(map(len, pieces), default=0)
    lines = []
    for number, (token, piece, label) in enumerate(zip(ids, pieces, labels, strict=True)):
        is_target = label != IGNORED
        line = f"{number:5} {token:7}  {piece:{width}}{'  target' if is_target else ''}".rstrip()
        lines.append(line if marks is PLAIN else marks.wrap(line, is_target))
    return lines


def example_lengths(blocks: Iterable[Block]) -> list[list[int]]:
    """Return the tokens of every example of each block."""
    return [block.lengths.tolist() for block in blocks]


def histogram(lengths: Sequence[int], max_length: int, bins: int = BINS) -> list[str]:
    """Return a line per bin of lengths: its first and last length, a bar, count and share.

    Args:
        lengths: Tokens of each example, from 1 to `max_length`.
        max_length: Where the last bin ends.
        bins: How many, at most; they are of one width but for the last.

    Returns:
        The lines. A bin that is not empty has a bar, and the fullest has the longest.
    """
    width = -(-max_length // bins)
    counts = np.bincount((np.asarray(lengths, dtype=np.int64) - 1) // width)
    counts = np.pad(counts, (0, -(-max_length // width) - len(counts)))
    digits, total = len(str(max_length)), max(1, len(lengths))
    lines = []
    for number, count in enumerate(counts.tolist()):
        first, last = number * width + 1, min((number + 1) * width, max_length)
        bar = "█" * -(-count * BAR_WIDTH // max(1, counts.max()))
        span = f"{first:{digits}}-{last:{digits}}"
        lines.append(f"{span}  {bar:{BAR_WIDTH}}  {count:9,}  {count / total:6.1%}")
    return lines


def packed_sizes(lengths: Sequence[int], max_length: int) -> list[int]:
    """Return the tokens of each block that packing would make of examples of these lengths."""
    return [sum(lengths[index] for index in group) for group in pack(lengths, max_length)]


def describe_packing(
    lengths: Sequence[int], packed: Sequence[int], max_length: int, batch_size: int, seed: int
) -> list[str]:
    """Compare a pass over the examples, packed and unpacked, each batch padded to its longest row.

    Args:
        lengths: Tokens of each example.
        packed: Tokens of each block.
        max_length: Tokens that a block can hold.
        batch_size: Rows of a batch, be they blocks or examples.
        seed: Draws the order of the rows, as in the loader.

    Returns:
        A heading, a line for either way, how they were counted, and what packing saves.
    """
    dense = {
        "packed": padded_positions(packed, batch_size, seed),
        "unpacked": padded_positions(lengths, batch_size, seed),
    }
    saved = 1 - dense["packed"] / max(1, dense["unpacked"])
    full = sum(lengths) / max(1, len(packed) * max_length)
    return [
        f"{'':8}  {'rows':>9}  {'batches':>9}  {'positions':>13}  {'padding':>13}  real tokens",
        *(
            f"{name:8}  {len(sizes):9,}  {-(-len(sizes) // batch_size):9,}  {dense[name]:13,}  "
            f"{dense[name] - sum(sizes):13,}  {sum(sizes) / max(1, dense[name]):11.1%}"
            for name, sizes in (("packed", packed), ("unpacked", lengths))
        ),
        f"That is one pass over them on one process: batches of {batch_size} rows, shuffled as the",
        "loader does, each padded to its longest row.",
        f"Packing puts {len(lengths):,} examples into {len(packed):,} blocks of {max_length}, "
        f"{full:.1%} full, and saves {saved:.1%} of the positions.",
    ]


def padded_positions(sizes: Sequence[int], batch_size: int, seed: int) -> int:
    """Return the positions of a first pass, padding included, as the loader draws its batches.

    Args:
        sizes: Tokens of each row.
        batch_size: Rows of a batch; those that the last one lacks are not counted.
        seed: Draws the order of the rows.
    """
    rows = _shuffled(len(sizes), seed)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return sum(len(batch) * max(sizes[row] for row in batch) for batch in batches)


def _shuffled(count: int, seed: int) -> list[int]:
    """Return the rows in the order of the loader's first pass; it does not depend on batches."""
    loader = OrderedLoader(range(count), 1, lambda rows, _: rows, shuffle=True, seed=seed)
    return [row for ((row,),) in loader.order(0) if row is not None]
