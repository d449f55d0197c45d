"""Sizes read from `config.json` alone, against transformers' models and what injection reports."""

import json

import pytest
import torch
from test_architectures import GPT, MODELS, SIZES
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from rslightning.errors import UserError
from rslightning.model_shape import read_shape
from rslightning.rslora import AdapterSpec, inject_adapters
from rslightning.rslora.inject import linear_modules
from rslightning.rslora.linear import linear_features

# Beside those of `test_architectures`: other families, and what a configuration can change.
CONFIGS = {
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gemma": GemmaConfig(head_dim=10, **SIZES),
    "gemma2": Gemma2Config(head_dim=10, **SIZES),
    "biases": LlamaConfig(attention_bias=True, mlp_bias=True, **SIZES),
    "tied": LlamaConfig(tie_word_embeddings=True, **SIZES),
    "untied GPT-2": GPT2Config(tie_word_embeddings=False, **GPT),
    "dense layer of a mixture": Qwen3MoeConfig(
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=28, mlp_only_layers=[1], **SIZES
    ),
}


def make(name):
    with torch.device("meta"):
        return (
            AutoModelForCausalLM.from_config(CONFIGS[name]) if name in CONFIGS else MODELS[name]()
        )


def saved_config(model, folder):
    model.config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*MODELS, *CONFIGS])
def test_sizes_are_those_of_the_model(name, tmp_path):
    model = make(name)
    shape = read_shape(saved_config(model, tmp_path))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.parameters == read_shape(model.config.to_dict()).parameters
    found = {
        path: (*linear_features(module), module.bias is not None)
        for path, module in linear_modules(model).items()
    }
    assert [each.path for each in shape.maps] == list(found)
    assert {m.path: (m.in_features, m.out_features, m.bias) for m in shape.maps} == found


@pytest.mark.parametrize("name", [*MODELS, *CONFIGS])
def test_groups_are_those_that_adapters_reach(name, tmp_path):
    model = make(name)
    shape = read_shape(saved_config(model, tmp_path))
    report = inject_adapters(model, AdapterSpec(rank=3, targets="attention"))
    assert [m.path for m in shape.maps if m.group == "attention"] == list(report.modules)
    assert report.trainable_parameters == 3 * sum(
        m.in_features + m.out_features for m in shape.maps if m.group == "attention"
    )
    everything = inject_adapters(make(name), AdapterSpec(rank=3))
    assert [m.path for m in shape.maps if m.group != "head"] == list(everything.modules)


@pytest.mark.parametrize("name", [*MODELS, *CONFIGS])
def test_a_layer_has_its_parameters(name, tmp_path):
    model = make(name)
    shape = read_shape(saved_config(model, tmp_path))
    for index, block in enumerate(shape.blocks):
        own = [p.numel() for n, p in model.named_parameters() if f".{index}." in n]
        assert block.parameters == sum(own)


def test_what_a_configuration_leaves_out_is_the_familys_default():
    gemma = {key: value for key, value in SIZES.items() if key != "pad_token_id"}
    shape = read_shape({"model_type": "gemma2", **gemma})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma2Config(**gemma))
    assert shape.tied
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_an_unknown_family_is_no_guess():
    with pytest.raises(
        UserError, match=r"models of type 'mamba2' are not known here; known are ll"
    ):
        read_shape({"model_type": "mamba2", "hidden_size": 24})


def test_a_size_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"^The model's config.json has no 'vocab_size'\.$"):
        read_shape({"model_type": "gptj", "n_embd": 24})
