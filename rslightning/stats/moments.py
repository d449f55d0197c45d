r"""First and second moments of an adapter's output and of the gradient into its input.

Definition 3.1 of arXiv:2312.03732 calls an adapter `gamma_r B A x` rank-stabilized if, whatever its
rank r: (1) inputs whose m-th moment is Theta(1) in each entry give outputs whose m-th moment is;
(2) loss gradients to its output that are Theta(1) in each entry give loss gradients into its input
that are. Here x [..., in] is the layer's input and v [..., out] the gradient of the loss to the
layer's output; the adapter's output is a summand of that, so v is the gradient to both, and

    output  z = gamma_r B A x            input gradient  g = gamma_r A^T B^T v.

The moments are E[u] and E[u^2] over all entries u of a tensor, padding left out. What is kept of
them are sums, which add up over batches, micro-batches and processes; means do not.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANTITIES: Final = ("activation", "adapter_output", "input_grad")
"""Post-adapter output `y`, adapter's output `z`, gradient `g` into the adapter's input."""


class Moments(NamedTuple):
    """Sums that the moments are made of, in float32 on the device of the data.

    Law: `moments(a ++ b) = combine(moments(a), moments(b))`.

    Shape:
        total [...], squares [...], entries [...]: sum of the entries, of their squares, and their
            number.
    """

    total: Tensor
    squares: Tensor
    entries: Tensor

    def first(self) -> Tensor:
        """Return E[u], NaN where nothing was counted."""
        return self.total / self.entries

    def second(self) -> Tensor:
        """Return E[u^2], NaN where nothing was counted."""
        return self.squares / self.entries

    def times(self, factor: Tensor | float) -> "Moments":
        """Return the moments of `factor * u`."""
        return Moments(self.total * factor, self.squares * factor**2, self.entries)


class LowRank(NamedTuple):
    """One adapter of a layer: gamma_r, A [rank, in] and B [out, rank]."""

    lora_a: Tensor
    lora_b: Tensor
    gamma: float


class AdaptedLayer(NamedTuple):
    """A linear layer and what returns the adapters that are added to its output now.

    In PEFT these can be several, or none. Matrices are whole wherever the layer runs.
    """

    module: nn.Module
    adapters: Callable[[], list[LowRank]]


def measure(values: Tensor, mask: Tensor | None = None) -> Moments:
    """Return the moments of the entries of `values` at the positions that `mask` keeps.

    The sums over each position are taken in float32 without a float32 copy of `values`; a position
    that is left out may hold anything, NaN too.

    Shape:
        values [..., features]; mask [...], nonzero where a position counts, or its flattened form
            where `values` is [positions, features] or [1, positions, features]. A mask of any other
            shape does not fit, and all positions count.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    totals = values.sum(-1, dtype=wide)
    squares = torch.linalg.vector_norm(values, dim=-1, dtype=wide).square()
    kept = _fit(mask, totals)
    sums = torch.where(kept, torch.stack([totals, squares]), 0).reshape(2, -1).sum(1).float()
    return Moments(sums[0], sums[1], (kept.sum() * values.shape[-1]).float())


def measure_product(down: Tensor, up: Tensor, mask: Tensor | None = None) -> Moments:
    r"""Return the moments of the entries of `down @ up`, as `measure` would.

    Where the rank is small the product is not made: with rows d_t of `down` and U = `up`,
    sum_t |d_t U|^2 = <sum_t d_t d_t^T, U U^T>, two matrices [rank, rank].

    Shape:
        down [..., rank], up [rank, features], mask as for `measure`.
    """
    rank, features = up.shape
    if 2 * rank > features:
        return measure(down @ up.to(down.dtype), mask)
    wide = torch.promote_types(down.dtype, torch.float32)
    kept = _fit(mask, down[..., 0])
    with torch.autocast(down.device.type, enabled=False):
        down = torch.where(kept[..., None], down, 0).reshape(-1, rank).to(wide)
        up = up.to(wide)
        total = down.sum(0) @ up.sum(1)
        squares = ((down.T @ down) * (up @ up.T)).sum()
    return Moments(total.float(), squares.float(), (kept.sum() * features).float())


def combine(one: Moments, other: Moments) -> Moments:
    """Return the moments of the entries of both together."""
    return Moments(*(a + b for a, b in zip(one, other, strict=True)))


