"""Moments against dense formulas in float64."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rslightning.rslora import AdapterSpec, LoRALinear
from rslightning.stats.moments import (
    AdaptedLayer,
    LowRank,
    MomentRecorder,
    Moments,
    combine,
    input_gradient_factors,
    mean_over_layers,
    measure,
    measure_product,
    output_factors,
)


def dense(values):
    """Return E[u], E[u^2] and the number of entries in float64."""
    values = values.double().flatten()
    return values.mean().item(), values.square().mean().item(), values.numel()


def assert_moments(found, values, rtol=1e-5):
    first, second, entries = dense(values)
    assert found.total.dtype == found.squares.dtype == torch.float32
    assert found.entries == entries
    # The first moment cancels: its rounding is relative to the size of the entries.
    assert found.first().item() == pytest.approx(first, abs=rtol * math.sqrt(second))
    assert found.second().item() == pytest.approx(second, rel=rtol)


def padded(lengths, length, features, seed=0):
    """Return values [B, T, features] with NaN at the padding, and the mask [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(lengths), length, features, generator=generator) + 0.3
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    values[~mask] = math.nan
    return values, mask


def test_padding_changes_nothing():
    values, mask = padded([7, 1, 0, 11], 11, 5)
    for kind in (torch.int64, torch.bool, torch.float32):
        assert_moments(measure(values, mask.to(kind)), values[mask])
    assert_moments(measure(values.flatten(0, 1), mask), values[mask])
    assert_moments(measure(values.flatten(0, 1)[None], mask), values[mask])


