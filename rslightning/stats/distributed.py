"""Squared gradient norms where the gradients are spread over processes: exact, by few collectives.

Each function is entered by all processes and returns the same numbers on all of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rslightning.stats.gradients import squared_norms


def read_squares(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Return the squared norm of each `.grad`, for whole parameters and for DTensors.

    A gradient that every process holds whole (one process, DDP) is read where it is. Of shards
    (FSDP2) each process squares its own, and one all-reduce adds them.
    """
    squares = squared_norms([_local_gradient(parameter) for parameter in parameters], device)
    if not any(is_sharded(parameter) for parameter in parameters):
        return squares
    copies = torch.tensor([_copies(parameter) for parameter in parameters], dtype=squares.dtype)
    squares /= copies.to(device, non_blocking=True)
    distributed.all_reduce(squares)
    return squares


def read_deepspeed_squares(
    engine: Any, parameters: Sequence[nn.Parameter], device: torch.device
) -> Tensor:
    """Return the squared norm of each gradient of a DeepSpeed engine, between backward and step.

    Under ZeRO-3 each process squares its partitions, and one all-reduce adds them. The other stages
    have no such view: one matrix after another is assembled, one collective each.

    Args:
        engine: The `DeepSpeedEngine`, at the boundary of gradient accumulation: before it, this
            call would fail or never return.
        parameters: The module's parameters.
        device: Where the collectives run.
    """
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    if engine.zero_optimization_stage() == 3:
        squares = squared_norms([safe_get_local_grad(p) for p in parameters], device)
        distributed.all_reduce(squares)
    else:  # each whole gradient lives only until its norm is taken
        squares = torch.cat([squared_norms([safe_get_full_grad(p)], device) for p in parameters])
    return squares / _deepspeed_loss_scale(engine) ** 2


def _deepspeed_loss_scale(engine: Any) -> float:
    """Return the factor that float16 leaves in the gradients until the engine steps; else 1."""
    for owner, name in (
        (engine, "torch_autocast_z0_gradscaler"),
        (engine.optimizer, "torch_autocast_gradscaler"),
    ):
        scaler = getattr(owner, name, None)
        if scaler is not None:
            return float(scaler.get_scale())
    return float(getattr(engine.optimizer, "loss_scale", None) or 1.0)


def is_sharded(parameter: nn.Parameter) -> bool:
    """Tell whether `parameter` is a DTensor, as FSDP2 and tensor parallelism make them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return this process's part of the gradient, distributed as the parameter is."""
    gradient: Any = parameter.grad
    if gradient is None or not is_sharded(parameter):
        return gradient  # type: ignore[no-any-return]
    placements = parameter.placements  # type: ignore[attr-defined]
    if gradient.placements != placements:  # as tensor parallelism leaves partial sums
        gradient = gradient.redistribute(placements=placements)
    local: Tensor = gradient.to_local()
    return local


def _copies(parameter: nn.Parameter) -> int:
    """Return how many processes hold each entry of `parameter`'s gradient."""
    world: int = distributed.get_world_size()
    if not is_sharded(parameter):
        return world
    tensor: Any = parameter
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    shards: int = math.prod(size for size, place in sizes if not place.is_replicate())
    return world // shards
