"""One process has the weights, the others their shapes: give every process memory for a part."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn


@torch.no_grad()
def materialize(
    module: nn.Module,
    device: torch.device,
    is_ready: Callable[[Tensor], bool],
    dtype: torch.dtype | None = None,
) -> list[nn.Parameter]:
    """Put the parameters of `module` on `device`: the first process its own, others empty memory.

    A parameter that two modules share stays one.

    Args:
        module: On the first process with weights, on the others with parameters on `meta`.
        device: Where they go.
        is_ready: Tells which parameters were distributed before; they stay as they are.
        dtype: What floating-point numbers become; None leaves each as it is.

    Returns:
        The new parameters, in the same order on every process.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if is_ready(parameter):
                continue
            if parameter not in made:
                made[parameter] = nn.Parameter(
                    _on(parameter, device, dtype), parameter.requires_grad
                )
            setattr(owner, name, made[parameter])
    return list(made.values())


@torch.no_grad()
def broadcast_buffers(model: nn.Module, device: torch.device) -> None:
    """Put all buffers of `model` on `device`, with the first process's values.

    Those that no checkpoint holds, as the frequencies of rotary embeddings, are among them.
    """
    for owner in model.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            whole = _on(buffer, device)
            distributed.broadcast(whole, 0)
            setattr(owner, name, whole)


def _on(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device, dtype=dtype)
    return tensor.detach().to(device, dtype)
