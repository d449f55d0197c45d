r"""One frozen linear map with a low-rank adapter beside it.

x  [..., in]
|________________________
|                        | dropout (training only)
W  [out, in]   frozen    A = lora_a  [rank, in]    Kaiming-uniform, variance free of rank
|                        |
|                        B = lora_b  [out, rank]   zero at initialization
|                        | * gamma_r
(+)______________________|
|
y = W x + b + gamma_r B A x                        (arXiv:2312.03732, eq. 2)

With E = lora_e [rank] between A and B, zero at initialization, it is AdaLoRA's (`adalora.py`):

y = W x + b + gamma_r B diag(E) A x
"""

import math
import sys
import zlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from rslightning.rslora.contraction import adapted_linear
from rslightning.rslora.scaling import rank_corrected_gain
from rslightning.rslora.spec import Init, ResolvedAdapter

SINGULAR_STD: Final = 0.02
"""Standard deviation of A's and B's first entries beside an E, as in AdaLoRA's code."""


class LoRALinear(nn.Module):
    """`y = W x + b + gamma_r B A x` around a frozen `nn.Linear` or GPT-2 `Conv1D`.

    The adapter's parameters are `lora_a` [rank, in] and `lora_b` [out, rank], float32 by default
    whatever the base is stored in; they are cast to the activation's dtype where they are used.
    `rslora/contraction.py` computes the sum in the cheapest order; with dropout, or where the
    base's weight is not at hand, the base is called, and what the adapter adds is computed alone.
    With singular values, B diag(E) is in the place of B, and `lora_e` [rank] is trained, too; else
    that is None.

    Shape:
        x [..., in] -> y [..., out].

    Args:
        base: The frozen map. Its parameters stay where they are and keep their dtype.
        adapter: Rank, alpha and scaling of this module.
        dropout: Probability of zeroing an entry of the adapter's input during training.
        dtype: Storage dtype of the adapter.
        singular_values: Whether there is an E.
    """

    def __init__(
        self,
        base: nn.Module,
        adapter: ResolvedAdapter,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        singular_values: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_features(base)
        self.adapter = adapter
        self.rank, self.gamma = adapter.rank, adapter.gamma
        self.base = base
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        device = next(base.parameters()).device
        self.lora_a = nn.Parameter(
            torch.empty(self.rank, self.in_features, dtype=dtype, device=device)
        )
        self.lora_b = nn.Parameter(
            torch.zeros(self.out_features, self.rank, dtype=dtype, device=device)
        )
        self.lora_e: nn.Parameter | None = None
        if singular_values:
            self.lora_e = nn.Parameter(torch.zeros(self.rank, dtype=dtype, device=device))
        self.merges_in_16_bit = False  # until `allow_merged_orders` has measured what that loses
        self.unmerged_weight: Tensor | None = None

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter's update now; see `merge_adapters`."""
        return self.unmerged_weight is not None

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that look at a layer's dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Return `W x + b + gamma_r B A x`, in the dtype that the base returns."""
        if self.merged:
            y: Tensor = self.base(x)
            return y
        adapter = self.lora_a, self.scaled_b, self.gamma
        drops = self.training and isinstance(self.dropout, nn.Dropout)
        if drops or not self.has_whole_weight():
            return adapted_linear(self.dropout(x), None, self.base(x), *adapter)
        merges = self.merges_in_16_bit
        return adapted_linear(x, self.oriented_weight, self.bias, *adapter, merges)

    @property
    def scaled_b(self) -> Tensor:
        """The left factor of the update `gamma_r scaled_b A`: B, or B diag(E)."""
        return self.lora_b if self.lora_e is None else self.lora_b * self.lora_e

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return name -> parameter of what is trained here."""
        parameters = {"lora_a": self.lora_a, "lora_b": self.lora_b}
        return parameters if self.lora_e is None else parameters | {"lora_e": self.lora_e}

    @property
    def oriented_weight(self) -> Tensor:
        """W [out, in], whichever way the base keeps it."""
        return self.weight.T if is_conv1d(self.base) else self.weight

    def has_whole_weight(self) -> bool:
        """Tell whether W can be multiplied here as it is, without calling the base.

        Not where it is packed (4 and 8 bit), where hooks of the base, or a `forward` put in the
        place of its own, gather it or change what it does, where ZeRO-3 keeps a part of it only, or
        where it is trained.
        """
        base = self.base
        forward_hooks = base._forward_hooks, base._forward_pre_hooks
        backward_hooks = base._backward_hooks, base._backward_pre_hooks
        return (
            (type(base) is nn.Linear or is_conv1d(base))
            and "forward" not in base.__dict__
            and not any(forward_hooks + backward_hooks)
            and not self.weight.requires_grad
            and not hasattr(self.weight, "ds_id")
        )

    @torch.no_grad()
    def reset_adapter(self, name: str, init: Init = "kaiming_uniform") -> None:
        """Draw A and set B to zero: a pure function of torch's seed, `name` and `in`.

        With singular values: draw A and B, and set E to zero; `init` is not looked at.

        Each module has a random stream of its own, keyed by its name, so that neither the order of
        the modules nor the other ranks move it, every process draws the same numbers, and A at rank
        r is the first r rows of A at any higher rank; so are the columns of a B that is drawn.

        Args:
            name: Path of the module in its model; it keys the stream.
            init: Distribution of the entries, see `AdapterSpec.init`.
        """
        seed = (torch.initial_seed() ^ zlib.crc32(name.encode())) & (2**63 - 1)
        generator = torch.Generator("cpu").manual_seed(seed)
        if self.lora_e is not None:
            self._draw_pairs(generator)
            self.lora_e.zero_()
            return
        # Row by row: whole-tensor draws of different sizes are not prefixes of each other.
        rows = torch.empty(self.rank, self.in_features, dtype=torch.float32, device="cpu")
        bound = 1.0 / math.sqrt(self.in_features)
        for row in rows:
            if init == "gaussian":
                row.normal_(0.0, bound / math.sqrt(3.0), generator=generator)
            else:
                row.uniform_(-bound, bound, generator=generator)
        if init == "rank_corrected":
            rows *= rank_corrected_gain(self.rank)
        self.lora_a.copy_(rows)
        self.lora_b.zero_()

    def _draw_pairs(self, generator: torch.Generator) -> None:
        """Draw each row of A and the column of B that belongs to it from N(0, `SINGULAR_STD`^2)."""
        sizes = self.in_features, self.out_features
        row, column = (torch.empty(size, dtype=torch.float32, device="cpu") for size in sizes)
        for index in range(self.rank):
            self.lora_a[index] = row.normal_(0.0, SINGULAR_STD, generator=generator)
            self.lora_b[:, index] = column.normal_(0.0, SINGULAR_STD, generator=generator)

    def extra_repr(self) -> str:
        """Show the shape and the numbers of the method."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, alpha={self.adapter.alpha:g}, gamma={self.gamma:g}"
        )