def mean_over_layers(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the means of E[u] and E[u^2] over the layers that counted anything; NaN if none did.

    Shape:
        moments [..., layers] -> [...], [...].
    """
    counted = moments.entries > 0
    first = torch.where(counted, moments.first(), 0).sum(-1) / counted.sum(-1)
    second = torch.where(counted, moments.second(), 0).sum(-1) / counted.sum(-1)
    return first, second


def output_factors(x: Tensor, adapters: list[LowRank]) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product is `gamma_r B A x`, without dropout.

    They are in the dtype of `x` (or in autocast's) and in that of the adapters.

    Shape:
        x [..., in] -> [..., ranks], [ranks, out].
    """
    down = [F.linear(x, a.to(x.dtype)) * gamma for a, _, gamma in adapters]
    return _cat(down, dim=-1), _cat([b.T for _, b, _ in adapters], dim=0)


def input_gradient_factors(v: Tensor, adapters: list[LowRank]) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product is `gamma_r A^T B^T v`, without dropout.

    They are in the dtype of `v` and in that of the adapters.

    Shape:
        v [..., out] -> [..., ranks], [ranks, in].
    """
    down = [v @ b.to(v.dtype) * gamma for _, b, gamma in adapters]
    return _cat(down, dim=-1), _cat([a for a, _, _ in adapters], dim=0)


class MomentRecorder:
    """Sums up the moments of adapted layers while a model runs forward and backward.

    Nothing that the model computes changes: what hooks compute is outside of autograd, draws no
    random number (so an adapter's dropout is left out), and stays on the device.

    Args:
        layers: Name -> adapted layer.
        device: Where the sums are kept.

    Attributes:
        sums: [quantity, layer, 3] float32, the fields of `Moments`; quantities as in `QUANTITIES`.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], device: torch.device) -> None:
        self.layers = layers
        self.sums = torch.zeros(len(QUANTITIES), len(layers), 3, device=device)
        self._mask: Tensor | None = None
        self._inverse_scale: Tensor | None = None  # of this micro-batch's gradients
        self._is_in_loss: bool | None = None  # in the backward pass of a loss; None: none was told

    def attach(self, mask: Tensor | None, loss_scale: Tensor | None = None) -> ExitStack:
        """Attach hooks for one micro-batch; closing what is returned removes them.

        Args:
            mask: [B, T], nonzero at real tokens; see `measure`.
            loss_scale: Factor of the loss that its gradient is divided by again.
        """
        self._mask = None if mask is None else mask != 0
        self._inverse_scale = None if loss_scale is None else 1 / loss_scale.float()
        handles = ExitStack()
        for index, layer in enumerate(self.layers.values()):
            # First of the layer's hooks: FSDP2's may take the gathered weights away.
            hook = partial(self._see_output, index, layer)
            handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            handles.callback(handle.remove)
        return handles

    def see_loss(self, loss: Tensor) -> None:
        """Divide this micro-batch's gradients by what arrives at `loss` in the backward pass.

        It is 1 unless the engine that calls `backward` scales the loss, as DeepSpeed does.
        Only gradients from here to `leave_loss` count, once this has been called.
        """
        if self._is_in_loss is None:
            self.sums[2] = 0  # what there was were gradients of something else
        self._is_in_loss = True
        inverse_scale = self._inverse_scale

        def divide_by(gradient: Tensor) -> None:
            inverse = 1 / gradient.float()
            self._inverse_scale = inverse if inverse_scale is None else inverse_scale * inverse

        loss.register_hook(divide_by)  # type: ignore[no-untyped-call]

    def leave_loss(self) -> None:
        """Count no gradients until the next loss: they would be another function's."""
        self._is_in_loss = False

    @torch.no_grad()
    def _see_output(
        self,
        index: int,
        layer: AdaptedLayer,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        y: Tensor,
    ) -> None:
        if torch.compiler.is_compiling():  # a hook that is traced would stay in the graph
            return
        adapters = layer.adapters()
        if not adapters:
            return
        if y.requires_grad:  # on the graph that backward goes through, recomputed or not
            hook = partial(self._see_gradient, index, layer, self._mask)
            y.register_hook(hook)  # type: ignore[no-untyped-call]
        # Activation checkpointing runs the layer again inside of backward: seen already.
        if torch._C._current_graph_task_id() == -1:
            x = args[0] if args else next(iter(kwargs.values()))
            self._add(0, index, measure(y, self._mask))
            self._add(1, index, measure_product(*output_factors(x, adapters), self._mask))

    @torch.no_grad()
    def _see_gradient(
        self, index: int, layer: AdaptedLayer, mask: Tensor | None, v: Tensor
    ) -> None:
        if self._is_in_loss is False:
            return
        moments = measure_product(*input_gradient_factors(v, layer.adapters()), mask)
        if self._inverse_scale is not None:
            moments = moments.times(self._inverse_scale)
        self._add(2, index, moments)

    def _add(self, quantity: int, layer: int, moments: Moments) -> None:
        self.sums[quantity, layer] += torch.stack(moments).to(self.sums.device)


def _cat(matrices: list[Tensor], dim: int) -> Tensor:
    return torch.cat(matrices, dim) if len(matrices) > 1 else matrices[0]


def _fit(mask: Tensor | None, positions: Tensor) -> Tensor:
    """Return which positions count; see `measure`."""
    if mask is not None and positions.shape in ((mask.numel(),), (1, mask.numel())):
        mask = mask.reshape(positions.shape)
    if mask is None or mask.shape != positions.shape:
        return torch.ones_like(positions, dtype=torch.bool)
    mask = mask.to(positions.device)
    return mask if mask.dtype == torch.bool else mask != 0
