"""Cross-entropy of a causal language model in nats, as a sum and a count.

With h the head's input, W and b its weight and bias, and y the token that follows a position,

    logits = W h + b,    nats = log sum_v exp(logits[v]) - logits[y],
    d nats / d logits = softmax(logits) - onehot(y) = s,
    d nats / d h = W^T s,    d nats / d W = s h^T,    d nats / d b = s.

The logits are the largest tensor of a training step (16,384 tokens of a vocabulary of 128,000 are
8 GB in float32), so `linear_nats` makes them for a chunk of target positions at a time, and takes
the gradients while a chunk is there: nothing of size [B T, V] exists, nor is it computed twice. A
CPU takes the softmax of a part of the chunk at a time, which its caches hold, and s takes the place
of the logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rslightning.batch import IGNORED
from rslightning.cost import loss_rows


def token_nats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed nats of the target tokens and their number.

    The sum and the count are what adds up over batches and processes; a mean does not. Only the
    logits of target positions are turned to float32.

    Shape:
        logits [B, T, V], labels [B, T] -> nats [] float32, targets [] int64.
    """
    targets = labels[:, 1:]
    is_target = targets != IGNORED
    scores = logits[:, :-1][is_target].float()
    return F.cross_entropy(scores, targets[is_target], reduction="sum"), is_target.sum()


def linear_nats(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of `F.linear(hidden, weight, bias)` in nats.

    The product runs in the dtype that `F.linear` would take (autocast's, where there is one), the
    softmax and the sum in float32 at least. Gradients are taken along with the value, and the
    backward pass only multiplies them by its scalar, which needs no weight. A weight that is
    trained costs one more [V, H] in float32, in which its gradient is summed.

    Shape:
        hidden [N, H], weight [V, H], bias [V], targets [N] int64 -> [].

    Args:
        hidden: Input of the head.
        weight: Weight of the head.
        bias: Bias of the head, if it has one.
        targets: Token to predict at each position; `IGNORED` positions are left out.

    Raises:
        RuntimeError: If it is differentiated twice.
    """
    device = hidden.device.type
    # Autocast leaves float64 alone.
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, weight, bias)
    ]
    at_once = loss_rows(len(weight), device == "cpu", wanted[1])
    nats: Tensor = _nats_and_gradients(hidden, weight, bias, targets, dtype, at_once, wanted)[0]
    return nats


# A custom operator, because torch.compile takes it as a whole: how many rows there are is not known
# before the targets are.
@torch.library.custom_op("rslightning::linear_nats", mutates_args=())
def _nats_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    at_once: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the nats and their gradients by hidden, weight and bias, empty where not wanted."""
    results = _empty_results(hidden, weight, bias, targets, dtype, at_once, wanted)
    nats, by_hidden, by_weight, by_bias = (tensor.zero_() for tensor in results)
    matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
    positions = (targets != IGNORED).nonzero().squeeze(1)
    chunk_rows, part_rows = at_once
    room = hidden.new_empty(min(chunk_rows, len(positions)), len(weight), dtype=dtype)
    for chunk in positions.split(chunk_rows):
        rows, words = hidden[chunk].to(dtype), targets[chunk]
        logits = _linear(rows, matrix, offset, room[: len(chunk)])
        for part, some in zip(logits.split(part_rows), words.split(part_rows), strict=True):
            shares, of_words = _shares(part, some, nats.dtype)
            nats -= of_words.sum()
            if any(wanted):
                slopes = _slopes_(shares, some, of_words)
                part.copy_(slopes)
                if wanted[2]:
                    by_bias += slopes.sum(0)
                del slopes
            del shares  # before the next part's are made
        if wanted[1]:
            by_weight += logits.T @ rows
        if wanted[0]:
            by_hidden[chunk] = (logits @ matrix).to(hidden.dtype)
    return nats, by_hidden, by_weight, by_bias


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Return `F.linear(rows, weight, bias)`, written into `out`."""
    if bias is None:
        return torch.mm(rows, weight.T, out=out)
    return torch.addmm(bias, rows, weight.T, out=out)


def _shares(logits: Tensor, words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the softmax of logits [N, V], and its logarithm at a word of each row."""
    largest, of_words = logits.amax(-1), logits.gather(1, words.unsqueeze(1)).squeeze(1)
    shares = F.softmax(logits, -1, dtype=dtype)
    # Exponentials are taken once: a target's share may vanish, the largest one cannot.
    return shares, of_words.to(dtype) - largest + shares.amax(-1).log()


def _slopes_(shares: Tensor, words: Tensor, of_words: Tensor) -> Tensor:
    """Turn the softmax into the softmax less one at the targets, whose logarithm is `of_words`."""
    # Assigned, not added: that is deterministic on every device, and exact where a share is near 1.
    shares[torch.arange(len(words), device=words.device), words] = of_words.expm1()
    return shares


@_nats_and_gradients.register_fake
def _empty_results(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    at_once: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0, dtype=wide),
        weight.new_empty(len(weight) if wanted[2] else 0, dtype=wide),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else zeros for the gradients, which are outputs, too
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [
        tensor.dtype if wanted else None
        for tensor, wanted in zip(inputs[:3], inputs[-1], strict=True)
    ]


def _scale_gradients(ctx: Any, by_nats: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # that is, under create_graph
        raise RuntimeError("linear_nats cannot be differentiated twice: leave out create_graph.")
    gradients = [
        None if dtype is None or by_nats is None else (gradient * by_nats).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return (*gradients, None, None, None, None)


_nats_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)
