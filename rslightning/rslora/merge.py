"""Fold adapters into the weights that they sit beside: W' = W + gamma_r B A.

The product is formed in float32 and rounded once, to the dtype of the result. Merging by repeated
rounding, or undoing by subtraction, would drift; here the base weight itself is put back.
"""

import torch
from torch import Tensor, nn

from rslightning.errors import RunError, UserError
from rslightning.rslora.inject import set_module
from rslightning.rslora.linear import LoRALinear, adapter_layers, is_conv1d


def adapter_delta(lora_a: Tensor, lora_b: Tensor, gamma: float) -> Tensor:
    """Return gamma B A in float32 [out, in]."""
    return (lora_b.float() * gamma) @ lora_a.float()


def add_delta(weight: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight + delta`, summed in float32 or wider and rounded once, to `dtype`.

    Args:
        weight: W in the orientation of `delta`.
        delta: gamma B A in float32.
        dtype: Dtype of the result.

    Raises:
        RunError: If the sum has an entry that is not finite.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = (weight.to(wide) + delta.to(wide)).to(dtype)
    if not torch.isfinite(merged).all():
        raise RunError(
            f"The merged weight has entries that are not finite in {str(dtype).split('.')[-1]}."
        )
    return merged


def lost_share(weight: Tensor, delta: Tensor, merged: Tensor) -> float:
    """Return ||merged - (W + dW)|| / ||dW||: how much of the update the rounding of a merge lost.

    Computed in float64; 0 for an update of zero.
    """
    exact = weight.double() + delta.double()
    norm = delta.double().norm()
    return float((merged.double() - exact).norm() / norm) if norm > 0 else 0.0


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

    Returns:
        The paths of the layers that were unmerged by this call.
    """
    restored = []
    for path, layer in adapter_layers(model):
        if layer.unmerged_weight is not None:
            layer.weight.data = layer.unmerged_weight
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
    if not weight.is_floating_point():
        raise UserError(
            f"{path} is stored in {str(weight.dtype).split('.')[-1]}; merge into the unquantized "
            "base model instead."
        )
    delta = adapter_delta(layer.lora_a, layer.lora_b, layer.gamma)
    try:
        return add_delta(weight, delta.T if is_conv1d(layer.base) else delta, weight.dtype)
    except RunError as error:
        raise RunError(f"{path}: {error} Nothing was merged.") from None
