"""Cross-entropy of a causal language model in nats, as a sum and a count."""

import torch.nn.functional as F
from torch import Tensor

from rslightning.batch import IGNORED


def token_nats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed nats of the target tokens and their number.

    The sum and the count are what adds up over batches and processes; a mean does not. Only the
    logits of target positions are turned to float32.

    Shape:
        logits [B, T, V], labels [B, T] -> nats [] float32, targets [] int64.
    """
    targets = labels[:, 1:]
    is_target = targets != IGNORED
    scores = logits[:, :-1][is_target].float()
    return F.cross_entropy(scores, targets[is_target], reduction="sum"), is_target.sum()
