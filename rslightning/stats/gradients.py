r"""Gradient norms: which gradients there are, and what they add up to.

With G_1 .. G_n the gradients of the adapter matrices (arXiv:2312.03732, section 4, "average
parameter gradient norm"):

mean  = 1/n sum_i |G_i|_2
total = sqrt(sum_i |G_i|_2^2)      a, b, and each layer: the same over a part of them
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

Kind = Literal["a", "b", "other"]

ADAPTER_ATTRIBUTES: Final[dict[str, Kind]] = {
    "lora_a": "a",
    "lora_b": "b",
    "lora_e": "other",  # AdaLoRA's singular values
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_E": "other",
    "lora_magnitude_vector": "other",  # DoRA
}
"""What an adapted layer offers: `LoRALinear` two parameters, PEFT's layers dictionaries."""

SUMMARIES: Final = ("mean", "total", "a", "b")


@dataclass(frozen=True)
class GradientSource:
    """A trainable parameter and where it belongs.

    Attributes:
        layer: Path of the adapted layer, or of the module that owns the parameter; the wrapper of
            `torch.compile` does not show in it.
        kind: Which matrix of an adapter it is.
        parameter: The parameter, whole or a shard of it.
    """

    layer: str
    kind: Kind
    parameter: nn.Parameter


def gradient_sources(
    model: nn.Module, among: Collection[nn.Parameter] | None = None
) -> list[GradientSource]:
    """Return the trainable adapter parameters of `model`; without any, all trainable ones.

    Adapters are known by what a module offers (`ADAPTER_ATTRIBUTES`), never by a parameter's path.

    Args:
        model: The model, with adapters of ours or PEFT's or none.
        among: Parameters to choose from; null takes all.
    """
    chosen = None if among is None else {id(parameter) for parameter in among}

    def select(sources: Iterator[GradientSource]) -> list[GradientSource]:
        unique = {id(source.parameter): source for source in sources}
        return [
            source
            for key, source in unique.items()
            if source.parameter.requires_grad and (chosen is None or key in chosen)
        ]

    return select(_adapter_sources(model)) or select(_parameter_sources(model))


def squared_norms(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the squared L2 norm of each gradient, 0 where there is none; the host does not wait.

    Sums are in float32 whatever the gradients are stored in. On the CPU they are in float64:
    torch's float32 norm there is off by 6e-4 at 16 million entries.

    Shape:
        [n] on `device`, float64 (float32 on devices that have no other).
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    norms = [torch.zeros((), dtype=dtype, device=device)] * len(gradients)
    groups: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            dense = gradient.coalesce().values() if gradient.is_sparse else gradient
            groups.setdefault((dense.device, dense.dtype), {})[index] = dense
    for (place, stored), group in groups.items():
        wide = place.type == "cpu" or stored == torch.float64
        fused = torch._foreach_norm(
            list(group.values()), 2, dtype=torch.float64 if wide else torch.float32
        )
        for index, norm in zip(group, torch.stack(fused).to(device, dtype).unbind(), strict=True):
            norms[index] = norm
    return torch.stack(norms).square()


def summarize(
    sources: Sequence[GradientSource], squares: Sequence[float], per_layer: bool = False
) -> dict[str, float]:
    """Return the norms of the module's docstring from the squared norm of each gradient.

    Args:
        sources: What was read, at least one.
        squares: Their squared norms, in the same order.
        per_layer: Add the norm of each layer under its path. A path that is itself the name of a
            summary, or empty, begins with `layer`.

    Returns:
        `mean` and `total`; `a` and `b` if there are adapters; the layers, if asked for.
    """
    parts: dict[str, list[float]] = {}
    for source, square in zip(sources, squares, strict=True):
        if source.kind != "other":
            parts.setdefault(source.kind, []).append(square)
        if per_layer:
            parts.setdefault(_layer_name(source.layer), []).append(square)
    mean = math.fsum(math.sqrt(square) for square in squares) / len(squares)
    norms = {"mean": mean, "total": math.sqrt(math.fsum(squares))}
    return norms | {name: math.sqrt(math.fsum(part)) for name, part in parts.items()}


def _adapter_sources(model: nn.Module) -> Iterator[GradientSource]:
    for path, module in _named_layers(model):
        parts = list(_adapter_parts(module))
        if {"a", "b"} <= {kind for kind, _ in parts}:
            for kind, parameter in parts:
                yield GradientSource(path, kind, parameter)


def _named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of `model` under their names before `torch.compile` wrapped any."""
    for path, module in model.named_modules():
        yield f"{path}.".replace("_orig_mod.", "").rstrip("."), module


def _adapter_parts(module: nn.Module) -> Iterator[tuple[Kind, nn.Parameter]]:
    """Yield what `module` offers under the names of adapters: parameters or holders of some."""
    for name, parameter in module.named_parameters(recurse=False):
        if name in ADAPTER_ATTRIBUTES:
            yield ADAPTER_ATTRIBUTES[name], parameter
    for name, child in module.named_children():
        if name in ADAPTER_ATTRIBUTES:
            for parameter in child.parameters():
                yield ADAPTER_ATTRIBUTES[name], parameter


def _parameter_sources(model: nn.Module) -> Iterator[GradientSource]:
    for path, module in _named_layers(model):
        for parameter in module.parameters(recurse=False):
            yield GradientSource(path, "other", parameter)


def _layer_name(path: str) -> str:
    return f"layer.{path}".rstrip(".") if path in ("", *SUMMARIES) else path
