import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rslightning.errors import UserError
from rslightning.rslora import AdapterSpec, inject_adapters
from rslightning.rslora.peft_modules import (
    collect_peft_adapter,
    peft_adapter_parameters,
    peft_layers,
    refuse_switched_off,
)
from rslightning.rslora.spec import ResolvedAdapter
from rslightning.rslora.trained import trained_adapter

K_PROJ, UP_PROJ = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"


def adapted(model, **options):
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "up_proj"]}
    return get_peft_model(model, LoraConfig(**(defaults | options))).get_base_model()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_numbers_are_the_users(tiny_llama, use_rslora):
    patterns = {"rank_pattern": {"up_proj": 1}, "alpha_pattern": {"layers.0.*": 2.5}}
    model = adapted(tiny_llama, use_rslora=use_rslora, lora_dropout=0.125, **patterns)
    adapter = collect_peft_adapter(model, "some/base")
    assert (adapter.base_model, adapter.dropout, len(adapter.layers)) == ("some/base", 0.125, 4)
    scaling = "rslora" if use_rslora else "lora"
    assert adapter.layers[K_PROJ].numbers == ResolvedAdapter(4, 2.5, scaling)
    assert adapter.layers[UP_PROJ].numbers == ResolvedAdapter(1, 6, scaling)
    for path, layer in adapter.layers.items():
        live = model.get_submodule(path)
        assert layer.numbers.gamma == live.scaling["default"]
        assert layer.lora_a.data_ptr() == live.lora_A["default"].weight.data_ptr()
        assert layer.lora_b.data_ptr() == live.lora_B["default"].weight.data_ptr()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_scale_set_by_hand_becomes_an_alpha(tiny_llama, use_rslora):
    model = adapted(tiny_llama, use_rslora=use_rslora)
    model.get_submodule(K_PROJ).scaling["default"] = 0.75
    numbers = collect_peft_adapter(model).layers[K_PROJ].numbers
    assert numbers == ResolvedAdapter(4, *((1.5, "rslora") if use_rslora else (3.0, "lora")))


def test_the_parameters_are_the_trained_ones(tiny_llama):
    model = adapted(tiny_llama)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert peft_adapter_parameters(model).keys() == trained
    assert len(trained) == 8


class Offers(nn.Module):
    """A layer of nobody's, that offers what PEFT's do."""

    def __init__(self, base, scale):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"x": nn.Linear(7, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"x": nn.Linear(3, 5, bias=False)})
        self.lora_dropout = nn.ModuleDict({"x": nn.Identity()})
        self.scaling = {"x": scale}
        self.active_adapters = ["x"]


class Named(nn.Module):
    """A layer with the names of an adapter that is none."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.Parameter(torch.ones(3, 7))
        self.lora_B = nn.Linear(3, 5)
        self.lora = nn.Linear(5, 5)


def test_layers_are_known_by_what_they_offer():
    model = nn.ModuleDict({"a": Offers(nn.Linear(7, 5), 0.3), "b": Named()})
    assert [path for path, _ in peft_layers(model)] == ["a"]
    layer = collect_peft_adapter(model).layers["a"]
    assert (layer.numbers.rank, layer.numbers.scaling) == (3, "lora")
    assert layer.numbers.gamma == pytest.approx(0.3, rel=1e-15)
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((3, 7), (5, 3))


@pytest.mark.parametrize(
    "missing", ["base_layer", "lora_A", "lora_B", "scaling", "active_adapters"]
)
def test_a_layer_that_offers_less_is_none_of_peft(missing):
    layer = Offers(nn.Linear(7, 5), 0.3)
    delattr(layer, missing)
    assert list(peft_layers(nn.ModuleDict({"a": layer}))) == []


def test_reading_imports_no_peft():
    code = "import sys, rslightning.rslora.trained; print('peft' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"use_dora": True}, "lora_magnitude_vector.default.weight"),
        ({"lora_bias": True}, "lora_B.default.bias"),
    ],
)
def test_more_than_plain_shows_without_a_configuration(tiny_llama, options, parameter):
    for layer in tiny_llama.model.layers:
        layer.self_attn.k_proj.bias = nn.Parameter(torch.zeros(12))
    model = adapted(tiny_llama, target_modules=["k_proj"], **options)
    model.peft_config = {}
    with pytest.raises(UserError) as error:
        collect_peft_adapter(model)
    assert str(error.value) == f"{K_PROJ} has {parameter}, which plain LoRA does not have."


def test_what_is_not_there(tiny_llama):
    assert trained_adapter(tiny_llama, tiny_llama) is None
    refuse_switched_off(tiny_llama)
    with pytest.raises(UserError) as error:
        collect_peft_adapter(tiny_llama)
    assert str(error.value) == (
        "Exactly one adapter of PEFT must be active to be written, here none; choose one with "
        "set_adapter."
    )
    model = adapted(tiny_llama)
    for _, layer in peft_layers(model):
        layer.set_adapter("absent")
    with pytest.raises(UserError, match=r"^The model has no adapter 'absent'\.$"):
        collect_peft_adapter(model)


def test_ours_beside_theirs_is_refused(tiny_llama):
    inject_adapters(tiny_llama, AdapterSpec(rank=2, targets=["q_proj"]))
    model = adapted(tiny_llama)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(UserError, match=r"is trained beside the adapters \("):
        trained_adapter(model, model)
