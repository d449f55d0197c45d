r"""The adapted layer, forward and backward, in the cheapest order of its products.

With T tokens x [T, in], W [out, in], A [r, in], B [out, r], and dy [T, out] the gradient of y,

    y = x W^T + gamma (x A^T) B^T + bias        dx = dy W + gamma (dy B) A
    dA = gamma (dy B)^T x                       dB = gamma dy^T (x A^T)

Products of matrices associate, so each of these has two ways. Their operations:

    y        x A^T, then B^T          2 T in out + 2 T r (in + out)
             W' = W + gamma B A       2 T in out + 2 r in out              y = x W'^T + bias
    dx       dy B, then A             2 T in out + 2 T r (in + out)
             W', kept or made anew    2 T in out + 0 or 2 r in out         dx = dy W'
    dA, dB   from dy B and x A^T      2 T r (in + out), and 2 T r out and 2 T r in for those two
                                      where dx and y have not made them
             G = dy^T x               2 T in out + 4 r in out              dA = gamma B^T G
                                                                           dB = gamma G A^T

The usual order is the first way of each. W' takes fewer operations, whatever the rank, where
T > in out / (in + out); but as long as dA and dB need x A^T and dy B anyway, for y where T > in and
for dx where T > out. With very many tokens G does where r > in out / (2 (in + out)).
`cost.layer_cost` counts, and `cost.cheapest_order` chooses. W' waits for dx where it is no larger
than the x A^T that the usual order keeps: no order keeps more than the usual one does.

gamma is multiplied into no matrix: it is the factor of a product while that is computed.

Rounding: in float32 the orders differ by the rounding of float32. In 16 bit they all round A and B
to 16 bit, by up to 2^-8 of an entry in bfloat16, and accumulate in float32; W' is rounded to 16 bit
besides, by up to 2^-8 of an entry of it. That adds to y about as much as the rounding of y itself,
but what is smaller than it in `gamma B A` is lost, for all tokens alike: see `rslora/rounding.py`.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from inspect import signature
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor

from rslightning.cost import ORDERS, USUAL_ORDER, LayerShape, Order, cheapest_order, kept_entries

SPLIT_ORDERS: Final = tuple(order for order in ORDERS if not any(order[:2]))
"""The orders without W'."""

HAS_AMX: Final[bool] = hasattr(torch.cpu, "get_capabilities") and bool(
    torch.cpu.get_capabilities().get("amx_tile")
)
"""Whether the CPU, if products are computed there, has a unit for those of 16-bit matrices."""

Function: Any = torch.autograd.Function  # has no type that a class could be derived from


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    addend: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gamma: float,
    merges_in_16_bit: bool = False,
    order: Order | None = None,
) -> Tensor:
    r"""Return `x W^T + gamma x A^T B^T + addend`, with gradients for all but W.

    Products are in the dtype of x, or in autocast's where that is on and x is not float64. A and B
    may be of another dtype, float32 as a rule, and so are their gradients then.

    Shape:
        x [..., in], weight [out, in], lora_a [rank, in], lora_b [out, rank] -> [..., out].

    Args:
        x: Input.
        weight: The frozen W; None leaves it out.
        addend: A bias [out], or what the adapter is added to [..., out]; None is 0.
        lora_a: A.
        lora_b: B.
        gamma: The scaling factor gamma_r.
        merges_in_16_bit: Whether W' may be chosen where products are in 16 bit.
        order: How to compute it; None chooses the cheapest.

    Raises:
        RuntimeError: When a second derivative is taken.
    """
    casts = _is_autocast(x) and x.dtype != torch.float64  # which autocast leaves alone
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    if addend is not None:
        addend = (addend if addend.ndim == 1 else addend.flatten(0, -2)).to(dtype)
    grad = torch.is_grad_enabled()
    shape = LayerShape(
        lora_a.shape[1],
        lora_b.shape[0],
        lora_a.shape[0],
        rows.shape[0],
        input_gradient=grad and x.requires_grad,
        adapter_gradient=grad and (lora_a.requires_grad or lora_b.requires_grad),
        base=weight is not None,
    )
    if order is None:
        # Alone, gamma B A loses nothing to speak of in 16 bit; added to W, it may.
        may_merge = merges_in_16_bit or weight is None or dtype.itemsize > 2
        order = choose_order(shape, may_merge)
    keep = kept_entries(shape, order) > 0
    y, _ = _AdaptedLinear.apply(rows, weight, addend, lora_a, lora_b, gamma, order, keep)
    # No view, or hooks on y would be lost where y is then changed in place.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))  # type: ignore[no-any-return]


def choose_order(shape: LayerShape, may_merge: bool = True) -> Order:
    """Return the cheapest order on a type of device, for entries of so many bytes.

    It is the usual one where a compiler leaves T open: Dynamo would take seconds per layer to
    compare the costs, and cannot trace G there.
    """
    if not torch.compiler.is_compiling():
        return _choose(shape, may_merge)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # loads sympy

    if not has_static_value(shape.tokens):
        return USUAL_ORDER
    # Dynamo does not see through the cache, and needs none.
    return _choose.__wrapped__(shape, may_merge)


@lru_cache(maxsize=4096)
def _choose(shape: LayerShape, may_merge: bool) -> Order:
    return cheapest_order(shape, ORDERS if may_merge else SPLIT_ORDERS)


