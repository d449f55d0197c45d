"""What a decoder consists of, read from its `config.json` alone: standard library only.

Families that are alike share a row of `GATED`; a family that is in no table is refused, since a
guess at its sizes would be a wrong plan.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from rslightning.errors import UserError

Config = Mapping[str, Any]
Group = Literal["attention", "mlp", "head"]


class LinearShape(NamedTuple):
    """A linear map that is a module of its own, which an adapter can therefore wrap.

    Attributes:
        path: Its name in the model.
        in_features: Length of its input.
        out_features: Length of its output.
        group: Which part of the model it belongs to.
        reads: What its input is: maps of a layer that read the same share it.
        bias: Whether it adds a bias.
    """

    path: str
    in_features: int
    out_features: int
    group: Group
    reads: str
    bias: bool = False

    @property
    def entries(self) -> int:
        """Entries of the matrix."""
        return self.in_features * self.out_features

    @property
    def parameters(self) -> int:
        """Entries of the matrix and of the bias."""
        return self.entries + self.bias * self.out_features


class Block(NamedTuple):
    """One of the decoder's repeated layers.

    Attributes:
        maps: Its linear modules, in module order.
        bare: Entries of its parameters that are no linear module: norms, routers, experts.
        inner: Width inside of the MLP, times the experts that see a token in a mixture.
        experts_per_token: How many experts see a token; 0 in a dense MLP.
    """

    maps: tuple[LinearShape, ...]
    bare: int
    inner: int
    experts_per_token: int = 0

    @property
    def parameters(self) -> int:
        """Entries of all its parameters."""
        return sum(each.parameters for each in self.maps) + self.bare


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model.

    Attributes:
        model_type: Its family, as `config.json` names it.
        hidden: Width between the layers.
        attention: Heads times the width of a head.
        vocabulary: Number of words.
        blocks: Its layers.
        embedding: Entries of the embeddings of words and positions.
        final_norm: Entries of the norm before the head.
        head: The output head.
        tied: Whether the head's matrix is the embedding's.
        norms: Norms of the hidden width in a layer.
        gated: Whether the MLP multiplies two maps of its input, activation(gate) and up.
        heads: Heads of the attention.
        key_width: Groups of heads that share keys times the width of a head.
        head_norms: Whether queries and keys are normed, too.
        kept_scores: Matrices of scores [T, T] that a head keeps for its backward pass, where
            transformers has no attention for the family that does without; else 0.
        whole_logits: Whether logits are more than the product of the head (capped).
    """

    model_type: str
    hidden: int
    attention: int
    vocabulary: int
    blocks: tuple[Block, ...]
    embedding: int
    final_norm: int
    head: LinearShape
    tied: bool
    norms: int
    gated: bool
    heads: int
    key_width: int
    head_norms: bool
    kept_scores: int
    whole_logits: bool = False

    @property
    def maps(self) -> tuple[LinearShape, ...]:
        """All linear modules, in module order: those of the layers, then the head."""
        return (*(each for block in self.blocks for each in block.maps), self.head)

    @property
    def parameters(self) -> int:
        """Entries of all parameters, a shared matrix once."""
        head = self.head.parameters - self.tied * self.head.entries
        blocks = sum(block.parameters for block in self.blocks)
        return self.embedding + blocks + self.final_norm + head


class Family(NamedTuple):
    """How the gated decoders with separate queries, keys and values differ.

    Attributes:
        head_width: Width of a head where the configuration does not say; 0: hidden / heads.
        norms: Norms of the hidden width in a layer.
        head_norms: Whether queries and keys are normed.
        query_bias: Whether queries, keys and values have a bias, whatever the configuration says.
        tied: Whether the head shares the embedding's matrix where the configuration does not say.
        mixture: Whether layers are mixtures of experts.
        expert_width: Key of an expert's inner width.
        kept_scores: See `ModelShape`.
        capped: Whether logits are capped where the configuration does not say.
    """

    head_width: int = 0
    norms: int = 2
    head_norms: bool = False
    query_bias: bool = False
    tied: bool = False
    mixture: bool = False
    expert_width: str = "intermediate_size"
    kept_scores: int = 0
    capped: bool = False


GATED: Final[dict[str, Family]] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(query_bias=True),
    "qwen3": Family(head_width=128, head_norms=True),
    "gemma": Family(head_width=256, tied=True),
    "gemma2": Family(head_width=256, norms=4, tied=True, kept_scores=2, capped=True),
    "gemma3_text": Family(head_width=256, norms=4, head_norms=True, tied=True),
    "mixtral": Family(mixture=True),
    "qwen3_moe": Family(head_norms=True, mixture=True, expert_width="moe_intermediate_size"),
}

GPTJ_ATTENTION: Final = {"k_proj": "norm", "v_proj": "norm", "q_proj": "norm", "out_proj": "heads"}


def read_shape(config: Config) -> ModelShape:
    """Return the sizes of the model that a configuration describes.

    Args:
        config: Content of `config.json`.

    Raises:
        UserError: If the family is not known, or the configuration lacks a size.
    """
    readers = {**dict.fromkeys(GATED, _read_gated), "gpt2": _read_gpt2, "gptj": _read_gptj}
    model_type = str(config.get("model_type"))
    if model_type not in readers:
        raise UserError(
            f"The sizes of models of type {model_type!r} are not known here; known are "
            f"{', '.join(readers)}."
        )
    try:
        return readers[model_type](config)
    except KeyError as error:
        raise UserError(f"The model's config.json has no {error.args[0]!r}.") from None


