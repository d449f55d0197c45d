"""The last linear map of a causal language model, and the loss taken inside of its call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rslightning.batch import IGNORED
from rslightning.losses import linear_nats


@contextmanager
def nats_for_logits(model: PreTrainedModel, labels: Tensor) -> Iterator[None]:
    """Let a model return the summed nats of `labels`, as [1, 1, 1], in place of its logits.

    The head takes them when it is called, by the model and with its hooks as ever: that is where
    sharded strategies gather its weight. Needs a model for which `logits_are_of_head`.

    Shape:
        labels [B, T], for hidden states [B, T, H] at the head.
    """
    head = model.get_output_embeddings()
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()

    def forward(hidden: Tensor) -> Tensor:
        nats = linear_nats(hidden.flatten(0, 1), head.weight, head.bias, following)
        return nats.view(1, 1, 1).clone()  # shaped as logits; FSDP2 warns of views

    with _replaced_forward(head, forward):
        yield


@torch.no_grad()
def logits_are_of_head(model: PreTrainedModel) -> bool:
    """Tell whether a model's logits are what its head, a plain `nn.Linear`, returns, unchanged.

    A trial answers it: the decoder is skipped, the head returns made-up logits, and the model must
    return the same. No weight of them is read: it takes no time, and weights may be sharded. False
    are capped and scaled logits (Gemma 2, Cohere, Granite), heads that are quantized or adapted,
    and models that the trial fails on.
    """
    head = model.get_output_embeddings()
    if not _is_plain_linear(head):
        return False
    hidden = torch.zeros(1, 2, head.in_features, dtype=head.weight.dtype)
    # Of both signs, larger than any cap, and no two alike.
    made_up = torch.linspace(-1e4, 1e4, 2 * head.out_features).view(1, 2, -1)
    shapes: list[torch.Size] = []

    def answer(head_input: Tensor) -> Tensor:
        shapes.append(head_input.shape)
        return made_up.clone()

    skipped = _replaced_forward(model.base_model, lambda *_, **__: _Skipped(hidden))
    try:
        with skipped, _replaced_forward(head, answer):
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
        return shapes == [hidden.shape] and torch.equal(logits, made_up)
    except Exception:  # whatever foreign code raises where its decoder is missing
        return False


def _is_plain_linear(head: Any) -> bool:
    return (
        getattr(type(head), "forward", None) is nn.Linear.forward
        and "forward" not in vars(head)
        and type(head.weight) is nn.Parameter  # quantized ones are of other types
    )


@dataclass
class _Skipped(BaseModelOutput):
    """What a decoder returns, with None for whatever else an architecture reads of it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):  # Python's own questions, as those of copy
            raise AttributeError(name)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]  # that of the class is back
