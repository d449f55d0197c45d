"""A trained adapter apart from its model: take it out of one, put it into one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rslightning.errors import UserError
from rslightning.rslora.adalora import fold_values, spread_values
from rslightning.rslora.inject import refuse_adapted, wrap_linears
from rslightning.rslora.linear import LoRALinear, adapter_layers, linear_features, plain_path
from rslightning.rslora.quantized import QuantizedBase, describe_quantization, is_stored_transposed
from rslightning.rslora.spec import ResolvedAdapter


@dataclass(frozen=True)
class LayerAdapter:
    """The two matrices of one layer with their numbers.

    Shape:
        lora_a [rank, in], lora_b [out, rank].
    """

    lora_a: Tensor
    lora_b: Tensor
    numbers: ResolvedAdapter
    transposed: bool = False
    """Whether the base keeps W as [in, out], as GPT-2's `Conv1D` does."""


@dataclass(frozen=True)
class Adapter:
    """The adapters of a whole model.

    Attributes:
        layers: Path of each adapted module in the base model -> its matrices.
        base_model: Name or folder of the base model, where known.
        dropout: Dropout on the adapters' input in training.
        quantized: How the base was quantized in training; None where it was not.
    """

    layers: dict[str, LayerAdapter]
    base_model: str | None = None
    dropout: float = 0.0
    quantized: QuantizedBase | None = None


def collect_adapter(
    model: nn.Module,
    base_model: str | None = None,
    take: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach,
) -> Adapter:
    """Return the adapters of `model`, sharing its memory.

    Those with singular values become plain ones, of the ranks that are left: copies.

    Args:
        model: What holds them.
        base_model: Name or folder of the base model, where known.
        take: What is kept of each matrix; `whole_tensor` where a strategy has shared them out.

    Raises:
        UserError: If `model` has none.
    """
    layers = {
        path: plain_adapter(
            {name: take(matrix) for name, matrix in layer.adapter_parameters().items()},
            layer.adapter,
            is_stored_transposed(layer.base),
        )
        for path, layer in adapter_layers(model)
    }
    if not layers:
        raise UserError("The model has no adapters.")
    dropout = next(layer.dropout for _, layer in adapter_layers(model))
    return Adapter(layers, base_model, getattr(dropout, "p", 0.0), describe_quantization(model))


def plain_adapter(
    matrices: Mapping[str, Tensor], numbers: ResolvedAdapter, transposed: bool = False
) -> LayerAdapter:
    """Return the adapter of one layer from what it trains; an E is folded into B.

    Args:
        matrices: Tensors by name, as of `LoRALinear.adapter_parameters`.
        numbers: Rank, alpha and scaling that they were trained with.
        transposed: Whether the base keeps W as [in, out].
    """
    lora_a, lora_b = matrices["lora_a"], matrices["lora_b"]
    if "lora_e" in matrices:
        lora_a, lora_b, numbers = fold_values(lora_a, lora_b, matrices["lora_e"], numbers)
    return LayerAdapter(lora_a, lora_b, numbers, transposed)


@torch.no_grad()
def attach_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Put `adapter` into a `model` that has none, in place; everything else is frozen.

    Raises:
        UserError: If a module is missing or has another shape (the adapter is of another model), or
            `model` has adapters already.
    """
    refuse_adapted(model)
    for path, layer in adapter.layers.items():
        _check_fits(model, path, layer)
    numbers = {path: layer.numbers for path, layer in adapter.layers.items()}
    wrapped = wrap_linears(model, numbers, adapter.dropout)
    for path, layer in adapter.layers.items():
        wrapped[path].lora_a.copy_(layer.lora_a)
        wrapped[path].lora_b.copy_(layer.lora_b)


@torch.no_grad()
def copy_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Copy the matrices of `adapter` into those that `model` has.

    Layers with singular values take any adapter of no higher rank: the others of theirs are left
    as they are, with an E of zero, and compute the same function.

    Raises:
        UserError: If the modules, their ranks or gammas, or the shapes are not the same.
    """
    layers = dict(adapter_layers(model))
    state: dict[str, Tensor] = {}
    for path, saved in adapter.layers.items():
        matrices = {"lora_a": saved.lora_a, "lora_b": saved.lora_b}
        if (layer := layers.get(path)) is not None:
            _check_numbers(path, layer, saved.numbers)
            if layer.lora_e is not None:
                _check_fits(model, path, saved)
                ratio = saved.numbers.gamma / layer.gamma
                matrices = spread_values(layer, saved.lora_a, saved.lora_b, ratio)
        state |= {f"{path}.{name}": matrix for name, matrix in matrices.items()}
    load_adapter_state(model, state)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter of every adapter matrix, as `plain_path` names it."""
    return {
        f"{path}.{name}": parameter
        for path, layer in adapter_layers(model)
        for name, parameter in layer.adapter_parameters().items()
    }


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> detached tensor of every adapter matrix of `model`, sharing its memory."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the adapters of `model`; every matrix must be there and fit.

    Raises:
        UserError: If a name is missing or unknown or a shape differs; nothing is copied then.
    """
    parameters: dict[str, Tensor] = dict(adapter_parameters(model))
    state = {plain_path(name): matrix for name, matrix in state.items()}
    check_same_tensors(parameters, state)
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def check_same_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise `UserError` naming the first difference unless names and shapes are the same."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        name, verb = (missing[0], "lacks") if missing else (unknown[0], "has no place for")
        side = "saved state" if missing else "model"
        raise UserError(
            f"The {side} {verb} {name} ({len(missing)} missing, {len(unknown)} unexpected of "
            f"{len(expected)}): it was saved from another base model or other targets."
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise UserError(
                f"{name} has shape {list(found[name].shape)} in the saved state and "
                f"{list(tensor.shape)} in the model: another base model or rank."
            )


def _check_numbers(path: str, layer: LoRALinear, saved: ResolvedAdapter) -> None:
    # A folder keeps some gammas as the alpha of another scaling, and they come back rounded.
    same_gamma = math.isclose(saved.gamma, layer.gamma, rel_tol=1e-12)
    allocated = layer.lora_e is not None and saved.rank <= layer.rank
    if allocated or (saved.rank == layer.rank and same_gamma):
        return
    raise UserError(
        f"{path} has rank {saved.rank} and gamma {saved.gamma:g} in the saved adapter, "
        f"rank {layer.rank} and gamma {layer.gamma:g} in this run: give both the same "
        "rank, alpha and scaling."
    )


def _check_fits(model: nn.Module, path: str, layer: LayerAdapter) -> None:
    try:
        features = linear_features(model.get_submodule(path))
    except AttributeError:
        raise UserError(
            f"The adapter has matrices for {path}, where the model has no linear module: "
            "it was trained on another base model."
        ) from None
    expected = (layer.lora_a.shape[1], layer.lora_b.shape[0])
    if features != expected:
        raise UserError(
            f"The adapter's matrices for {path} fit a linear map of {expected[0]} -> "
            f"{expected[1]}, the model has {features[0]} -> {features[1]}: it was trained on "
            "another base model."
        )