def _read_gated(config: Config) -> ModelShape:
    family = GATED[config["model_type"]]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or family.head_width or hidden // heads
    tied = config.get("tie_word_embeddings")
    return ModelShape(
        model_type=config["model_type"],
        hidden=hidden,
        attention=heads * width,
        vocabulary=config["vocab_size"],
        blocks=tuple(
            _gated_block(config, family, index, width)
            for index in range(config["num_hidden_layers"])
        ),
        embedding=config["vocab_size"] * hidden,
        final_norm=hidden,
        head=LinearShape("lm_head", hidden, config["vocab_size"], "head", "final_norm"),
        tied=family.tied if tied is None else tied,
        norms=family.norms,
        gated=True,
        heads=heads,
        key_width=(config.get("num_key_value_heads") or heads) * width,
        head_norms=family.head_norms,
        kept_scores=family.kept_scores,
        whole_logits=bool(config.get("final_logit_softcapping", family.capped)),
    )


def _gated_block(config: Config, family: Family, index: int, width: int) -> Block:
    hidden = config["hidden_size"]
    prefix = f"model.layers.{index}"
    bare = family.norms * hidden + 2 * width * family.head_norms
    attention = _separate_attention(config, family, f"{prefix}.self_attn", width)
    if family.mixture and _is_mixture(config, index):
        experts = config.get("num_experts") or config["num_local_experts"]  # by transformers' age
        inner = config[family.expert_width]
        bare += experts * hidden * (1 + 3 * inner)  # the router is a bare parameter, too
        chosen = config["num_experts_per_tok"]
        return Block((*attention,), bare, chosen * inner, chosen)
    inner, bias = config["intermediate_size"], bool(config.get("mlp_bias"))
    mlp = (
        LinearShape(f"{prefix}.mlp.gate_proj", hidden, inner, "mlp", "mlp_norm", bias),
        LinearShape(f"{prefix}.mlp.up_proj", hidden, inner, "mlp", "mlp_norm", bias),
        LinearShape(f"{prefix}.mlp.down_proj", inner, hidden, "mlp", "mlp_inner", bias),
    )
    return Block((*attention, *mlp), bare, inner)


def _separate_attention(
    config: Config, family: Family, prefix: str, width: int
) -> Iterator[LinearShape]:
    """Yield queries, keys, values and the output; groups of queries share keys and values."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    bias = bool(config.get("attention_bias"))
    groups = config.get("num_key_value_heads") or heads
    for name, count in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
        size, with_bias = count * width, bias or family.query_bias
        yield LinearShape(f"{prefix}.{name}", hidden, size, "attention", "norm", with_bias)
    yield LinearShape(f"{prefix}.o_proj", heads * width, hidden, "attention", "heads", bias)


def _is_mixture(config: Config, index: int) -> bool:
    """Tell whether a layer of a mixture is one; Qwen's can be dense in between."""
    dense = index in (config.get("mlp_only_layers") or ())
    return not dense and (index + 1) % (config.get("decoder_sparse_step") or 1) == 0


def _read_gpt2(config: Config) -> ModelShape:
    hidden, vocabulary = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * hidden
    tied = config.get("tie_word_embeddings")

    def block(index: int) -> Block:
        prefix = f"transformer.h.{index}"
        maps = (
            LinearShape(f"{prefix}.attn.c_attn", hidden, 3 * hidden, "attention", "norm", True),
            LinearShape(f"{prefix}.attn.c_proj", hidden, hidden, "attention", "heads", True),
            LinearShape(f"{prefix}.mlp.c_fc", hidden, inner, "mlp", "mlp_norm", True),
            LinearShape(f"{prefix}.mlp.c_proj", inner, hidden, "mlp", "mlp_inner", True),
        )
        return Block(maps, 4 * hidden, inner)

    return ModelShape(
        model_type="gpt2",
        hidden=hidden,
        attention=hidden,
        vocabulary=vocabulary,
        blocks=tuple(block(index) for index in range(config["n_layer"])),
        embedding=(vocabulary + config["n_positions"]) * hidden,
        final_norm=2 * hidden,
        head=LinearShape("lm_head", hidden, vocabulary, "head", "final_norm"),
        tied=True if tied is None else tied,
        norms=2,
        gated=False,
        heads=config["n_head"],
        key_width=hidden,
        head_norms=False,
        kept_scores=0,
    )


def _read_gptj(config: Config) -> ModelShape:
    hidden, vocabulary = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * hidden

    def block(index: int) -> Block:
        prefix = f"transformer.h.{index}"
        attention = (
            LinearShape(f"{prefix}.attn.{name}", hidden, hidden, "attention", reads)
            for name, reads in GPTJ_ATTENTION.items()
        )
        mlp = (
            LinearShape(f"{prefix}.mlp.fc_in", hidden, inner, "mlp", "norm", True),
            LinearShape(f"{prefix}.mlp.fc_out", inner, hidden, "mlp", "mlp_inner", True),
        )
        return Block((*attention, *mlp), 2 * hidden, inner)

    return ModelShape(
        model_type="gptj",
        hidden=hidden,
        attention=hidden,
        vocabulary=vocabulary,
        blocks=tuple(block(index) for index in range(config["n_layer"])),
        embedding=vocabulary * hidden,
        final_norm=2 * hidden,
        head=LinearShape("lm_head", hidden, vocabulary, "head", "final_norm", True),
        tied=bool(config.get("tie_word_embeddings")),
        norms=1,
        gated=False,
        heads=config["n_head"],
        key_width=hidden,
        head_norms=False,
        kept_scores=1,
    )
