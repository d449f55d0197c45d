"""PEFT's LoRA in a live model: read as an `Adapter`, or refused by name.

A module of PEFT that adapts one linear map is known by what it offers: `base_layer`, `lora_A` and
`lora_B` (name of the adapter -> linear map, [rank, in] and [out, rank]), `scaling` (name -> gamma)
and `active_adapters`. Whatever rule made it, gamma is what the module multiplies by.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rslightning.errors import UserError
from rslightning.rslora.adapters import Adapter, LayerAdapter
from rslightning.rslora.inject import refuse_tied
from rslightning.rslora.linear import is_linear, linear_features, named_modules
from rslightning.rslora.peft_format import check_plain_lora
from rslightning.rslora.quantized import describe_quantization, is_stored_transposed
from rslightning.rslora.scaling import Scaling, check_alpha, equivalent_alpha, scaling_factor
from rslightning.rslora.spec import ResolvedAdapter


def peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, layer) for every module of PEFT that has A's and B's, in module order."""
    for path, module in named_modules(model):
        matrices = (getattr(module, name, None) for name in ("lora_A", "lora_B"))
        if (
            all(isinstance(matrix, nn.ModuleDict) for matrix in matrices)
            and isinstance(getattr(module, "scaling", None), Mapping)
            and hasattr(module, "active_adapters")
            and hasattr(module, "base_layer")
        ):
            yield path, module


def collect_peft_adapter(
    model: nn.Module,
    base_model: str | None = None,
    take: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach,
) -> Adapter:
    """Return the active adapter of PEFT in `model`, sharing its memory.

    The user's `use_rslora` and alpha are kept where they give the module's own scale; a scale that
    was set by hand becomes the alpha that gives it.

    Args:
        model: The model whose modules PEFT has replaced, not PEFT's wrapper around it.
        base_model: Name or folder of the base model, where known.
        take: What is kept of each matrix; `whole_tensor` where a strategy has shared them out.

    Raises:
        UserError: If there is no adapter, not exactly one is active, or it is more than plain LoRA
            on linear maps with weights of their own.
    """
    name = _active_name(model)
    refuse_other_methods(model)
    layers = _active_layers(model, name)
    for path, layer in layers.items():
        _refuse_more_than_plain(path, layer, name)
    refuse_tied(model, {path: layer.base_layer for path, layer in layers.items()})
    config = peft_configurations(model).get(name)
    scaling: Scaling = "rslora" if getattr(config, "use_rslora", False) else "lora"
    dropout = next(iter(layers.values())).lora_dropout[name]
    return Adapter(
        {path: _layer_adapter(path, layer, name, scaling, take) for path, layer in layers.items()},
        base_model,
        getattr(dropout, "p", 0.0),
        describe_quantization(model),
    )


def peft_adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter of every matrix of the active adapter, as `plain_path` names it."""
    name = _active_name(model)
    return {
        f"{path}.{matrix}.{name}.weight": getattr(layer, matrix)[name].weight
        for path, layer in _active_layers(model, name).items()
        for matrix in ("lora_A", "lora_B")
    }


def refuse_other_methods(module: nn.Module) -> None:
    """Raise `UserError` if PEFT trains `module` by anything but plain LoRA.

    Args:
        module: PEFT's wrapper, or whatever holds it: methods that put no layers into the model
            (prompts, prefixes) are known to the wrapper only.
    """
    configurations = peft_configurations(module)
    active = {name for _, layer in peft_layers(module) for name in layer.active_adapters}
    for name in active & configurations.keys() or configurations:
        check_plain_lora(vars(configurations[name]), f"PEFT's configuration of adapter {name!r}")


def refuse_switched_off(model: nn.Module) -> None:
    """Raise `UserError` if an adapter of PEFT is disabled or merged, where it cannot be trained."""
    for path, layer in peft_layers(model):
        if getattr(layer, "disable_adapters", False):
            raise UserError(f"The adapter of {path} is disabled; call enable_adapter_layers first.")
        if getattr(layer, "merged", False):
            raise UserError(f"The adapter of {path} is merged; call unmerge_adapter first.")


def peft_configurations(module: nn.Module) -> dict[str, Any]:
    """Return name of the adapter -> PEFT's configuration, of everything inside `module`."""
    found: dict[str, Any] = {}
    for child in module.modules():
        configurations = getattr(child, "peft_config", None)
        if isinstance(configurations, Mapping):
            found |= configurations
    return found


def _active_name(model: nn.Module) -> str:
    names: list[str] = sorted(
        {name for _, layer in peft_layers(model) for name in layer.active_adapters}
    )
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise UserError(
            f"Exactly one adapter of PEFT must be active to be written, here {listed}; choose one "
            "with set_adapter."
        )
    return names[0]


def _active_layers(model: nn.Module, name: str) -> dict[str, Any]:
    layers = {path: layer for path, layer in peft_layers(model) if name in layer.scaling}
    if not layers:
        raise UserError(f"The model has no adapter {name!r}.")
    return layers


def _refuse_more_than_plain(path: str, layer: Any, name: str) -> None:
    if not is_linear(layer.base_layer):
        raise UserError(
            f"{path} adapts {type(layer.base_layer).__name__}; only adapters of linear maps can be "
            "merged and written. Leave it out of target_modules."
        )
    plain = (f"lora_A.{name}.weight", f"lora_B.{name}.weight")
    for parameter, _ in layer.named_parameters():
        if name in parameter.split(".")[1:2] and parameter not in plain:
            raise UserError(f"{path} has {parameter}, which plain LoRA does not have.")


def _layer_adapter(
    path: str, layer: Any, name: str, scaling: Scaling, take: Callable[[nn.Parameter], Tensor]
) -> LayerAdapter:
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    _, rank = linear_features(lora_a)  # a weight's own shape is empty under ZeRO-3
    gamma = layer.scaling[name]
    check_alpha(gamma, f"The scale of {path}")
    alpha = getattr(layer, "lora_alpha", {}).get(name)
    if not alpha or not math.isclose(scaling_factor(rank, alpha, scaling), gamma, rel_tol=1e-12):
        alpha = equivalent_alpha(gamma, rank, scaling)
    return LayerAdapter(
        take(lora_a.weight),
        take(lora_b.weight),
        ResolvedAdapter(rank, alpha, scaling),
        is_stored_transposed(layer.base_layer),
    )
