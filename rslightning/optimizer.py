"""Which of torch's implementations of an optimizer makes the step."""

from typing import Final

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

FUSED_DEVICES: Final = ("cuda", "cpu")
"""Where one kernel updates all weights; torch has more devices, on which this was not tried."""


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
