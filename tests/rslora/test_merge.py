import copy
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rslightning.errors import RunError, UserError
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import LoRALinear, adapter_layers
from rslightning.rslora.merge import (
    LayerMerge,
    merge_adapters,
    merge_weight,
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


@pytest.mark.parametrize(
    "move", [nn.Module.double, nn.Module.bfloat16, lambda model: model.to("meta")]
)
def test_a_merged_model_that_moves_is_unmerged_where_it_is(tiny_llama, move):
    expected = move(copy.deepcopy(tiny_llama))
    adapted(tiny_llama)
    merge_adapters(tiny_llama)
    move(tiny_llama)
    unmerge_adapters(tiny_llama)
    base = unwrap_adapters(tiny_llama).state_dict()
    for name, tensor in expected.state_dict().items():
        assert (base[name].dtype, base[name].device) == (tensor.dtype, tensor.device)
        assert tensor.is_meta or torch.equal(base[name], tensor), name


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


def dyadic(*shape, largest=8, unit=2.0**-6):
    """Return whole multiples of `unit`, whose products and sums float32 forms without rounding."""
    return torch.randint(-largest, largest + 1, shape) * unit


def dense_merge(weight, lora_a, lora_b, gamma, merged):
    """Return W + gamma B A and the report's numbers, from whole matrices in float64."""
    update = gamma * lora_b.double() @ lora_a.double()
    exact = weight.double() + update
    lost = (merged.double() - exact).norm() / update.norm()
    return exact, LayerMerge(float(weight.double().norm()), float(update.norm()), float(lost))


@pytest.mark.parametrize("rows", [1, 64, 65, 150])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_weight_and_its_numbers_against_float64(rows, transposed, stored, dtype):
    torch.manual_seed(rows)
    weight = (0.3 * torch.randn(rows, 37)).to(stored)
    lora_a, lora_b = dyadic(5, 37), dyadic(rows, 5)
    base = weight.T.contiguous() if transposed else weight
    before = base.clone()
    merged, numbers = merge_weight(base, lora_a, lora_b, 0.5, dtype, transposed)
    assert torch.equal(base, before)
    assert merged.dtype == dtype
    assert merged.shape == base.shape
    merged = merged.T if transposed else merged
    exact, truth = dense_merge(weight, lora_a, lora_b, 0.5, merged)
    # A float64 or float32 sum goes to 16 bit by way of float32.
    assert torch.equal(merged, exact.float().to(dtype))
    assert asdict(numbers) == pytest.approx(asdict(truth), rel=1e-5)


@pytest.mark.parametrize(("spread", "tolerance"), [(0.02, 1e-5), (0.0, 1e-3)])
def test_the_numbers_of_a_weight_as_wide_as_they_come(spread, tolerance):
    """A sum in float32 drifts with the number of terms, most where all are alike."""
    torch.manual_seed(0)
    weight = torch.normal(0.0 if spread else 0.1, spread, (70, 28_672))
    lora_a, lora_b = torch.full((2, 28_672), 0.3), torch.full((70, 2), 2.0**-9)
    merged, numbers = merge_weight(weight, lora_a, lora_b, 1.0, torch.bfloat16)
    _, truth = dense_merge(weight, lora_a, lora_b, 1.0, merged)
    assert numbers.weight_norm == pytest.approx(truth.weight_norm, rel=tolerance)
    assert asdict(numbers) == pytest.approx(asdict(truth), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_formed_in_float32(dtype):
    lora_a, lora_b = torch.randn(3, 7).to(dtype), torch.randn(11, 3).to(dtype)
    update, _ = merge_weight(torch.zeros(11, 7), lora_a, lora_b, 0.75, torch.float32)
    exact = 0.75 * lora_b.double() @ lora_a.double()
    torch.testing.assert_close(update, exact.float())


def test_a_float64_weight_is_not_narrowed():
    weight = torch.rand(5, 7, dtype=torch.float64)
    lora_a, lora_b = dyadic(2, 7), dyadic(5, 2)
    merged, _ = merge_weight(weight, lora_a, lora_b, 1.0, torch.float64)
    assert torch.equal(merged, weight + lora_b.double() @ lora_a.double())


def test_lost_share_by_hand():
    # bfloat16 keeps 8 bits: 1 + 2^-9 is rounded to 1, 1 + 2^-7 is kept.
    weight, lora_b = torch.ones(1, 2).bfloat16(), torch.ones(1, 1)
    lora_a = torch.tensor([[2.0**-9, 2.0**-7]])
    merged, numbers = merge_weight(weight, lora_a, lora_b, 1.0, torch.bfloat16)
    assert merged.tolist() == [[1.0, 1.0078125]]
    update = math.hypot(2.0**-9, 2.0**-7)
    truth = LayerMerge(math.sqrt(2), update, 2.0**-9 / update)
    assert asdict(numbers) == pytest.approx(asdict(truth), rel=1e-12)
    _, all_lost = merge_weight(weight, lora_a / 4, lora_b, 1.0, torch.bfloat16)
    assert all_lost.lost_share == 1.0
    merged, nothing = merge_weight(weight, lora_a, 0 * lora_b, 1.0, torch.bfloat16)
    assert torch.equal(merged, weight)
    assert (nothing.update_norm, nothing.lost_share) == (0.0, 0.0)


def test_squares_that_float32_cannot_hold():
    weight = torch.full((3, 5), 2.0**100)
    _, numbers = merge_weight(weight, torch.ones(2, 5), torch.ones(3, 2), 2.0**99, torch.float32)
    assert numbers.weight_norm == pytest.approx(math.sqrt(15) * 2.0**100)
    assert numbers.update_norm == pytest.approx(math.sqrt(15) * 2.0**100)
    assert numbers.lost_share == 0.0


@pytest.mark.parametrize("row", [3, 68], ids=["first_block", "last_block"])
@pytest.mark.parametrize(
    ("dtype", "entry", "update"),
    [
        (torch.float32, math.nan, 1.0),
        (torch.float32, -math.inf, 1.0),
        (torch.float32, 3.3e38, 0.5e38),
        (torch.float16, 65_000.0, 600.0),
    ],
)
def test_an_entry_that_is_not_finite_is_found_in_every_block(row, dtype, entry, update):
    weight, lora_a, lora_b = torch.zeros(70, 7), torch.ones(2, 7), torch.ones(70, 2)
    merge_weight(weight, lora_a, lora_b, update / 2, dtype)
    weight[row, 5] = entry
    with pytest.raises(RunError, match="not finite"):
        merge_weight(weight, lora_a, lora_b, update / 2, dtype)


def test_threads_change_no_bit_and_are_given_back():
    torch.manual_seed(0)
    weight, lora_a, lora_b = torch.randn(333, 41), torch.randn(6, 41), torch.randn(333, 6)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(merge_weight(weight, lora_a, lora_b, 0.5, torch.bfloat16))
            assert torch.get_num_threads() == count
        with pytest.raises(RunError):
            merge_weight(weight * math.inf, lora_a, lora_b, 0.5, torch.bfloat16)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_merge_records_no_gradient():
    lora_a = torch.ones(2, 7, requires_grad=True)
    merged, _ = merge_weight(torch.ones(70, 7), lora_a, torch.ones(70, 2), 0.5, torch.float32)
    assert not merged.requires_grad


def test_the_default_dtype_does_not_matter():
    torch.manual_seed(0)
    matrices = torch.randn(70, 7), torch.randn(2, 7), torch.randn(70, 2)
    expected, numbers = merge_weight(*matrices, 0.5, torch.float32)
    try:
        torch.set_default_dtype(torch.bfloat16)  # as Lightning does under bf16-true
        merged, again = merge_weight(*matrices, 0.5, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(merged, expected)
    assert again == numbers