class _AdaptedLinear(Function):  # type: ignore[misc]
    """The table above. Returns y, and W' or x A^T, whichever was made, for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        addend: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        gamma: float,
        order: Order,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        # All factors are in autocast's dtype, where that is on: it changes nothing.
        a, b, weight = (_cast(matrix, x.dtype) for matrix in (lora_a, lora_b, weight))
        if order.merged_forward:
            merged = _multiply(b, a, gamma, weight)
            return _linear(x, merged, addend), merged
        down = x @ a.T
        return _add(_linear(x, weight, addend), down, b.T, gamma, weight is not None), down

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, lora_a, lora_b, ctx.gamma, ctx.order, keep = inputs
        kept = output[1]
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, lora_a, lora_b, kept if keep else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        needed = ctx.needs_input_grad
        x, weight, lora_a, lora_b, kept = ctx.saved_tensors
        with torch.no_grad(), _without_autocast(x):
            dx, da, db = _gradients(
                dy, x, weight, lora_a, lora_b, kept, ctx.gamma, ctx.order, needed
            )
        if torch.is_grad_enabled():
            dx, da, db = _NoSecondDerivative.apply(dx, da, db, dy, x, lora_a, lora_b)
        return dx, None, dy if needed[2] else None, da, db, None, None, None


# torch asks at each call, and would find it out anew: a quarter of the time that a call takes.
_AdaptedLinear.forward.__signature__ = signature(_AdaptedLinear.forward)  # type: ignore[attr-defined]


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    kept: Tensor | None,
    gamma: float,
    order: Order,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dA and dB, each None where it is not needed."""
    a, b, weight = (_cast(matrix, x.dtype) for matrix in (lora_a, lora_b, weight))
    dx = da = db = up = None
    if needed[0] and order.merged_input_gradient:
        is_kept = order.merged_forward and kept is not None
        merged: Any = kept if is_kept else _multiply(b, a, gamma, weight)
        dx = dy @ merged
    elif needed[0]:
        up = _multiply_thin(dy, b)
        dx = _multiply(up, a, gamma) if weight is None else _add(dy @ weight, up, a, gamma, True)
    if order.full_gradient and (needed[3] or needed[4]):
        full = _multiply_transposed(dy, x)
        da = _multiply_transposed(b, full, gamma) if needed[3] else None
        db = _multiply(full, a.T, gamma) if needed[4] else None
    else:
        if needed[3]:
            da = _multiply_transposed(_multiply_thin(dy, b) if up is None else up, x, gamma)
        if needed[4]:
            down = x @ a.T if order.merged_forward or kept is None else kept
            db = _multiply_transposed(down, dy, gamma).T
    return dx, _cast(da, lora_a.dtype), _cast(db, lora_b.dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products are in the dtype of x, at no cost where they are."""
    return torch.autocast(x.device.type, enabled=False) if _is_autocast(x) else nullcontext()


def _is_autocast(x: Tensor) -> bool:
    """Tell whether autocast is on for a device; `meta` has none, and torch raises if asked."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _cast(matrix: Any, dtype: torch.dtype) -> Any:
    return None if matrix is None else matrix.to(dtype)


def _linear(x: Tensor, weight: Tensor | None, addend: Tensor | None) -> Any:
    """Return `x W^T + addend`, bit for bit what `nn.Linear` returns where that is a bias."""
    if weight is None:
        return addend
    if addend is None or addend.ndim == 1:
        return F.linear(x, weight, addend)
    return torch.addmm(addend, x, weight.T)


def _multiply(left: Tensor, right: Tensor, factor: float, addend: Tensor | None = None) -> Tensor:
    """Return `factor left right + addend`."""
    if addend is None:
        # Zeros, and not what memory happens to hold: under vmap 0 times NaN is added.
        return torch.addmm(left.new_zeros(1), left, right, beta=0, alpha=factor)
    return torch.addmm(addend, left, right, alpha=factor)


def _add(addend: Any, left: Tensor, right: Tensor, factor: float, in_place: bool) -> Any:
    """Return `addend + factor left right`, where it may be in the place of the addend.

    That saves a copy of it. Under vmap, that of batched gradients too, the sum may need more room.
    """
    if in_place and not (torch.compiler.is_compiling() or _is_batched(addend)):
        return torch.addmm(addend, left, right, alpha=factor, out=addend)
    return _multiply(left, right, factor, addend)


def _is_batched(tensor: Tensor) -> bool:
    return _are_functorch_transforms_active() or is_legacy_batchedtensor(tensor)


def _multiply_transposed(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """Return `factor left^T right`, of matrices with T rows.

    On CPUs with AMX a 16-bit product takes up to twice as long where its left factor is a
    transposed view and its right one is wide: then a copy is cheaper.
    """
    left = left.T
    on_amx = HAS_AMX and left.device.type == "cpu" and left.dtype.itemsize == 2
    if on_amx and right.shape[1] > 1024:
        left = left.contiguous()
    return _multiply(left, right, factor)


def _multiply_thin(left: Tensor, right: Tensor) -> Tensor:
    """Return `left right`, where the right factor may have very few columns.

    On the CPU a float32 product with 2 to 15 columns takes up to five times as long where they are
    not contiguous.
    """
    if left.device.type == "cpu" and left.dtype == torch.float32 and right.shape[1] < 16:
        right = right.T.contiguous().T
    return left @ right


class _NoSecondDerivative(Function):  # type: ignore[misc]
    """Pass three gradients on; refuse to differentiate them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "rslightning's adapted layer has a first derivative only: a loss must not contain "
            "gradients that were taken through it (create_graph=True)."
        )
