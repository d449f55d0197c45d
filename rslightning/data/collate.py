"""Blocks of examples -> `Batch`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rslightning.batch import IGNORED, Batch
from rslightning.data.blocks import Block


def collate_blocks(
    blocks: Sequence[Block | None], step_targets: float | Tensor | None = None, *, pad_id: int = 0
) -> Batch:
    """Pad blocks on the right to the longest of them; a missing one is all padding.

    Args:
        blocks: Rows of the batch.
        step_targets: See `Batch.step_targets`.
        pad_id: Fills the ends; neither loss nor attention sees it.
    """
    empty = np.zeros(0, dtype=np.int32)
    rows = [block if block is not None else Block(empty, empty, empty) for block in blocks]
    return Batch(
        input_ids=_pad([row.input_ids for row in rows], pad_id),
        labels=_pad([row.labels for row in rows], IGNORED),
        attention_mask=_pad([np.ones_like(row.input_ids) for row in rows], 0),
        position_ids=_pad([positions(row.lengths) for row in rows], 0),
        step_targets=None if step_targets is None else torch.as_tensor(step_targets).float(),
    )


def pad_prompts(prompts: Sequence[list[int]], pad_id: int) -> Batch:
    """Pad prompts on the left, so that generation goes on from the last real token of each."""
    rows = [np.asarray(prompt) for prompt in prompts]
    return Batch(
        input_ids=_pad(rows, pad_id, left=True),
        labels=_pad([np.full_like(row, IGNORED) for row in rows], IGNORED, left=True),
        attention_mask=_pad([np.ones_like(row) for row in rows], 0, left=True),
    )


def positions(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return 0 .. n-1 for each of `lengths`, one after the other."""
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.arange(lengths.sum()) - starts


def _pad(rows: Sequence[np.ndarray], value: int, left: bool = False) -> Tensor:
    length = max(1, *(len(row) for row in rows)) if rows else 1
    padded = np.full((len(rows), length), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        start = length - len(row) if left else 0
        target[start : start + len(row)] = row
    return torch.from_numpy(padded)
