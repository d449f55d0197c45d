"""What a fit trains in a model: an adapter of ours, one of PEFT, or the whole model."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rslightning.errors import UserError
from rslightning.rslora.adapters import Adapter, adapter_parameters, collect_adapter
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.peft_modules import (
    collect_peft_adapter,
    peft_adapter_parameters,
    peft_layers,
    refuse_other_methods,
)


def trained_adapter(
    module: nn.Module,
    model: nn.Module,
    base_model: str | None = None,
    take: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach,
) -> Adapter | None:
    """Return the adapter that is trained in `model`, sharing its memory; None where it has none.

    Args:
        module: What holds the model: PEFT's wrapper, a LightningModule, or the model itself.
        model: The model whose linear maps are adapted.
        base_model: Name or folder of its base, where known.
        take: What is kept of each matrix; `whole_tensor` where a strategy has shared them out.

    Raises:
        UserError: If more is trained than `W + gamma B A` describes.
    """
    refuse_other_methods(module)
    if next(adapter_layers(model), None) is not None:
        adapter, parameters = collect_adapter(model, base_model, take), adapter_parameters(model)
    elif next(peft_layers(model), None) is not None:
        adapter, parameters = (
            collect_peft_adapter(model, base_model, take),
            peft_adapter_parameters(model),
        )
    else:
        return None
    _refuse_other_training(model, parameters)
    return adapter


def _refuse_other_training(model: nn.Module, adapters: Mapping[str, nn.Parameter]) -> None:
    """Raise `UserError` if a weight is trained that is no adapter's: a merge would lose it."""
    own = {id(parameter) for parameter in adapters.values()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if others := [name for name, parameter in trained if id(parameter) not in own]:
        raise UserError(
            f"{others[0]} is trained beside the adapters ({len(others)} such weights), and merging "
            "them into the base would lose it: freeze it with requires_grad_(False)."
        )
