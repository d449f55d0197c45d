"""Examples -> `Batch`, padded to the longest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rslightning.batch import IGNORED, Batch
from rslightning.data.encode import Example


def pad_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad `examples` on the right to the longest of them."""
    return Batch(
        input_ids=_pad([e.input_ids for e in examples], pad_id),
        labels=_pad([e.labels for e in examples], IGNORED),
        attention_mask=_pad([[1] * len(e.input_ids) for e in examples], 0),
    )


def pad_prompts(prompts: Sequence[list[int]], pad_id: int) -> Batch:
    """Pad prompts on the left, so that generation goes on from the last real token of each."""
    return Batch(
        input_ids=_pad(prompts, pad_id, left=True),
        labels=_pad([[IGNORED] * len(p) for p in prompts], IGNORED, left=True),
        attention_mask=_pad([[1] * len(p) for p in prompts], 0, left=True),
    )


def _pad(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    length = max(len(row) for row in rows)
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        start = length - len(row) if left else 0
        target[start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
