"""Text -> token ids and labels. Boundaries are found by construction, never by searching text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from rslightning.batch import IGNORED

Turns = Sequence[tuple[str, str]]
"""A row as (prompt, response) pairs in order: one for an instruction, several for a dialogue."""


class Tokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], add_special_tokens: bool = ...) -> Any:
        """Return `input_ids` of many texts at once."""

    def get_added_vocab(self) -> dict[str, int]:
        """Return the tokens that stand apart from the text around them, special ones among them."""


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

    def add(self, other: "Counts") -> None:
        """Add what became of other rows."""
        for name, value in other.as_dict().items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "longest_row" else mine + value)

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

    An end-of-sequence token that the tokenizer itself sets behind a text is taken off; one that a
    prompt holds is the prompt's.

    Args:
        tokenizer: Tokenizes them all at once, on all cores if it is a fast one.
        prompts: The texts.
        templated: Whether the texts carry their special tokens already, as chat templates do.
    """
    encoded = _encode(tokenizer, prompts, special=not templated)
    (plain,) = _encode(tokenizer, ["a"], special=not templated)  # holds no end of its own
    if len(plain) < 2 or plain[-1] != tokenizer.eos_token_id:
        return encoded
    return [ids[:-1] if len(ids) > 1 else ids for ids in encoded]


def encode_rows(
    tokenizer: Tokenizer,
    rows: Sequence[Turns],
    train_on_prompt: bool = False,
    templated: bool = False,
) -> list[Example]:
    """Join prompts, responses and end-of-sequence; only the latter two are targets by default.

    The first prompt is encoded alone, as it is when the model is asked; what follows is encoded as
    the continuation that the model writes: without the space that some tokenizers set before a
    text. The first token of an example is no target, because nothing predicts it.

    Args:
        tokenizer: Its own opening token (if it has one) comes first, unless `templated`.
        rows: Turns of each row; a prompt may be empty.
        train_on_prompt: Whether the prompts' tokens are targets too.
        templated: Whether the texts carry their special tokens already.
    """
    opened = iter(encode_prompts(tokenizer, [turns[0][0] for turns in rows], templated))
    pieces = [[text for pair in turns for text in pair] for turns in rows]
    later = [neighbours for texts in pieces for neighbours in pairwise(texts)]
    encoded = iter(encode_continuations(tokenizer, later))
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


def encode_continuations(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Return the ids of the second text of each pair, as they are after the first one.

    A text is encoded behind the last character (or added token) of the one before it, whose ids are
    then taken off. Where the two would melt into one token, it is encoded behind a line break
    instead, or alone: its ids follow those that its forerunner has alone.

    Args:
        tokenizer: Tokenizes them all at once.
        pairs: (text before, text).
    """
    ending = _ending(tokenizer)
    texts = [text for _, text in pairs]
    encoded = _encode_behind(tokenizer, [ending(before) for before, _ in pairs], texts)
    for context in ("\n", ""):
        molten = [number for number, ids in enumerate(encoded) if ids is None]
        again = _encode_behind(tokenizer, [context] * len(molten), [texts[n] for n in molten])
        for number, ids in zip(molten, again, strict=True):
            encoded[number] = ids
    return [ids for ids in encoded if ids is not None]


def _encode_behind(
    tokenizer: Tokenizer, contexts: Sequence[str], texts: Sequence[str]
) -> list[list[int] | None]:
    """Return the ids of each text behind its context, or None where the two melt."""
    known = sorted(set(contexts))
    heads = dict(zip(known, _encode(tokenizer, known, special=False), strict=True))
    joined = [context + text for context, text in zip(contexts, texts, strict=True)]
    encoded = _encode(tokenizer, joined, special=False)
    return [
        ids[len(heads[context]) :] if ids[: len(heads[context])] == heads[context] else None
        for context, ids in zip(contexts, encoded, strict=True)
    ]


def _ending(tokenizer: Tokenizer) -> Callable[[str], str]:
    """Return a function that gives the last unit of a text: an added token, else a character."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def ending(text: str) -> str:
        return next((token for token in added if token and text.endswith(token)), text[-1:])

    return ending


def _encode(tokenizer: Tokenizer, texts: Iterable[str], special: bool) -> list[list[int]]:
    texts = list(texts)
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special)["input_ids"]
    return ids
