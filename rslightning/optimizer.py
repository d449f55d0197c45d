"""Optimizer and schedule: built, or refused, and stepped by the fastest of torch's kernels."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Final

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from rslightning.errors import UserError

FUSED_DEVICES: Final = ("cuda", "cpu")
"""Where one kernel updates all weights; torch has more devices, on which this was not tried."""

OF_MATRICES: Final[dict[type, tuple[str, ...]]] = {
    DeepSpeedStrategy: ("Adafactor", "Muon"),
    ModelParallelStrategy: ("Adafactor",),
}
"""Strategy -> optimizers that look at whole matrices, where it does not give them any.

DeepSpeed gives an optimizer a part of one vector of all entries, at every stage of ZeRO: without an
error, Adafactor then trains otherwise. FSDP2's parts know of the whole, but torch 2.13 cannot
compute Adafactor's column means of them.
"""


def build_optimizer(make: Callable[..., Optimizer], parameters: list[nn.Parameter]) -> Optimizer:
    """Return the optimizer of some parameters.

    Args:
        make: Its class with its arguments.
        parameters: What it trains.

    Raises:
        UserError: If the class does not take the arguments, or trains no dense parameters.
    """
    with told_as("model.optimizer"):
        optimizer = make(parameters)
    if isinstance(optimizer, SparseAdam):
        raise UserError("model.optimizer: SparseAdam is for sparse gradients; take Adam.")
    return optimizer


def build_schedule(make: Callable[..., Any], optimizer: Optimizer) -> Any:
    """Return the schedule of an optimizer; it is first tried for a step on a copy of its rates.

    Args:
        make: Its class with its arguments.
        optimizer: Whose rates it sets.

    Raises:
        UserError: If the class does not take the arguments, cannot step with them, or waits for a
            metric.
    """
    stand_in = SGD([nn.Parameter(torch.zeros(1))])
    stand_in.param_groups = [
        deepcopy(group | {"params": []}) | {"params": group["params"]}  # a rate may be a tensor
        for group in optimizer.param_groups
    ]
    stand_in.defaults = optimizer.defaults
    with told_as("model.lr_scheduler"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimizer makes no step
        tried = make(stand_in)
        if isinstance(tried, ReduceLROnPlateau):
            raise UserError("ReduceLROnPlateau waits for a metric, which is not supported.")
        tried.step()
    return make(optimizer)


@contextmanager
def told_as(option: str) -> Iterator[None]:
    """Tell whatever a class says of its arguments as a wrong option."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{option}: {kind}{said}") from error


def refuse_parts(optimizer: Optimizer, strategy: Any) -> None:
    """Refuse an optimizer that needs whole matrices under a strategy that does not give it any.

    Args:
        optimizer: What was asked for.
        strategy: The Trainer's.

    Raises:
        UserError: If it would fail, or train otherwise than in a single process.
    """
    name = type(optimizer).__name__
    if any(isinstance(strategy, kind) and name in names for kind, names in OF_MATRICES.items()):
        raise UserError(
            f"{name} looks at whole matrices, and {type(strategy).__name__} gives it parts: take "
            "--model.optimizer torch.optim.AdamW, say, or configs/strategy/ddp.yaml."
        )


def prefer_fused(optimizer: Optimizer) -> None:
    """Let Adam and AdamW of torch update all weights in one kernel, in place.

    torch itself chooses a kernel per operation on a GPU (`foreach`) and a loop over the weights on
    a CPU. A choice of the user, `fused` or `foreach`, stays. So does any optimizer whose weights
    are not all plain floating-point parameters on such a device, as the shards of FSDP2.

    Only the flag of the parameter groups is set: the optimizer then leaves it to a gradient scaler
    to unscale (float16), which an optimizer that was built with `fused=True` does itself, so that
    Lightning refuses to clip. A checkpoint brings its own flags: a run that began without the
    kernel goes on without it.
    """
    if not isinstance(optimizer, Adam | AdamW):
        return
    for group in optimizer.param_groups:
        chosen = group["fused"] is not None or group["foreach"] is not None
        if not chosen and not group["differentiable"] and all(map(_has_kernel, group["params"])):
            group["fused"] = True


def _has_kernel(parameter: nn.Parameter) -> bool:
    plain = type(parameter) is nn.Parameter  # a sharded or quantized one has a class of its own
    return plain and parameter.is_floating_point() and parameter.device.type in FUSED_DEVICES
