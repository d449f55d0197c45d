import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import LlamaConfig, LlamaForCausalLM

from rslightning.errors import UserError
from rslightning.rslora.adapters import (
    adapter_state_dict,
    collect_adapter,
    copy_adapter,
    load_adapter_state,
)
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import LoRALinear, adapter_layers, plain_path
from rslightning.rslora.merge import merge_adapters, unwrap_adapters
from rslightning.rslora.spec import AdapterSpec, ResolvedAdapter

ATTENTION = {"q_proj": (24, 24), "k_proj": (24, 12), "v_proj": (24, 12), "o_proj": (24, 24)}
MLP = {"gate_proj": (24, 40), "up_proj": (24, 40), "down_proj": (40, 24)}
LINEARS = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


def paths(attention=tuple(ATTENTION), mlp=tuple(MLP), layers=(0, 1)):
    """Return paths of `tiny_llama` in module order."""
    return [
        f"model.layers.{n}.{part}.{name}"
        for n in layers
        for part, names in (("self_attn", attention), ("mlp", mlp))
        for name in names
    ]


def refusal(model, spec):
    """Return the text of the error, after checking that the model was left alone."""
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(UserError) as error:
        inject_adapters(model, spec)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    return str(error.value)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all_linear", paths()),
        ("attention", paths(mlp=())),
        ("mlp", paths(attention=())),
        (["q_proj", "v_proj"], paths(attention=("q_proj", "v_proj"), mlp=())),
        (["down_proj", "self_attn.q_proj"], paths(attention=("q_proj",), mlp=("down_proj",))),
        (["model.layers.1.mlp.up_proj"], paths(attention=(), mlp=("up_proj",), layers=(1,))),
        (r".*\.1\..*", paths(layers=(1,))),
        (r"model\.layers\.\d+\.mlp\.(up|gate)_proj", paths((), ("gate_proj", "up_proj"))),
        (["lm_head"], ["lm_head"]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_targets(tiny_llama, targets, expected):
    report = inject_adapters(tiny_llama, AdapterSpec(rank=5, targets=targets))
    assert list(report.modules) == expected
    assert [path for path, _ in adapter_layers(tiny_llama)] == expected


def test_head_and_embeddings_are_left_alone(tiny_llama):
    head, embeddings = tiny_llama.lm_head, tiny_llama.model.embed_tokens
    inject_adapters(tiny_llama, AdapterSpec())
    assert tiny_llama.lm_head is head
    assert tiny_llama.model.embed_tokens is embeddings


def test_the_output_does_not_change(tiny_llama):
    ids = torch.arange(10).reshape(2, 5)
    before = tiny_llama(input_ids=ids).logits
    inject_adapters(tiny_llama, AdapterSpec(rank=5))
    assert torch.equal(tiny_llama(input_ids=ids).logits, before)


def test_everything_but_adapters_is_frozen(tiny_llama):
    inject_adapters(tiny_llama, AdapterSpec(rank=5))
    trainable = {name for name, p in tiny_llama.named_parameters() if p.requires_grad}
    assert trainable == {f"{path}.lora_{m}" for path in paths() for m in "ab"}
    tiny_llama(input_ids=torch.arange(10).reshape(2, 5)).logits.sum().backward()
    assert trainable == {n for n, p in tiny_llama.named_parameters() if p.grad is not None}


def test_the_training_mode_is_kept(tiny_llama):
    inject_adapters(tiny_llama.eval(), AdapterSpec(dropout=0.5))
    assert not any(module.training for module in tiny_llama.modules())


def test_counts_of_the_report(tiny_llama):
    frozen = sum(p.numel() for p in tiny_llama.parameters())
    spec = AdapterSpec(rank=5, targets=["q_proj", "down_proj"], rank_pattern={"layers.1.*": 3})
    report = inject_adapters(tiny_llama, spec)
    # q_proj is 24 -> 24 and down_proj 40 -> 24, at rank 5 in the first layer, 3 in the second.
    assert report.trainable_parameters == (5 + 3) * (24 + 24) + (5 + 3) * (40 + 24)
    trainable = sum(p.numel() for p in tiny_llama.parameters() if p.requires_grad)
    assert report.trainable_parameters == trainable
    assert report.total_parameters == frozen + trainable
    assert report.total_parameters == sum(p.numel() for p in tiny_llama.parameters())


def test_coverage_of_the_report(tiny_llama):
    report = inject_adapters(tiny_llama, AdapterSpec(rank=5, targets="mlp"))
    sizes = {name: i * o for name, (i, o) in (ATTENTION | MLP).items()}
    attention = sum(sizes[name] for name in ATTENTION)
    assert report.uncovered == [f"{path}.weight" for path in paths(mlp=())]
    assert report.uncovered_share == pytest.approx(attention / sum(sizes.values()))
    assert (report.unreachable, report.unreachable_share, report.warning) == ([], 0.0, None)


def test_a_model_that_is_all_head(tiny_llama):
    head = nn.Module()
    head.lm_head = tiny_llama.lm_head
    head.get_output_embeddings = lambda: head.lm_head
    report = inject_adapters(head, AdapterSpec(rank=5, targets=["lm_head"]))
    assert report.uncovered_share == 0.0
    assert report.trainable_parameters == 5 * (24 + 53)


def test_patterns_set_rank_alpha_and_gamma(tiny_llama):
    spec = AdapterSpec(
        rank=4,
        alpha=8.0,
        rank_pattern={"v_proj": 9},
        alpha_pattern={"model.layers.1.self_attn.v_proj": 3.0},
        targets=["q_proj", "v_proj"],
    )
    report = inject_adapters(tiny_llama, spec)
    expected = [(4, 8.0, 4.0), (9, 8.0, 8 / 3), (4, 8.0, 4.0), (9, 3.0, 1.0)]
    assert list(report.modules.values()) == [
        ResolvedAdapter(r, a, "rslora") for r, a, _ in expected
    ]
    layers = [layer for _, layer in adapter_layers(tiny_llama)]
    assert [layer.gamma for layer in layers] == pytest.approx([gamma for *_, gamma in expected])
    assert [layer.lora_a.shape[0] for layer in layers] == [4, 9, 4, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_dtype(tiny_llama, dtype):
    inject_adapters(tiny_llama.half(), AdapterSpec(), dtype)
    assert {p.dtype for p in tiny_llama.parameters() if p.requires_grad} == {dtype}
    assert {p.dtype for p in tiny_llama.parameters() if not p.requires_grad} == {torch.float16}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "q_porj"],
            "Target 'q_porj' matches no linear module; did you mean 'q_proj'? "
            f"Linear modules here: {LINEARS}.",
        ),
        (
            ["embed_tokens"],
            f"Target 'embed_tokens' matches no linear module. Linear modules here: {LINEARS}.",
        ),
        (
            "all_lineer",
            "targets 'all_lineer' matches no linear module; did you mean 'all_linear'? "
            f"Linear modules here: {LINEARS}.",
        ),
        (
            "q_proj",
            "targets 'q_proj' is an expression for full paths and matches none; to name modules, "
            "write a list: [q_proj].",
        ),
        (
            r"transformer\.h\..*",
            r"targets 'transformer\\.h\\..*' matches no linear module. "
            f"Linear modules here: {LINEARS}.",
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_targets_that_match_nothing(tiny_llama, targets, message):
    assert refusal(tiny_llama, AdapterSpec(targets=targets)) == message


def test_a_model_without_linear_modules():
    assert refusal(nn.Sequential(nn.LayerNorm(3)), AdapterSpec()) == (
        "targets 'all_linear' matches no linear module: there is no linear module to adapt."
    )


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing(tiny_llama, table):
    # up_proj is there, but not adapted.
    spec = AdapterSpec(targets="attention", **{table: {"q_proj": 2, "mlp.up_proj": 3}})
    assert refusal(tiny_llama, spec) == (
        "rank_pattern or alpha_pattern key 'mlp.up_proj' matches none of the adapted modules. "
        "Linear modules here: k_proj, o_proj, q_proj, v_proj."
    )


def test_patterns_that_disagree(tiny_llama):
    spec = AdapterSpec(rank_pattern={"q_proj": 2, ".*layers.1.*": 3})
    assert refusal(tiny_llama, spec) == (
        "rank_pattern is ambiguous for model.layers.1.self_attn.q_proj: 'q_proj': 2, "
        "'.*layers.1.*': 3; make the patterns disjoint."
    )


def test_a_tied_head_is_refused():
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    assert refusal(LlamaForCausalLM(config), AdapterSpec(targets=["lm_head"])) == (
        "lm_head shares its weight with model.embed_tokens.weight: merging an adapter would change "
        "both. Leave it out of targets, or untie the weights first."
    )


def test_a_module_that_is_used_twice_is_refused():
    model = nn.ModuleDict({"first": nn.Linear(5, 7), "second": nn.Linear(7, 5)})
    model["third"] = model["first"]
    assert refusal(model, AdapterSpec()).startswith("first shares its weight with third.weight:")


def test_a_second_injection_is_refused(tiny_llama):
    inject_adapters(tiny_llama, AdapterSpec())
    layers = [layer for _, layer in adapter_layers(tiny_llama)]
    assert refusal(tiny_llama, AdapterSpec()) == (
        "The model has adapters already; merge or remove them before injecting."
    )
    assert [layer for _, layer in adapter_layers(tiny_llama)] == layers
    inject_adapters(unwrap_adapters(tiny_llama), AdapterSpec())


class Torch(nn.Module):
    """Torch's own attention modules, which compute with their projections' bare weights."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.down = nn.Linear(8, 6)

    def forward(self, x):
        x = self.encoder(x)
        return self.down(self.attention(x, x, x)[0])


def test_weights_that_torch_reads_past_the_module_are_not_adapted():
    model = Torch()
    report = inject_adapters(model, AdapterSpec(rank=5))
    assert list(report.modules) == ["down"]
    assert report.unreachable == [
        "encoder.self_attn.in_proj_weight",
        "encoder.self_attn.out_proj.weight",
        "encoder.linear1.weight",
        "encoder.linear2.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    reach = 8 * 6
    bare = 2 * (3 * 8 * 8 + 8 * 8) + 2 * 8 * 12
    assert report.unreachable_share == pytest.approx(bare / (bare + reach))
    assert report.warning == (
        "94% of the weights outside embeddings and head are bare parameters, which adapters on "
        "linear modules cannot reach (encoder.self_attn.in_proj_weight, "
        "encoder.self_attn.out_proj.weight, ...): they stay frozen."
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "derive",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        partial(prune.l1_unstructured, name="weight", amount=0.25),
    ],
    ids=["weight_norm", "spectral_norm", "old_weight_norm", "pruned"],
)
def test_a_weight_that_is_computed_anew_is_not_adapted(derive):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    derive(model[0])
    report = inject_adapters(model, AdapterSpec(rank=2))
    assert list(report.modules) == ["1"]
    assert report.unreachable
    assert all(name.startswith("0.") for name in report.unreachable)
    message = r"^Target '0' matches no linear module"
    with pytest.raises(UserError, match=message):
        inject_adapters(unwrap_adapters(model), AdapterSpec(rank=2, targets=["0"]))


def compiled(part, model):
    """Wrap a part of a Llama as `torch.compile` does."""
    wrap = partial(torch.compile, backend="eager")
    if part == "model":
        return wrap(model)
    if part == "layers":
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = wrap(layer)
    if part == "linear":
        model.model.layers[0].mlp.up_proj = wrap(model.model.layers[0].mlp.up_proj)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
@pytest.mark.parametrize("part", ["model", "layers", "linear"])
def test_the_wrappers_of_torch_compile_show_in_no_path(make_llama, part):
    spec = AdapterSpec(
        rank=5, targets=r"model\.layers\..*\.(up|q)_proj", rank_pattern={"^model.layers.0.*": 3}
    )
    plain, model = make_llama(53), compiled(part, make_llama(53))
    truth, report = inject_adapters(plain, spec), inject_adapters(model, spec)
    assert replace(report, uncovered=[]) == replace(truth, uncovered=[])
    assert set(map(plain_path, report.uncovered)) == set(truth.uncovered)
    ours, theirs = dict(adapter_layers(model)), dict(adapter_layers(plain))
    assert ours.keys() == theirs.keys() == collect_adapter(model).layers.keys()
    for path, layer in theirs.items():
        assert torch.equal(ours[path].lora_a, layer.lora_a)  # the stream is the path's
        nn.init.normal_(layer.lora_b)
    copy_adapter(model, collect_adapter(plain))
    ids = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert merge_adapters(model) == list(theirs)
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_adapter_states_of_compiled_and_plain_models_are_the_same(make_llama):
    plain, model = make_llama(53), make_llama(53)
    for each in (plain, model):
        inject_adapters(each, AdapterSpec(rank=2))
    wrapped = compiled("model", compiled("layers", model))
    assert adapter_state_dict(wrapped).keys() == adapter_state_dict(plain).keys()
    old = {name: p + 1 for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("_orig_mod" in name for name in old)
    load_adapter_state(plain, old)
    assert torch.equal(next(iter(adapter_state_dict(plain).values())), next(iter(old.values())))


def test_evaluation_computes_what_training_computes():
    torch.manual_seed(0)
    model = Torch()
    inject_adapters(model, AdapterSpec(rank=5))
    for _, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 4, 8)
    trained = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)


class Decoder(nn.Module):
    """Blocks under a name that speaks of attention, with a part that is none in each."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict({"Attention": nn.ModuleDict({"to_q": nn.Linear(5, 7)})})
        block["mixer"] = nn.MultiheadAttention(6, 2)
        block["ff"] = nn.Linear(7, 5)
        self.attn_layers = nn.ModuleList([block, copy.deepcopy(block)])
        self.attn_out = nn.Linear(5, 3)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("all_linear", [f"attn_layers.{n}.{x}" for n in (0, 1) for x in ("Attention.to_q", "ff")]),
        ("attention", [f"attn_layers.{n}.Attention.to_q" for n in (0, 1)]),
        ("mlp", [f"attn_layers.{n}.ff" for n in (0, 1)]),
    ],
)
def test_groups_look_inside_the_blocks(group, expected):
    assert list(inject_adapters(Decoder(), AdapterSpec(rank=2, targets=group)).modules) == expected


def test_a_model_without_blocks_is_one_block():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(5, 7)}), "up": nn.Linear(5, 7)})
    report = inject_adapters(model, AdapterSpec(rank=2, targets="mlp"))
    assert list(report.modules) == ["up"]
    assert isinstance(model["up"], LoRALinear)


def test_a_name_that_ends_as_that_of_a_compiled_module_is_kept():
    model = nn.ModuleDict({"own_orig_mod": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    report = inject_adapters(model, AdapterSpec(rank=2, targets=["q_proj"]))
    assert list(report.modules) == ["own_orig_mod.q_proj"]
    assert isinstance(model["own_orig_mod"]["q_proj"], LoRALinear)
