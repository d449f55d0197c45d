"""Linear maps that bitsandbytes keeps in 4 or 8 bit: told apart, described, quantized again.

An adapter that is trained beside such a map learns to correct `Q(W)`, what is left of `W` after
quantizing and dequantizing it (QLoRA, arXiv:2305.14314, section 3), and not `W` itself:

    y = Q(W) x + b + gamma_r B A x

so the model that was trained is the one with `Q(W) + gamma_r B A` in the place of `W`.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rslightning.errors import UserError
from rslightning.rslora.linear import LoRALinear, is_conv1d, named_modules


@dataclass(frozen=True)
class QuantizedBase:
    """How the linear maps of a base are quantized, in values that a file can hold.

    Attributes:
        scheme: `nf4` or `fp4` (4 bit, a scale for each block of entries) or `int8` (one for each
            output).
        block_size: Entries that share a scale; 0 for `int8`.
        double: Whether the scales are quantized, too.
        dtype: Dtype of the weights before, and of 4-bit ones after: `bfloat16`, ...
        modules: Path of each such map, in module order -> whether the base stores it as [in, out].
    """

    scheme: str
    block_size: int
    double: bool
    dtype: str
    modules: dict[str, bool]


def is_quantized(module: nn.Module) -> bool:
    """Tell whether `module` is a linear map of bitsandbytes, in 4 or 8 bit.

    An instance can only exist where bitsandbytes has been imported, hence the look into
    `sys.modules` instead of an import.
    """
    layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    return layers is not None and isinstance(module, layers.Linear4bit | layers.Linear8bitLt)


def is_stored_transposed(module: nn.Module) -> bool:
    """Tell whether the base's files keep the weight of this linear map as [in, out].

    transformers quantizes GPT-2's `Conv1D` as [out, in], and remembers the class that it was.
    """
    source = getattr(module, "source_cls", None)
    return is_conv1d(module) or (source is not None and source.__name__ == "Conv1D")


def describe_quantization(model: nn.Module) -> QuantizedBase | None:
    """Return how the base of `model` is quantized, adapters around it or not; None if it is not."""
    wrappers = {id(_inner(module)): path for path, module in named_modules(model)}
    found: dict[str, Any] = {
        wrappers.get(id(module), path): module
        for path, module in named_modules(model)
        if is_quantized(module)
    }
    if not found:
        return None
    modules = {path: is_stored_transposed(module) for path, module in found.items()}
    weight = next(iter(found.values())).weight
    if not hasattr(weight, "quant_state"):
        return QuantizedBase("int8", 0, False, _base_dtype(model), modules)
    state = weight.quant_state
    # For inference some CPUs repack the weights, and keep what they were under another name.
    dtype = _name(getattr(state, "original_dtype", state.dtype))
    double = weight.compress_statistics
    return QuantizedBase(state.quant_type, state.blocksize, double, dtype, modules)


@torch.no_grad()
def seen_weight(weight: Tensor, base: QuantizedBase, transposed: bool = False) -> Tensor:
    """Return `Q(W)`: what a model computes with whose base was quantized like that.

    Shape:
        weight [out, in], or [in, out] if `transposed` -> the same.

    Args:
        weight: W as the base's files hold it.
        base: How it is quantized.
        transposed: Whether W is stored as [in, out].

    Raises:
        UserError: If bitsandbytes is not installed.
    """
    require_bitsandbytes()
    from bitsandbytes import functional

    straight = weight.T if transposed else weight
    wanted = straight.to(getattr(torch, base.dtype)).contiguous()
    seen: Tensor
    if base.scheme == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(wanted.half())
        seen = functional.int8_vectorwise_dequant(codes, scales)
    else:
        packed, state = functional.quantize_4bit(
            wanted,
            blocksize=base.block_size,
            compress_statistics=base.double,
            quant_type=base.scheme,
        )
        seen = functional.dequantize_4bit(packed, state)
    return seen.T if transposed else seen


def require_bitsandbytes() -> None:
    """Raise `UserError` with the command to install it unless bitsandbytes is there."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "A base in 4 or 8 bit needs bitsandbytes: pip install 'rslightning[quantization]'"
        )


def _inner(module: nn.Module) -> Any:
    """Return the linear map inside an adapter, ours or PEFT's; None for any other module."""
    name = "base" if isinstance(module, LoRALinear) else "base_layer"
    return getattr(module, name, None)


def _base_dtype(model: nn.Module) -> str:
    """Return the dtype of what is left unquantized and untrained: norms, embeddings, head."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    return _name(next(dtypes, torch.float16))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
