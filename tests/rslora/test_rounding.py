"""What rounding W + gamma B A would lose, against float64, and what is allowed in consequence."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rslightning.rslora import contraction
from rslightning.rslora.linear import LoRALinear
from rslightning.rslora.rounding import MOST_LOST, allow_merged_orders, lost_in_rounding
from rslightning.rslora.spec import ResolvedAdapter

IN, OUT, RANK, TOKENS = 37, 53, 5, 10**4
ADAPTER = ResolvedAdapter(RANK, 4.0, "rslora")
NARROW = torch.bfloat16


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_layer(update=1.0, sizes=(IN, OUT), adapter=ADAPTER, dtype=NARROW, transposed=False):
    """Return a layer whose gamma B A is about `update` gamma sqrt(r) times as large as W."""
    n, m = sizes
    base = Conv1D(m, n) if transposed else nn.Linear(n, m)
    nn.init.normal_(base.weight, std=n**-0.5)
    layer = LoRALinear(base.to(dtype).requires_grad_(False), adapter)
    nn.init.normal_(layer.lora_a, std=n**-0.5)
    nn.init.normal_(layer.lora_b, std=update)
    return layer


def dense_loss(layer, dtype=NARROW, rows=slice(None)):
    """Return the share of gamma B A that rounding W' loses, of all entries in float64."""
    update = layer.gamma * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
    weight = layer.base.weight.double()
    exact = (weight.T if isinstance(layer.base, Conv1D) else weight) + update
    return ((exact.to(dtype).double() - exact)[rows].norm() / update[rows].norm()).item()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", [1.0, 0.01, 1e-4])
def test_all_rows_of_a_small_layer(update, dtype, transposed):
    layer = make_layer(update, dtype=dtype, transposed=transposed)
    lost = lost_in_rounding(layer, dtype)
    assert (lost.shape, lost.dtype) == ((), torch.float32)
    assert lost.item() == pytest.approx(dense_loss(layer, dtype), rel=2e-3)


@pytest.mark.parametrize("out", [127, 128, 300, 1000])
def test_rows_of_a_large_layer_stand_for_all(out):
    layer = make_layer(0.02, sizes=(IN, out))
    layer.lora_b.data *= torch.linspace(0.2, 2.0, out)[:, None]  # so that the first rows do not
    step = out // 64
    lost = lost_in_rounding(layer, NARROW).item()
    assert lost == pytest.approx(dense_loss(layer, rows=slice(None, None, step)), rel=2e-3)
    assert lost == pytest.approx(dense_loss(layer), rel=0.2)
    assert dense_loss(layer, rows=slice(64)) != pytest.approx(dense_loss(layer), rel=0.2)


def test_a_weight_on_a_grid_swallows_a_small_update_whole():
    assert lost_in_rounding(make_layer(1e-7), NARROW).item() == pytest.approx(1.0, abs=1e-2)


def test_float16_loses_eight_times_less():
    coarse, fine = make_layer(0.1), make_layer(0.1, dtype=torch.float16)
    fine.load_state_dict(coarse.state_dict())
    ratio = lost_in_rounding(coarse, NARROW) / lost_in_rounding(fine, torch.float16)
    assert ratio.item() == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_untrained_layer_is_not_merged(dtype):
    layer = make_layer(dtype=dtype)
    nn.init.zeros_(layer.lora_b)
    assert not math.isfinite(lost_in_rounding(layer, NARROW).item())
    layer.merges_in_16_bit = True
    allow_merged_orders(layer, NARROW)
    assert layer.merges_in_16_bit is False


def test_a_large_update_is_merged_and_a_tiny_one_is_not():
    tiny = make_layer(1.0, adapter=ResolvedAdapter(512, 16.0, "inverse_square"))
    stable = make_layer(1.0, adapter=ResolvedAdapter(512, 16.0, "rslora"))
    stable.load_state_dict(tiny.state_dict())
    assert tiny.gamma == 16 / 512**2
    model = nn.ModuleDict({"tiny": tiny, "stable": stable, "between": make_layer(0.002)})
    allow_merged_orders(model, NARROW)
    assert {name: layer.merges_in_16_bit for name, layer in model.items()} == {
        name: dense_loss(layer) <= MOST_LOST for name, layer in model.items()
    }
    assert stable.merges_in_16_bit
    assert not tiny.merges_in_16_bit
    model["stable"].lora_b.data *= 1e-6
    allow_merged_orders(model, NARROW)
    assert not stable.merges_in_16_bit


def test_layers_whose_weight_is_not_at_hand_are_left_alone():
    layer = make_layer(1.0)
    layer.base.register_forward_hook(lambda module, inputs, y: y)
    allow_merged_orders(layer, NARROW)
    assert not layer.merges_in_16_bit
    allow_merged_orders(nn.Linear(IN, OUT), NARROW)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_forward_pass_in_16_bit_merges_once_it_may(monkeypatch, autocast):
    chosen, choose = [], contraction.choose_order
    monkeypatch.setattr(
        contraction, "choose_order", lambda *args: chosen.append(choose(*args)) or chosen[-1]
    )
    layer = make_layer(1.0)
    x = torch.randn(TOKENS, IN, dtype=torch.float32 if autocast else NARROW)
    with torch.autocast("cpu", NARROW, enabled=autocast):
        before = layer(x)
        allow_merged_orders(layer, NARROW)
        after = layer(x)
    assert [order.merged_forward for order in chosen] == [False, True]
    assert not torch.equal(before, after)
    exact = x.double() @ (layer.weight.double() + layer.gamma * layer.lora_b @ layer.lora_a).T
    exact += layer.bias.double()
    for y in (before, after):
        assert (y - exact).norm() / exact.norm() < 2.0**-8
    make_layer(dtype=torch.float32)(x.float())
    assert chosen[-1].merged_forward


def test_shards_of_two_processes(run_processes):
    def process(rank):
        from torch.distributed import destroy_process_group, device_mesh, init_process_group
        from torch.distributed.fsdp import fully_shard

        init_process_group("gloo")
        mesh = device_mesh.init_device_mesh("cpu", (2,))
        torch.manual_seed(1)
        # The third shard has W sharded by its inputs, the fourth has no row on the second process,
        # and the last a large update in the first one's rows only: both processes choose alike.
        layers = [make_layer(1.0), make_layer(1e-4), make_layer(1.0, transposed=True)]
        layers += [make_layer(1.0, sizes=(IN, 1)), make_layer(1.0)]
        split = (OUT + 1) // 2
        layers[-1].lora_b.data[split:] *= 1e-5
        rows = slice(None, split) if rank == 0 else slice(split, None)
        truth = [dense_loss(layer, rows=rows) for layer in layers]
        model = nn.ModuleList(layers)
        for layer in model:
            fully_shard(layer, mesh=mesh)
        allow_merged_orders(model, NARROW)
        flags = [layer.merges_in_16_bit for layer in model]
        assert flags == [True, False, False, False, False]
        lost = [lost_in_rounding(layer, NARROW).item() for layer in model]
        for index in (0, 1, 4):
            assert lost[index] == pytest.approx(truth[index], rel=2e-3)
        x = torch.randn(TOKENS, IN).to(NARROW)
        sum(layer(x).float().square().mean() for layer in model).backward()
        destroy_process_group()

    assert run_processes(2, process) == [0, 0]
