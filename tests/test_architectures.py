"""Model families: which modules are adapted, and that a merge computes the same, in both ways."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder
from rslightning.rslora.adapters import collect_adapter
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.merge import merge_adapters, unwrap_adapters
from rslightning.rslora.merge_folder import merge_folder
from rslightning.rslora.spec import AdapterSpec

IDS = torch.tensor([[3, 7, 11, 5, 2], [19, 23, 8, 13, 42]])

GPT = {
    "vocab_size": 53,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 40,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}

MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(rotary_dim=4, **GPT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=10, **SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(head_dim=10, sliding_window=3, **SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=3, **EXPERTS, **SIZES)),
    # Its first block is dense, its second one a mixture.
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            num_experts=3,
            moe_intermediate_size=28,
            decoder_sparse_step=2,
            head_dim=10,
            **EXPERTS,
            **SIZES,
        )
    ),
}

QKVO = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
GPT2_BLOCK = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
GPTJ_ATTENTION = ["attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj"]
GPTJ_BLOCK = [*GPTJ_ATTENTION, "mlp.fc_in", "mlp.fc_out"]

ADAPTED = {
    "gpt2": [f"transformer.h.{n}.{name}" for n in (0, 1) for name in GPT2_BLOCK],
    "gptj": [f"transformer.h.{n}.{name}" for n in (0, 1) for name in GPTJ_BLOCK],
    "llama": [f"model.layers.{n}.{name}" for n in (0, 1) for name in QKVO + GATED],
    "qwen3": [f"model.layers.{n}.{name}" for n in (0, 1) for name in QKVO + GATED],
    "gemma3": [f"model.layers.{n}.{name}" for n in (0, 1) for name in QKVO + GATED],
    "mixtral": [f"model.layers.{n}.{name}" for n in (0, 1) for name in QKVO],
    "qwen3_moe": [f"model.layers.0.{name}" for name in QKVO + GATED]
    + [f"model.layers.1.{name}" for name in QKVO],
}

BARE = {
    "mixtral": [
        f"model.layers.{n}.mlp.{name}"
        for n in (0, 1)
        for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    ],
    "qwen3_moe": [
        f"model.layers.1.mlp.{name}"
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    ],
}
DENSE = sorted(MODELS.keys() - BARE.keys())


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_adapted_modules(name):
    model = make(name)
    plain = logits(model)
    report = inject_adapters(model, AdapterSpec(rank=3))
    assert list(report.modules) == ADAPTED[name]
    assert [path for path, _ in adapter_layers(model)] == ADAPTED[name]
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", MODELS)
def test_groups_share_out_the_modules(name):
    attention = [path for path in ADAPTED[name] if "attn" in path]
    mlp = [path for path in ADAPTED[name] if path not in attention]
    model = make(name)
    assert list(inject_adapters(model, AdapterSpec(targets="attention")).modules) == attention
    unwrap_adapters(model)
    if mlp:
        assert list(inject_adapters(model, AdapterSpec(targets="mlp")).modules) == mlp
    else:  # all of Mixtral's are experts
        with pytest.raises(UserError, match=r"^targets 'mlp' matches no linear module"):
            inject_adapters(model, AdapterSpec(targets="mlp"))


@pytest.mark.parametrize("name", MODELS)
def test_merging_changes_no_output(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "base", max_shard_size="12KB")
    plain = logits(model)
    inject_adapters(model, AdapterSpec(rank=3))
    generator = torch.Generator().manual_seed(7)
    for _, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_b, std=0.05, generator=generator)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.01

    output = tmp_path / "merged"
    output.mkdir()
    merge_folder(ModelFolder(tmp_path / "base"), collect_adapter(model), output)
    reloaded = AutoModelForCausalLM.from_pretrained(output).eval()
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-5, atol=1e-5)

    merge_adapters(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(reloaded), logits(unwrap_adapters(model)))


@pytest.mark.parametrize("name", DENSE)
def test_nothing_of_a_dense_model_is_uncovered(name):
    report = inject_adapters(make(name), AdapterSpec(rank=3))
    assert (report.uncovered, report.uncovered_share) == ([], 0.0)
    assert (report.unreachable, report.unreachable_share, report.warning) == ([], 0.0, None)


@pytest.mark.parametrize("name", BARE)
def test_what_is_unreachable_in_a_mixture(name):
    model = make(name)
    parameters = dict(model.named_parameters())
    bare = sum(parameters[path].numel() for path in BARE[name])
    blocks = sum(p.numel() for n, p in parameters.items() if "layers" in n and p.dim() > 1)
    report = inject_adapters(model, AdapterSpec(rank=3))
    assert report.unreachable == report.uncovered == BARE[name]
    assert report.unreachable_share == report.uncovered_share == pytest.approx(bare / blocks)
    assert 0.3 < bare / blocks < 0.9
    assert report.warning == (
        f"{bare / blocks:.0%} of the weights outside embeddings and head are bare parameters, "
        f"which adapters on linear modules cannot reach ({BARE[name][0]}, {BARE[name][1]}, ...): "
        "they stay frozen."
    )


MAMBA = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5}
MIXERS = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**MAMBA)),
    "falcon_mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**MAMBA)),
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=5,
            mamba_dt_rank=3,
            use_cache=False,
        )
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_every_adapted_module_of_a_state_space_model_is_called(name):
    torch.manual_seed(0)
    model, called = MIXERS[name](), set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    model(input_ids=IDS)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = inject_adapters(model, AdapterSpec(rank=3))
    assert set(report.modules) == (linears & called) - {"lm_head"}
    left = {f"{path}.weight" for path in linears - called}
    assert left
    assert left < set(report.unreachable)  # A and the convolution are bare parameters
    assert all(name.endswith(".dt_proj.weight") for name in left)
    unwrap_adapters(model)
    with pytest.raises(UserError, match=r"^Target 'dt_proj' matches no linear module"):
        inject_adapters(model, AdapterSpec(targets=["dt_proj"]))


@pytest.mark.parametrize("name", MODELS)
def test_counts(name):
    model = make(name)
    base = sum(p.numel() for p in model.parameters())
    report = inject_adapters(model, AdapterSpec(rank=3))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable_parameters == trainable
    assert report.total_parameters == base + trainable
