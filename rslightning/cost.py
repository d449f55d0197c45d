"""What a model costs, counted from its `config.json`: standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training process, by part; an estimate, not a promise.

    Attributes:
        base: Frozen weights.
        trainable: Trainable weights with their gradients and AdamW's two moments.
        activations: What the backward pass keeps of the decoder layers.
        logits: Logits, their float32 copy and their gradient.
    """

    base: int
    trainable: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.base + self.trainable + self.activations + self.logits

    def __str__(self) -> str:
        parts = {
            "base": self.base,
            "trainable with gradients and AdamW": self.trainable,
            "activations": self.activations,
            "logits": self.logits,
        }
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
        return f"{self.total / GIB:.2f} GiB ({listed})"


def estimate_memory(
    config: Mapping[str, Any],
    frozen_parameters: int,
    trainable_parameters: int,
    tokens: int,
    adapter_ranks: int = 0,
    frozen_bytes: int = 2,
    activation_bytes: int = 2,
    activation_checkpointing: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of a training step.

    Per token and layer of a gated decoder whose weights are frozen, the backward pass keeps the
    inputs of the two norms in float32 and their outputs (4 vectors of the hidden width); queries,
    keys, values (repeated for grouped queries) and the attention's output (4 of the attention's
    width); 4 of the MLP's inner width; and A x of each adapter. The bytes that autograd saves agree
    within a tenth (`tests/test_cost.py`). With activation checkpointing one hidden vector per layer
    stays, and one layer at a time is whole. Not counted: the copies of its input that an adapter
    with dropout keeps, and the scores [T, T] of eager attention.

    Args:
        config: Content of `config.json`.
        frozen_parameters: Entries without gradient.
        trainable_parameters: Entries with gradient, in float32.
        tokens: Tokens of one micro-batch, padding included.
        adapter_ranks: Sum of the ranks of all adapted modules.
        frozen_bytes: Bytes per frozen entry.
        activation_bytes: Bytes per entry of an activation.
        activation_checkpointing: Whether layers are recomputed in the backward pass.
    """
    text = config.get("text_config", config)
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers")
    inner = _first(text, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    heads = _first(text, "num_attention_heads", "n_head", default=1)
    attention = heads * _first(text, "head_dim", default=hidden // heads)
    norms = 2 * hidden * (4 + activation_bytes)
    kept = norms + activation_bytes * (4 * attention + 4 * inner)
    activations = tokens * (layers * kept + activation_bytes * adapter_ranks)
    if activation_checkpointing:
        activations = tokens * layers * activation_bytes * hidden + activations // max(layers, 1)
    vocabulary = _first(text, "vocab_size")
    return MemoryEstimate(
        base=frozen_parameters * frozen_bytes,
        trainable=trainable_parameters * 4 * 4,
        activations=activations,
        logits=tokens * vocabulary * (activation_bytes + 4 + 4),
    )


def _first(config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    """Return the first of `names` that the configuration sets: models spell them differently."""
    return next((int(config[name]) for name in names if config.get(name) is not None), default)
