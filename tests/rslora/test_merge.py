import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rslightning.errors import RunError, UserError
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import LoRALinear, adapter_layers
from rslightning.rslora.merge import (
    adapter_delta,
    add_delta,
    lost_share,
    merge_adapters,
    unmerge_adapters,
    unwrap_adapters,
)
from rslightning.rslora.spec import AdapterSpec

IDS = torch.arange(10).reshape(2, 5)
GAMMA = 16.0 / math.sqrt(3.0)


def adapted(model, targets="all_linear", std=0.05):
    """Inject adapters of rank 3 whose B is random."""
    inject_adapters(model, AdapterSpec(rank=3, targets=targets))
    generator = torch.Generator().manual_seed(7)
    for _, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_b, std=std, generator=generator)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, state):
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert now[name].dtype == tensor.dtype
        assert torch.equal(now[name], tensor), name


def exact_update(layer):
    """Return gamma B A in float64, as the base keeps its weight."""
    delta = GAMMA * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
    return delta.T if isinstance(layer.base, Conv1D) else delta


def test_merged_forward_is_the_adapter_forward(tiny_llama):
    plain = logits(tiny_llama)
    with_adapters = logits(adapted(tiny_llama))
    assert (with_adapters - plain).abs().max() > 0.01
    merged = merge_adapters(tiny_llama)
    assert merged == [path for path, _ in adapter_layers(tiny_llama)]
    assert all(layer.merged for _, layer in adapter_layers(tiny_llama))
    torch.testing.assert_close(logits(tiny_llama), with_adapters, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merged_weights_are_rounded_once(tiny_llama, dtype):
    adapted(tiny_llama.to(dtype))
    exact = {
        path: layer.base.weight.detach().double() + exact_update(layer)
        for path, layer in adapter_layers(tiny_llama)
    }
    merge_adapters(tiny_llama)
    # Half a unit in the last place, and a little for gamma B A, which is formed in float32.
    half_unit = torch.finfo(dtype).eps / 2
    for path, layer in adapter_layers(tiny_llama):
        assert layer.base.weight.dtype == dtype
        error = (layer.base.weight.double() - exact[path]).abs()
        assert (error <= half_unit * exact[path].abs() + 1e-7).all()


def test_merging_twice_is_merging_once(tiny_llama):
    adapted(tiny_llama)
    merge_adapters(tiny_llama)
    once = snapshot(tiny_llama)
    assert merge_adapters(tiny_llama) == []
    assert_same_bits(tiny_llama, once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [1e-4, 100.0])
def test_unmerging_is_exact(tiny_llama, dtype, std):
    adapted(tiny_llama.to(dtype), std=std)
    state, output = snapshot(tiny_llama), logits(tiny_llama)
    for _ in range(3):
        paths = merge_adapters(tiny_llama)
        assert unmerge_adapters(tiny_llama) == paths
    assert unmerge_adapters(tiny_llama) == []
    assert_same_bits(tiny_llama, state)
    assert torch.equal(logits(tiny_llama), output)


def test_a_merged_model_keeps_its_state_names(tiny_llama):
    names = list(adapted(tiny_llama).state_dict())
    merge_adapters(tiny_llama)
    assert list(tiny_llama.state_dict()) == names


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_merge_that_is_not_finite_changes_nothing(tiny_llama, bad):
    adapted(tiny_llama)
    last = list(adapter_layers(tiny_llama))[-1][1]
    with torch.no_grad():
        last.lora_b[3, 1] = bad
    state = {name: tensor.nan_to_num() for name, tensor in snapshot(tiny_llama).items()}
    with pytest.raises(RunError) as error:
        merge_adapters(tiny_llama)
    assert str(error.value) == (
        "model.layers.1.mlp.down_proj: The merged weight has entries that are not finite in "
        "float32. Nothing was merged."
    )
    with torch.no_grad():
        last.lora_b.nan_to_num_()
    assert_same_bits(tiny_llama, state)
    assert not any(layer.merged for _, layer in adapter_layers(tiny_llama))


def test_an_overflow_of_float16_is_noticed(tiny_llama):
    adapted(tiny_llama.half(), std=1e5)
    with pytest.raises(RunError, match=r"self_attn\.q_proj: .* not finite in float16\."):
        merge_adapters(tiny_llama)


def test_a_quantized_base_is_refused(tiny_llama):
    adapted(tiny_llama)
    path, layer = list(adapter_layers(tiny_llama))[2]
    layer.base.weight = nn.Parameter(torch.zeros(12, 24, dtype=torch.int8), requires_grad=False)
    state = snapshot(tiny_llama)
    with pytest.raises(UserError) as error:
        merge_adapters(tiny_llama)
    assert str(error.value) == (
        f"{path} is quantized, and has no weight to add to; write the merged model to a folder "
        "instead (rslightning merge, MergeAdapters)."
    )
    assert_same_bits(tiny_llama, state)


@pytest.mark.parametrize("sizes", [(7, 11), (7, 7)], ids=["oblong", "square"])
def test_orientation_of_conv1d(sizes):
    torch.manual_seed(0)
    model = adapted(nn.Sequential(Conv1D(sizes[1], sizes[0])))
    weight = model[0].base.weight.detach().double()
    x = torch.randn(2, 5, sizes[0])
    before = model(x)
    exact = x.double() @ (weight + exact_update(model[0])) + model[0].bias.double()
    merge_adapters(model)
    assert model[0].base.weight.shape == sizes
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(model(x), exact.float())


@pytest.mark.parametrize("targets", ["all_linear", ["v_proj", "down_proj"]])
def test_unwrapping_a_merged_model_gives_the_plain_one(tiny_llama, targets):
    kinds = {path: type(module) for path, module in tiny_llama.named_modules()}
    names = list(tiny_llama.state_dict())
    with_adapters = logits(adapted(tiny_llama, targets))
    merge_adapters(tiny_llama)
    assert unwrap_adapters(tiny_llama) is tiny_llama
    assert {path: type(module) for path, module in tiny_llama.named_modules()} == kinds
    assert list(tiny_llama.state_dict()) == names
    torch.testing.assert_close(logits(tiny_llama), with_adapters, rtol=1e-5, atol=1e-6)


def test_unwrapping_before_a_merge_gives_the_base(tiny_llama):
    state = snapshot(tiny_llama)
    unwrap_adapters(adapted(tiny_llama))
    assert_same_bits(tiny_llama, state)
    assert not any(isinstance(module, LoRALinear) for module in tiny_llama.modules())


def test_the_update_of_one_layer():
    lora_a, lora_b = torch.randn(3, 7), torch.randn(11, 3)
    exact = 0.75 * lora_b.double() @ lora_a.double()
    torch.testing.assert_close(adapter_delta(lora_a, lora_b, 0.75), exact.float())
    # From bfloat16 adapters the product is formed in float32 as well.
    narrow = adapter_delta(lora_a.bfloat16(), lora_b.bfloat16(), 0.75)
    exact = 0.75 * lora_b.bfloat16().double() @ lora_a.bfloat16().double()
    torch.testing.assert_close(narrow, exact.float())


def test_a_float64_weight_is_not_narrowed():
    weight, delta = torch.rand(5, 7, dtype=torch.float64), torch.rand(5, 7)
    assert torch.equal(add_delta(weight, delta, torch.float64), weight + delta.double())


def test_lost_share_by_hand():
    # bfloat16 keeps 8 bits: 1 + 2^-9 is rounded to 1, 1 + 2^-7 is kept.
    weight = torch.ones(1, 2).bfloat16()
    delta = torch.tensor([[2.0**-9, 2.0**-7]])
    merged = add_delta(weight, delta, torch.bfloat16)
    assert merged.tolist() == [[1.0, 1.0078125]]
    expected = 2.0**-9 / math.hypot(2.0**-9, 2.0**-7)
    assert lost_share(weight, delta, merged) == pytest.approx(expected, rel=1e-12)
    assert lost_share(weight, delta, weight) == 1.0
    assert lost_share(weight, 0 * delta, merged) == 0.0