def is_linear(module: nn.Module) -> bool:
    """Tell whether `module` is a linear map that an adapter can wrap.

    That is `nn.Linear` with its subclasses (4- and 8-bit ones too) and the `Conv1D` of GPT-2.
    """
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether `module` is transformers' `Conv1D`, which stores W as [in, out].

    An instance can only exist where transformers has been imported, hence the look into
    `sys.modules` instead of an import.
    """
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def linear_features(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear map, from its attributes.

    A weight's own shape is no guide: it is packed in 4-bit layers and empty under ZeRO-3.
    """
    sizes: Any = module
    if is_conv1d(module):
        return sizes.nx, sizes.nf
    return sizes.in_features, sizes.out_features


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield (path, layer) for every adapted layer of `model`, in module order."""
    for path, module in named_modules(model):
        if isinstance(module, LoRALinear):
            yield path, module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) as `nn.Module.named_modules` does, with paths by `plain_path`."""
    for path, module in model.named_modules():
        yield plain_path(path), module


def plain_path(path: str) -> str:
    """Return the path of a module or parameter before `torch.compile` wrapped what holds it.

    That is how a checkpoint knows it, and `get_submodule` finds it under both.
    """
    return ".".join(segment for segment in path.split(".") if segment != "_orig_mod")
