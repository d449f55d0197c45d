"""Fold adapters into the weights that they sit beside: W' = W + gamma_r B A.

The product is formed in float32 and rounded once, to the dtype of the result. Merging by repeated
rounding, or undoing by subtraction, would drift; here the base weight itself is put back.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from rslightning.errors import RunError, UserError
from rslightning.rslora.inject import set_module
from rslightning.rslora.linear import LoRALinear, adapter_layers, is_conv1d
from rslightning.rslora.quantized import is_quantized
from rslightning.rslora.threads import one_thread_each

BLOCK_ROWS: Final = 64
"""Rows that are worked on at once: few enough for a core's cache, enough for a fast product.

Each step over a whole weight would fetch it from memory again, which takes longer than the step.
"""


@dataclass(frozen=True)
class LayerMerge:
    """How one layer's update compares with its weight, and what its rounding cost.

    Attributes:
        weight_norm: ||W||, of a quantized base ||Q(W)||.
        update_norm: ||dW|| with dW = gamma_r B A.
        lost_share: ||W_merged - (W + dW)|| / ||dW||, of a quantized base with Q(W) for W; 0 for an
            update of zero.
        quantization_error: ||Q(W) - W|| / ||W||: how far the weight that the adapter was trained
            beside, and is merged into, is from the stored one; 0 where nothing is quantized.
    """

    weight_norm: float
    update_norm: float
    lost_share: float
    quantization_error: float = 0.0


@torch.no_grad()
def merge_weight(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gamma: float,
    dtype: torch.dtype,
    transposed: bool = False,
) -> tuple[Tensor, LayerMerge]:
    """Return W + gamma B A, summed in float32 or wider and rounded once, and what that cost.

    The product is always formed in float32: one in bfloat16 would lose what the sum keeps. At a
    high rank it is nearly all of the work. The norms add blocks in float64 that were summed in
    float32: they are right to 1e-5 of themselves, to 1e-3 if all entries are alike.

    Shape:
        weight [out, in], or [in, out] if `transposed` -> the same; lora_a [rank, in];
        lora_b [out, rank].

    Args:
        weight: W.
        lora_a: A.
        lora_b: B.
        gamma: gamma_r.
        dtype: Dtype of the result.
        transposed: Whether W is kept as [in, out].

    Raises:
        RunError: If the sum has an entry that is not finite.
    """
    left, right = lora_b.float() * gamma, lora_a.float()
    if transposed:
        left, right = right.T, left.T
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)

    def merge_rows(first: int) -> list[float]:
        rows = slice(first, first + rows_each)
        return _merge_rows(weight[rows], left[rows], right, merged[rows])

    with one_thread_each() as (threads, count):
        rows_each = BLOCK_ROWS * math.ceil(len(weight) / (BLOCK_ROWS * count))
        squares = list(threads.map(merge_rows, range(0, len(weight), rows_each)))
    of_weight, of_update, of_loss = (math.sqrt(sum(x)) for x in zip(*squares, strict=True))
    if not math.isfinite(of_loss) and not all_finite(merged):
        raise RunError(f"The merged weight has entries that are not finite in {dtype_name(dtype)}.")
    lost_share = of_loss / of_update if of_update else 0.0
    return merged, LayerMerge(of_weight, of_update, lost_share)


def all_finite(tensor: Tensor) -> bool:
    """Tell whether no entry is infinite or NaN; the extremes tell it sooner than each entry."""
    return not tensor.numel() or all(math.isfinite(x) for x in map(float, tensor.aminmax()))


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def merge_adapters(model: nn.Module) -> list[str]:
    """Fold every adapter of `model` into its base weight, in place; a second call does nothing.

    Each new weight is computed aside and checked before any is assigned to its layer, and the base
    weight is kept, so that `unmerge_adapters` restores it bit for bit.

    Returns:
        The paths of the layers that were merged by this call.

    Raises:
        UserError: If a base weight is stored in 4 or 8 bit, where a merge needs dequantization.
        RunError: If a merged weight is not finite; the model is then unchanged.
    """
    layers = {path: layer for path, layer in adapter_layers(model) if not layer.merged}
    merged = {path: _merged_weight(path, layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.unmerged_weight = layer.weight.data
        layer.weight.data = merged[path]
    return list(layers)


@torch.no_grad()
def unmerge_adapters(model: nn.Module) -> list[str]:
    """Put back the base weights that `merge_adapters` replaced; exact, bit for bit.

    Where the model was moved or cast since, they follow it.

    Returns:
        The paths of the layers that were unmerged by this call.
    """
    restored = []
    for path, layer in adapter_layers(model):
        if layer.unmerged_weight is not None:
            layer.weight.data = layer.unmerged_weight.to(layer.weight)
            layer.unmerged_weight = None
            restored.append(path)
    return restored


def unwrap_adapters(model: nn.Module) -> nn.Module:
    """Replace every `LoRALinear` of `model` by its base module, in place, and return `model`.

    After `merge_adapters` this leaves the plain fine-tuned model, before it the plain base.
    """
    for path, layer in list(adapter_layers(model)):
        set_module(model, path, layer.base)
    return model


def _merged_weight(path: str, layer: LoRALinear) -> Tensor:
    weight = layer.weight
    if is_quantized(layer.base) or not weight.is_floating_point():
        raise UserError(
            f"{path} is quantized, and has no weight to add to; write the merged model to a folder "
            "instead (rslightning merge, MergeAdapters)."
        )
    parts = (weight, layer.lora_a, layer.scaled_b, layer.gamma, weight.dtype)
    try:
        return merge_weight(*parts, transposed=is_conv1d(layer.base))[0]
    except RunError as error:
        raise RunError(f"{path}: {error} Nothing was merged.") from None


@torch.no_grad()  # holds for one thread alone
def _merge_rows(weight: Tensor, left: Tensor, right: Tensor, merged: Tensor) -> list[float]:
    """Write some rows of W + dW, rounded, and return three sums of squares: W, dW, what was lost.

    Rounding to 16 bit loses so much more than a sum in float32 does that the latter passes for
    exact. Beside a result in float32 it would not: there the sum is float64's. Rounded to float32
    that is the sum in float32, bit for bit.
    """
    wide = torch.float32 if merged.dtype.itemsize <= 2 else torch.float64
    # Two pieces of memory for all blocks: fresh ones would cost as much as the arithmetic.
    sums = torch.empty(BLOCK_ROWS, weight.shape[1], dtype=wide, device=weight.device)
    updates = torch.empty(BLOCK_ROWS, weight.shape[1], dtype=left.dtype, device=left.device)
    squares = []
    for first in range(0, len(weight), BLOCK_ROWS):
        w, part, out = (x[first : first + BLOCK_ROWS] for x in (weight, left, merged))
        update = torch.mm(part, right, out=updates[: len(w)]).to(w.device)
        exact = sums[: len(w)].copy_(w)
        of_weight = _square_sum(exact)
        out.copy_(exact.add_(update))
        squares.append([of_weight, _square_sum(update), _square_sum(exact.sub_(out))])
    return [sum(x) for x in zip(*squares, strict=True)]


def _square_sum(rows: Tensor) -> float:
    """Return the sum of squares, in float64 where that of float32 ends."""
    flat = rows.flatten()
    total = float(flat.dot(flat))
    return total if math.isfinite(total) else float(flat.double().square().sum())
