"""Text -> token ids and labels. Boundaries are found by construction, never by searching text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from rslightning.batch import IGNORED


class Tokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Return the ids of `text`."""


class Example(NamedTuple):
    """Ids of one example, and which of them the model must write."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Truncation:
    """What the length limit cost, counted."""

    rows: int = 0
    rows_cut: int = 0
    rows_without_target: int = 0
    tokens: int = 0
    tokens_lost: int = 0
    longest_row: int = 0
    kept: list[Example] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.tokens} tokens; longest row {self.longest_row}; "
            f"{self.rows_cut} rows cut, {self.tokens_lost} tokens lost, "
            f"{self.rows_without_target} rows dropped because no target was left"
        )


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt, opened as the tokenizer opens a text and not closed."""
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def encode_example(
    tokenizer: Tokenizer, prompt: str, response: str, train_on_prompt: bool = False
) -> Example:
    """Join prompt, response and end-of-sequence; only the latter two are targets by default.

    Args:
        tokenizer: Its own opening token (if it has one) comes first.
        prompt: What the model is given; may be empty.
        response: What the model must write.
        train_on_prompt: Whether the prompt's tokens are targets too.
    """
    opening = encode_prompt(tokenizer, prompt)
    written = tokenizer.encode(response, add_special_tokens=False)
    if tokenizer.eos_token_id is not None:
        written = [*written, tokenizer.eos_token_id]
    labels = opening if train_on_prompt else [IGNORED] * len(opening)
    return Example(opening + written, labels + written)


def truncate(examples: Iterable[Example], max_length: int) -> Truncation:
    """Cut every example at `max_length` tokens, drop those left without a target, count both."""
    result = Truncation()
    for ids, labels in examples:
        result.rows += 1
        result.tokens += len(ids)
        result.longest_row = max(result.longest_row, len(ids))
        result.rows_cut += len(ids) > max_length
        result.tokens_lost += max(0, len(ids) - max_length)
        if has_target(labels[:max_length]):
            result.kept.append(Example(ids[:max_length], labels[:max_length]))
        else:
            result.rows_without_target += 1
    return result


def has_target(labels: Sequence[int]) -> bool:
    """Tell whether a position after the first is a target (nothing predicts the first)."""
    return any(label != IGNORED for label in labels[1:])
