r"""Where an adapted layer may go through W' = W + gamma_r B A in 16 bit.

Rounding W' to bfloat16 moves an entry by up to 2^-8 of its size. For the output that is no more
than what the rounding of y itself does, and it is how mixed precision trains whole models: 32-bit
masters, 16-bit copies for the products. But W is on the grid of bfloat16 already, so an update
below half of a grid step is not rounded but dropped, for all tokens alike: at the start of
training, and for ever where gamma_r is tiny. So the loss is measured, and as long as it is large,
W' is not made.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn

from rslightning.rslora.linear import LoRALinear, adapter_layers

MOST_LOST: Final = 0.25
"""The largest `lost_in_rounding` with which a layer goes through W'."""

SAMPLED_ROWS: Final = 64


@torch.no_grad()
def allow_merged_orders(model: nn.Module, dtype: torch.dtype, together: bool = False) -> None:
    """Set `merges_in_16_bit` of every adapted layer from what rounding W' to `dtype` would lose.

    Reads `SAMPLED_ROWS` rows of each layer, and waits once for the device.

    Args:
        model: A model with adapters; of a sharded one each process measures its part, and the mean
            counts.
        dtype: The 16-bit dtype of the products.
        together: Whether no layer may as long as one may not: `torch.compile` translates a decoder
            layer anew for each combination, and gives up after eight.
    """
    layers = [layer for _, layer in adapter_layers(model) if layer.has_whole_weight()]
    if not layers:
        return
    lost = torch.stack([lost_in_rounding(layer, dtype) for layer in layers])
    if any(hasattr(layer.weight, "to_local") for layer in layers):  # all shall choose alike
        distributed.all_reduce(lost)
        lost /= distributed.get_world_size()
    shares = lost.tolist()
    if together and not all(share <= MOST_LOST for share in shares):
        shares = [math.inf] * len(shares)
    for layer, share in zip(layers, shares, strict=True):
        layer.merges_in_16_bit = share <= MOST_LOST


def lost_in_rounding(layer: LoRALinear, dtype: torch.dtype) -> Tensor:
    r"""Return `||round(W') - W'|| / ||gamma B A||` over evenly spaced rows.

    No number where B is 0, nor where W is sharded otherwise than B: a `Conv1D`, by its inputs.

    Shape:
        -> [] float32.

    Args:
        layer: An adapted layer, whole or sharded.
        dtype: What W' is rounded to.
    """
    weight, lora_b = _local(layer.oriented_weight), _local(layer.scaled_b)
    lora_a: Any = layer.lora_a
    lora_a = lora_a.full_tensor() if hasattr(lora_a, "full_tensor") else lora_a
    if weight.shape != (len(lora_b), lora_a.shape[1]):
        return weight.new_full((), torch.nan, dtype=torch.float32)
    step = max(1, len(weight) // SAMPLED_ROWS)
    update = layer.gamma * (lora_b[::step].float() @ lora_a.float())
    exact = weight[::step].float() + update
    share: Tensor = (exact.to(dtype).float() - exact).norm() / update.norm()
    return share


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]
