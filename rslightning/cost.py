"""What a step of a model computes, counted from its maps: standard library only.

Sizes from `config.json` are `model_shape`'s, and bytes are `memory`'s, business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, NamedTuple

GIB: Final = 2**30

CHUNK_BYTES: Final = 2**28
"""Bytes of the logits, as if in float32, that a loss makes at a time: 2,048 rows of 32,768 words.

Chunks of fewer than about 256 positions take longer, most of all where the head is trained.
"""

CPU_CHUNK_ROWS: Final = 512
"""Positions of such a chunk on a CPU at most: reading the head once more is cheap for so many."""

CPU_PART_BYTES: Final = 2**22
"""Bytes of the float32 softmax that a CPU takes of a chunk at a time: what its caches hold."""


def loss_rows(vocabulary: int, on_cpu: bool, trains_head: bool) -> tuple[int, int]:
    """Return for how many positions a loss makes logits at a time, and for how many the softmax."""
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    if not on_cpu:
        return rows, rows
    if not trains_head:
        rows = min(rows, CPU_CHUNK_ROWS)
    return rows, min(rows, max(1, CPU_PART_BYTES // (4 * vocabulary)))


@dataclass(frozen=True)
class LinearMap:
    """A matrix that is multiplied with every token.

    Attributes:
        in_features: Length of its input.
        out_features: Length of its output.
        weight_gradient: Whether it is trained.
        input_gradient: Whether something before it is trained.
    """

    in_features: int
    out_features: int
    weight_gradient: bool
    input_gradient: bool


def training_flops(
    maps: Iterable["LinearMap | LayerShape"],
    tokens: int,
    squared_lengths: int = 0,
    attention_width: int = 0,
    calls: int = 1,
) -> int:
    r"""Count the floating-point operations of forward and backward pass on some tokens.

    An addition and a multiplication are two operations. With T tokens in examples of n_1, n_2, ...,
    maps [out, in] and L layers of H heads of width D that attend to their example,

        flops = \sum_{maps} 2 T in out (1 + [weight gradient] + [input gradient])
                + \sum_{adapted layers} layer_cost in the order that needs fewest
                + 12 L H D \sum_i n_i^2

    so a frozen map inside of the model takes 4 T in out, a trained one 6 T in out, and the usual
    order of an adapter of rank r beside it 6 T r (in + out). What a cheaper order saves is no work
    that was done, and a utilization (MFU) does not count it. The scores Q K^T and what they weigh,
    V, take 2 n^2 D each per head, and twice that backward. Both halves of causal attention count,
    as the PaLM paper does it (arXiv:2204.02311, appendix B): models are compared by that number.

    Activation checkpointing and flash attention compute some of this twice, which is no progress
    and not counted. Nor are embeddings, norms, rotations, activation functions, the softmax and the
    optimizer.

    Args:
        maps: What multiplies each token, the output head included; an adapted layer as a whole, its
            tokens left at 0.
        tokens: Number of tokens.
        squared_lengths: Sum over the examples of their squared lengths.
        attention_width: See `attention_width`.
        calls: Number of micro-batches that the tokens are in; the cheapest order depends on it.
    """
    flops = 12.0 * attention_width * squared_lengths
    for each in maps:
        if isinstance(each, LayerShape):
            shape = each._replace(tokens=tokens // max(calls, 1))
            flops += calls * layer_cost(shape, cheapest_order(shape))
        else:
            passes = 1 + each.weight_gradient + each.input_gradient
            flops += 2 * tokens * each.in_features * each.out_features * passes
    return round(flops)


def attention_width(config: Mapping[str, Any]) -> int:
    """Return layers times heads times the width of a head, from `config.json`."""
    text = config.get("text_config", config)
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
    return layers * _layer_width(text)


def _layer_width(text: Mapping[str, Any]) -> int:
    """Return heads times the width of a head."""
    heads = _first(text, "num_attention_heads", "n_head", default=1)
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    return heads * _first(text, "head_dim", default=hidden // heads)


def _first(config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    """Return the first of `names` that the configuration sets: models spell them differently."""
    return next((int(config[name]) for name in names if config.get(name) is not None), default)


# The orders in which an adapted layer can be computed: `rslora/contraction.py` computes them.


class LayerShape(NamedTuple):
    """Sizes of an adapted linear layer in one call, and what is to be computed of it.

    Attributes:
        in_features: n, length of an input.
        out_features: m, length of an output.
        rank: r.
        tokens: T, number of inputs.
        input_gradient: Whether the gradient of the input is needed.
        adapter_gradient: Whether those of A and B are needed.
        base: Whether W x is computed along, rather than what the adapter adds alone.
    """

    in_features: int
    out_features: int
    rank: int
    tokens: int
    input_gradient: bool = True
    adapter_gradient: bool = True
    base: bool = True


class Order(NamedTuple):
    """One way to compute `y = W x + gamma B A x` and its gradients; all give the same numbers.

    Attributes:
        merged_forward: Through `W' = W + gamma B A`, else through A x and then B.
        merged_input_gradient: Through W', else through B^T dy and then A.
        full_gradient: dA and dB through `G = dy^T x`, else through B^T dy and A x.
    """

    merged_forward: bool = False
    merged_input_gradient: bool = False
    full_gradient: bool = False


USUAL_ORDER: Final = Order()

ORDERS: Final = tuple(Order(*choices) for choices in product((False, True), repeat=3))


def cheapest_order(shape: LayerShape, orders: Iterable[Order] = ORDERS) -> Order:
    """Return the order of fewest operations; of equals, the one that comes first.

    Counting what is moved along with them chose no better on the CPU: `benchmarks/layer.py`.

    Args:
        shape: Sizes of the layer.
        orders: What there is to choose from.
    """
    return min(orders, key=lambda order: layer_cost(shape, order))


def keeps_merged(shape: LayerShape, order: Order) -> bool:
    """Tell whether W' waits for the backward pass, rather than being made anew there.

    It does where it has no more entries than the A x that the usual order keeps: so no order keeps
    more from forward to backward than the usual one does.
    """
    used_twice = order.merged_forward and order.merged_input_gradient and shape.input_gradient
    usual_keeps = shape.tokens * shape.rank if shape.adapter_gradient else 0
    return used_twice and shape.in_features * shape.out_features <= usual_keeps


def kept_entries(shape: LayerShape, order: Order) -> int:
    """Count the entries that wait for the backward pass, beside the input: W', or A x."""
    if keeps_merged(shape, order):
        return shape.in_features * shape.out_features
    keeps_down = shape.adapter_gradient and not (order.merged_forward or order.full_gradient)
    return shape.tokens * shape.rank if keeps_down else 0


def layer_cost(shape: LayerShape, order: Order) -> int:
    """Count the operations of forward and backward pass of an adapted layer.

    The product of matrices [a, b] and [b, c] takes `2 a b c`.

    Args:
        shape: Sizes of the layer.
        order: How it is computed.
    """
    n, m, r, t = shape[:4]
    dense, merge = 2 * t * n * m, 2 * m * r * n
    down, up = 2 * t * n * r, 2 * t * m * r  # A x or dA, and B^T dy or dB
    has_down = has_up = False
    cost = 0
    if shape.base or order.merged_forward:
        cost += dense
    if order.merged_forward:
        cost += merge
    else:
        cost += down + up
        has_down = True
    if shape.input_gradient:
        if shape.base or order.merged_input_gradient:
            cost += dense
        if order.merged_input_gradient:
            cost += 0 if keeps_merged(shape, order) else merge
        else:
            cost += up + down
            has_up = True
    if not shape.adapter_gradient:
        return cost
    if order.full_gradient:
        return cost + dense + 2 * merge
    return cost + down + up + (0 if has_down else down) + (0 if has_up else up)
