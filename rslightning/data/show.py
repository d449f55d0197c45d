"""Show what the model sees: decoded examples with their targets marked."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from rslightning.batch import IGNORED
from rslightning.data.base import TextDataModule
from rslightning.data.blocks import Block

OPEN, CLOSE = "«", "»"
LEGEND: Final = f"Targets, which the model must write, stand between {OPEN} and {CLOSE}."


def describe_blocks(data: TextDataModule, count: int) -> Iterator[str]:
    """Yield a text for each of the first training blocks; `data` has been set up for fit."""
    assert data.train is not None
    yield LEGEND
    for number in range(min(count, len(data.train))):
        block = data.train[number]
        yield f"== block {number + 1}: {len(block.input_ids)} tokens, {len(block.lengths)} examples"
        for start, length in zip(_starts(block), block.lengths, strict=True):
            ids = block.input_ids[start : start + length].tolist()
            labels = block.labels[start : start + length].tolist()
            targets = sum(label != IGNORED for label in labels)
            yield f"-- {length} tokens, {targets} targets\n{mark(data.tokenizer, ids, labels)}"


def mark(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    """Decode an example, its runs of targets between `OPEN` and `CLOSE`."""
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    pieces = []
    for is_target, pairs in runs:
        text = tokenizer.decode([token for token, _ in pairs])
        pieces.append(f"{OPEN}{text}{CLOSE}" if is_target else text)
    return "".join(pieces)


def _starts(block: Block) -> list[int]:
    ends = block.lengths.cumsum().tolist()
    return [0, *ends[:-1]]
