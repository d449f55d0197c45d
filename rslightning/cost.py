"""What a model costs, counted from its `config.json` and its maps: standard library only."""

from collections.abc import Iterable, Mapping
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
    attention = _layer_width(text)
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


@dataclass(frozen=True)
class LinearMap:
    """A matrix that is multiplied with every token; an adapter is two of them, A and B.

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
    maps: Iterable[LinearMap], tokens: int, squared_lengths: int = 0, attention_width: int = 0
) -> int:
    r"""Count the floating-point operations of forward and backward pass on some tokens.

    An addition and a multiplication are two operations. With T tokens in examples of n_1, n_2, ...,
    maps [out, in] and L layers of H heads of width D that attend to their example,

        flops = \sum_{maps} 2 T in out (1 + [weight gradient] + [input gradient])
                + 12 L H D \sum_i n_i^2

    so a frozen map inside of the model takes 4 T in out, a trained one 6 T in out, and an adapter
    of rank r beside it 6 T r (in + out): `rslora/contraction.py` multiplies A x and B (A x), and
    never B A. The scores Q K^T and what they weigh, V, take 2 n^2 D each per head, and twice that
    backward. Both halves of causal attention count, as the PaLM paper does it (arXiv:2204.02311,
    appendix B): models are compared by that number.

    These are the model's operations, which a utilization (MFU) is made of: activation checkpointing
    and flash attention compute some of them twice, which is no progress. Not counted: embeddings,
    norms, rotations, activation functions, the softmax and the optimizer.

    Args:
        maps: What multiplies each token, the output head included.
        tokens: Number of tokens.
        squared_lengths: Sum over the examples of their squared lengths.
        attention_width: See `attention_width`.
    """
    per_token = sum(
        2 * each.in_features * each.out_features * (1 + each.weight_gradient + each.input_gradient)
        for each in maps
    )
    return per_token * tokens + 12 * attention_width * squared_lengths


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
