"""The one word that data and module share."""

from typing import Final, NamedTuple

from torch import Tensor

IGNORED: Final = -100
"""Label of a position that is not a target."""


class Batch(NamedTuple):
    """Token ids of B examples, padded to a common length T.

    Shape:
        input_ids [B, T] int64.
        labels [B, T] int64: `input_ids` where the model must write the token, `IGNORED` elsewhere.
            Position t is predicted from the positions before it; the shift is the loss's business.
        attention_mask [B, T] int64: 1 at real tokens, 0 at padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
