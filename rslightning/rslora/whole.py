"""A parameter as one tensor, wherever a strategy keeps its parts."""

from typing import Any

import torch
from torch import Tensor, distributed, nn


@torch.no_grad()
def whole_tensor(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's values, sharing its memory where this process has them all.

    Where it has not (FSDP2, ZeRO-3), or where DeepSpeed keeps float32 masters beside it (all stages
    of ZeRO), every process must call this for the same parameter. The first one gets the values, in
    the host's memory, masters if there are any; the others get a tensor on `meta`.
    """
    if _is_of_zero(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        full: Any = safe_get_full_fp32_param(parameter)
    elif hasattr(parameter, "full_tensor"):
        full = parameter.full_tensor()
    else:
        return parameter.detach()
    is_first = distributed.get_rank() == 0
    whole: Tensor = full.to("cpu" if is_first else "meta")
    return whole


def is_shared_out(model: nn.Module) -> bool:
    """Tell whether this process has a part of the weights of `model` only."""
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


def _is_of_zero(parameter: nn.Parameter) -> bool:
    """Tell whether an optimizer of ZeRO keeps a float32 master of `parameter`."""
    of_stage_3 = hasattr(parameter, "ds_id") and parameter.requires_grad
    return of_stage_3 or hasattr(parameter, "_hp_mapping")  # None where another process has it
