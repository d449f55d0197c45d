"""Text -> token ids and labels. Boundaries are found by construction, never by searching text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

from rslightning.batch import IGNORED

Turns = Sequence[tuple[str, str]]
"""A row as (prompt, response) pairs in order: one for an instruction, several for a dialogue."""


class Tokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], add_special_tokens: bool = ...) -> Any:
        """Return `input_ids` of many texts at once."""


class Example(NamedTuple):
    """Ids of one example, and which of them the model must write."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Counts:
    """What became of the rows; above all, what the length limit cost."""

    rows: int = 0
    rows_cut: int = 0
    rows_without_target: int = 0
    tokens: int = 0
    tokens_lost: int = 0
    longest_row: int = 0
    rows_skipped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.tokens} tokens; longest row {self.longest_row}; "
            f"{self.rows_cut} rows cut, {self.tokens_lost} tokens lost, "
            f"{self.rows_without_target} rows dropped because no target was left, "
            f"{self.rows_skipped} bad rows skipped"
        )

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def cut(self, example: Example, max_length: int) -> Example | None:
        """Count an example and cut it at `max_length` tokens; None if that leaves no target."""
        ids, labels = example
        self.rows += 1
        self.tokens += len(ids)
        self.longest_row = max(self.longest_row, len(ids))
        self.rows_cut += len(ids) > max_length
        self.tokens_lost += max(0, len(ids) - max_length)
        if any(label != IGNORED for label in labels[:max_length]):
            return Example(ids[:max_length], labels[:max_length])
        self.rows_without_target += 1
        return None


def encode_prompts(tokenizer: Tokenizer, prompts: list[str], templated: bool) -> list[list[int]]:
    """Return the ids of prompts, opened as the tokenizer opens a text and not closed.

    Args:
        tokenizer: Tokenizes them all at once, on all cores if it is a fast one.
        prompts: The texts.
        templated: Whether the texts carry their special tokens already, as chat templates do.
    """
    encoded = _encode(tokenizer, prompts, special=not templated)
    end = tokenizer.eos_token_id
    return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in encoded]


def encode_rows(
    tokenizer: Tokenizer,
    rows: Sequence[Turns],
    train_on_prompt: bool = False,
    templated: bool = False,
) -> list[Example]:
    """Join prompts, responses and end-of-sequence; only the latter two are targets by default.

    The first token of an example is no target, because nothing predicts it.

    Args:
        tokenizer: Its own opening token (if it has one) comes first, unless `templated`.
        rows: Turns of each row; a prompt may be empty.
        train_on_prompt: Whether the prompts' tokens are targets too.
        templated: Whether the texts carry their special tokens already.
    """
    opened = iter(encode_prompts(tokenizer, [turns[0][0] for turns in rows], templated))
    later = [text for turns in rows for text in [t for pair in turns for t in pair][1:]]
    encoded = iter(_encode(tokenizer, later, special=False))
    closing = [] if templated or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for turns in rows:
        ids: list[int] = []
        labels: list[int] = []
        for number in range(len(turns)):
            prompt = next(opened) if number == 0 else next(encoded)
            response = next(encoded) + closing
            ids += prompt + response
            labels += (prompt if train_on_prompt else [IGNORED] * len(prompt)) + response
        examples.append(Example(ids, [IGNORED, *labels[1:]]))
    return examples


def _encode(tokenizer: Tokenizer, texts: Iterable[str], special: bool) -> list[list[int]]:
    texts = list(texts)
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special)["input_ids"]
    return ids
