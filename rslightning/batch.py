"""The one word that data and module share."""

from typing import Final, NamedTuple

import torch.nn.functional as F
from torch import Tensor

IGNORED: Final = -100
"""Label of a position that is not a target."""


class Batch(NamedTuple):
    """Token ids of B rows, padded to a common length T; a row holds one example or several.

    Shape:
        input_ids [B, T] int64.
        labels [B, T] int64: `input_ids` where the model must write the token, `IGNORED` elsewhere
            and at the first token of each example. Position t is predicted from the positions
            before it; the shift is the loss's business.
        attention_mask [B, T] int64: 1 at real tokens, 0 at padding.
        position_ids [B, T] int64: 0, 1, ... in each example, from 0 again in the next one of the
            row: attention stays inside an example. 0 at padding. None: one example per row, and
            `attention_mask` says where it is (prompts padded on the left).
        step_targets [] float32: Targets of the whole optimizer step over its micro-batches times
            processes, so that `nats / step_targets`, averaged over both, is the mean over all
            targets of the step. None: this batch alone.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None = None
    step_targets: Tensor | None = None

    def filled_up(self, length: int) -> "Batch":
        """Return the batch with padding on the right, its rows at least `length` long."""
        missing = length - self.input_ids.shape[1]
        if missing <= 0:
            return self
        padding = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0, "position_ids": 0}
        found = {name: getattr(self, name) for name in padding}
        return self._replace(
            **{
                name: F.pad(tensor, (0, missing), value=padding[name])
                for name, tensor in found.items()
                if tensor is not None
            }
        )
