"""Rows of several examples in a causal language model: each example by itself, or refused."""

from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

EXAMPLE: Final = 8
"""Tokens of each of the two examples of the trial."""

PRIME: Final = 7919
"""Its multiples, modulo the size of the vocabulary, are the tokens: from all over it."""

CHANGE_IN_32_BIT: Final = 1e-5
CHANGE_IN_16_BIT: Final = 0.02
"""How much of the spread of a token's logits may be rounding."""


def packed_logits(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Return the logits of rows in which position ids tell where an example begins.

    They tell transformers so where no mask is given: its masks are then block-diagonal. Kernels of
    variable length it takes for a single row only: `flash_attention_2` and its kin get all rows as
    one, in which padding, with its position 0, is an example of one token for each.

    Shape:
        input_ids, position_ids [B, T] -> [B, T, V]; within `nats_for_logits` [1, 1, 1].
    """
    shape = input_ids.shape
    if is_flash_attention_requested(model.config.get_text_config()):
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    outputs: Any = model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    logits: Tensor = outputs.logits
    return logits.unflatten(1, shape)[0] if logits.shape[:2] == (1, shape.numel()) else logits


@torch.no_grad()
def keeps_examples_apart(model: PreTrainedModel) -> bool:
    """Tell whether the second example of a row is computed as if there were no first one.

    A trial answers it: another first example must not change the logits of the second. It does in
    models with a recurrent or convolutional state (Mamba, RWKV, hybrids) and in some that build
    masks of their own (Falcon, BLOOM, OPT). Experts and 8-bit products round by what else is in a
    batch, and in 16 bit another expert may be chosen for a token: the median of the tokens counts.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = PRIME * torch.arange(1, 3 * EXAMPLE + 1, device=model.device) % vocabulary
    first, other, second = ids.split(EXAMPLE)
    positions = torch.arange(EXAMPLE, device=model.device).repeat(2)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = [
            packed_logits(model, torch.cat([before, second])[None], positions[None])[0, EXAMPLE:]
            for before in (first, other)
        ]
    except TypeError:  # it takes no position ids
        return False
    finally:
        for module in in_training:
            module.training = True
    logits, changed = (each.float() for each in found)
    spread = (logits - logits.mean(-1, keepdim=True)).norm(dim=-1)
    moved = (changed - logits).norm(dim=-1) / spread
    in_32_bit = (
        model.dtype.itemsize > 2
        and not torch.is_autocast_enabled(model.device.type)
        and torch.get_float32_matmul_precision() == "highest"  # others have the bits of 16
    )
    allowed = CHANGE_IN_32_BIT if in_32_bit else CHANGE_IN_16_BIT
    return not bool(moved.median() > allowed)  # nor by logits that are not finite, or all the same
