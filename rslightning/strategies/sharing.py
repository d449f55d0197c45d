"""Which strategies keep a part of the weights in each process, and what cannot be shared out."""

from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from rslightning.errors import UserError


def weight_sharing(strategy: Any, is_quantized: bool, is_compiled: bool) -> Any:
    """Return `strategy` if it is one of ours that shares out weights, and None of any other.

    Args:
        strategy: The Trainer's.
        is_quantized: Whether the base is kept in 4 or 8 bit.
        is_compiled: Whether its layers are compiled.

    Raises:
        UserError: If it shares out weights and is none of ours (what it would share out was built
            by every process as a whole, or not at all), or cannot share out such a base.
    """
    name = type(strategy).__name__
    if not getattr(strategy, "shares_weights", False):
        if isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
            raise UserError(f"{name} is not supported; take configs/strategy/fsdp2.yaml.")
        if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
            raise UserError(f"{name} is not supported; take configs/strategy/deepspeed_zero3.yaml.")
        return None
    if is_quantized:
        raise UserError(
            f"A quantized base is not shared out by {name}: leave quantization out, or take "
            "configs/strategy/ddp.yaml."
        )
    if is_compiled and isinstance(strategy, DeepSpeedStrategy):
        raise UserError(
            "model.compile gains nothing under ZeRO-3, which enters each layer at many places: "
            "leave it out, or take configs/strategy/fsdp2.yaml."
        )
    return strategy


def refuse_shared_gradients(strategy: Any) -> None:
    """Refuse an allocation of ranks where no process has whole gradients.

    Args:
        strategy: The Trainer's.

    Raises:
        UserError: If it shares gradients out: FSDP2, and ZeRO at every stage.
    """
    if isinstance(strategy, DeepSpeedStrategy | ModelParallelStrategy | FSDPStrategy):
        raise UserError(
            f"model.adapter.allocation needs whole gradients, of which {type(strategy).__name__} "
            "leaves each process a part: take configs/strategy/ddp.yaml, or leave allocation out."
        )