@pytest.mark.parametrize("shape", [(11, 4, 5), (43, 5), (4, 10, 5), (2, 2, 11, 5), (5,)])
def test_a_mask_of_another_shape_does_not_fit(shape):
    mask = torch.zeros(4, 11)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_moments(measure(values, mask), values)
    assert_moments(measure(values), values)


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_moments_of_parts_combine(cut):
    values, mask = padded([7, 1, 0, 11], 11, 5)
    parts = [measure(values[:cut], mask[:cut]), measure(values[cut:], mask[cut:])]
    whole = measure(values, mask)
    for found, expected in zip(combine(*parts), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert_moments(combine(*parts), values[mask])


def test_sums_are_float32_whatever_the_entries_are():
    values = torch.full((3, 700, 11), 1.0).bfloat16()  # 256 + 1 is 256 in bfloat16
    assert measure(values).entries == 23100
    assert measure(values).total == 23100
    assert measure(values).second().item() == pytest.approx(1, rel=1e-6)
    large = torch.full((3, 7), 300.0).half()  # 300 squared is infinite in float16
    assert measure(large).second().item() == pytest.approx(90000, rel=1e-6)
    wide = torch.randn(3, 7, dtype=torch.float64)
    assert_moments(measure(wide), wide)


def test_times_is_the_moments_of_the_multiple():
    values = torch.randn(3, 7)
    assert_moments(measure(values).times(-0.25), values * -0.25)


def test_layers_that_saw_nothing_leave_the_mean_alone():
    moments = Moments(*torch.tensor([[3.0, 0.0, 8.0], [9.0, 0.0, 20.0], [3.0, 0.0, 4.0]]))
    first, second = mean_over_layers(moments)
    assert (first, second) == (1.5, 4.0)
    assert mean_over_layers(Moments(*torch.zeros(3, 2)))[0].isnan()
    moments.total[0] = math.nan  # but what is not a number shows
    assert mean_over_layers(moments)[0].isnan()


@pytest.mark.parametrize("rank", [1, 3, 4, 20])  # from 4 on the product of 7 features is made
@pytest.mark.parametrize("autocast", [False, True])
def test_a_product_is_measured_as_if_it_were_made(rank, autocast):
    down, mask = padded([7, 1, 0, 11], 11, rank)
    up = torch.randn(rank, 7, generator=torch.Generator().manual_seed(2))
    product = (down.double() @ up.double())[mask]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = measure_product(down, up, mask), measure_product(down.flatten(0, 1), up, mask)
    for moments in found:
        assert_moments(moments, product, rtol=1e-2 if autocast and rank > 3 else 1e-5)


def test_sums_of_a_product_are_float32_whatever_its_factors_are():
    down, up = torch.full((3, 700, 1), 1.0).bfloat16(), torch.ones(1, 11)
    assert measure_product(down, up).total == 23100
    assert measure_product(down, up).second() == 1
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does under bf16-true
    try:
        assert measure_product(down, up).entries == measure(down @ up.bfloat16()).entries == 23100
    finally:
        torch.set_default_dtype(torch.float32)


def random_adapters(count):
    generator = torch.Generator().manual_seed(1)
    return [
        LowRank(
            torch.randn(rank, 5, generator=generator),
            torch.randn(7, rank, generator=generator),
            0.4 * rank,
        )
        for rank in range(2, 2 + count)
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_both_halves_of_the_definition(count):
    adapters = random_adapters(count)
    x = torch.randn(3, 11, 5, dtype=torch.float64, requires_grad=True)
    update = sum(gamma * b.double() @ a.double() for a, b, gamma in adapters)
    z = x @ update.T
    v = torch.randn(3, 11, 7, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(z, x, v)
    with torch.no_grad():
        down, up = output_factors(x.float(), adapters)
        back_down, back_up = input_gradient_factors(v.float(), adapters)
    torch.testing.assert_close((down @ up).double(), z.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((back_down @ back_up).double(), gradient, rtol=1e-5, atol=1e-5)


def adapted_linear():
    torch.manual_seed(0)
    spec = AdapterSpec(rank=3, alpha=2.0).resolve("layer")
    layer = LoRALinear(nn.Linear(5, 7), spec)
    layer.reset_adapter("layer")
    nn.init.normal_(layer.lora_b)
    return layer


def record(layer, run, mask=None, **options):
    own = AdaptedLayer(layer, lambda: [LowRank(layer.lora_a, layer.lora_b, layer.gamma)])
    recorder = MomentRecorder({"layer": own}, torch.device("cpu"))
    with recorder.attach(mask, **options):
        assert len(layer._forward_hooks) == 1
        run(recorder)
    assert len(layer._forward_hooks) == 0
    return [Moments(*sums[0]) for sums in recorder.sums]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_recomputation_is_counted_once(reentrant):
    layer = adapted_linear()
    x = torch.randn(3, 11, 5, requires_grad=True)
    mask = torch.arange(11) < torch.tensor([[11], [4], [2]])

    def call(x):  # the square needs the layer's output again in backward
        return layer(x).square()

    def run(recorder):
        y = call(x) if reentrant is None else checkpoint(call, x, use_reentrant=reentrant)
        y[mask].sum().backward()

    activation, output, gradient = record(layer, run, mask)
    with torch.no_grad():
        update = layer.gamma * layer.lora_b.double() @ layer.lora_a.double()
        y = x.double() @ (layer.base.weight.double() + update).T + layer.base.bias.double()
    assert_moments(activation, y[mask])
    assert_moments(output, (x.detach().double() @ update.T)[mask])
    assert_moments(gradient, (2 * y @ update)[mask])


def test_a_model_may_change_the_output_in_place():
    layer = adapted_linear()
    x = torch.randn(3, 11, 5)
    activation, _, gradient = record(layer, lambda _: layer(x).mul_(3.0).sum().backward())
    update = layer.gamma * layer.lora_b.double() @ layer.lora_a.double()
    assert_moments(activation, layer(x).detach())  # as the layer gave it
    assert_moments(gradient, (3 * torch.ones(3, 11, 7).double() @ update).detach())


def test_scaled_losses_have_the_gradient_of_the_loss():
    layer = adapted_linear()
    x = torch.randn(3, 11, 5)

    def plain(recorder):
        layer(x).sum().backward()

    def scaled(recorder):
        loss = layer(x).sum() * 1024.0  # by a loss scale, told beforehand
        recorder.see_loss(loss)
        (loss / 4.0).backward()  # by an engine, which tells nobody

    expected = record(layer, plain)[2]
    found = record(layer, scaled, loss_scale=torch.tensor(1024.0))[2]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_disabled_adapter_counts_nothing():
    layer = adapted_linear()
    none = AdaptedLayer(layer, list)
    recorder = MomentRecorder({"layer": none}, torch.device("cpu"))
    with recorder.attach(None):
        layer(torch.randn(2, 5)).sum().backward()
    assert not recorder.sums.any()
