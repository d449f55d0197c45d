import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from rslightning.cost import ORDERS
from rslightning.rslora import contraction
from rslightning.rslora.contraction import choose_order
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import LoRALinear, adapter_layers, is_linear, linear_features
from rslightning.rslora.merge import merge_adapters, unmerge_adapters
from rslightning.rslora.spec import AdapterSpec, ResolvedAdapter

BATCH, TOKENS, IN, OUT, RANK = 2, 5, 7, 11, 3
ADAPTER = ResolvedAdapter(RANK, 4.0, "rslora")
GAMMA = 4.0 / math.sqrt(3.0)

BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear_without_bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_layer(base="linear", dtype=torch.float32, **options):
    """Return an adapted layer whose every entry is random, B and the bias too."""
    module = BASES[base]().requires_grad_(False)
    if module.bias is not None:
        nn.init.normal_(module.bias)
    layer = LoRALinear(module.to(dtype), ADAPTER, **options)
    nn.init.normal_(layer.lora_a)
    nn.init.normal_(layer.lora_b)
    return layer


def dense_weight(layer):
    """Return W [out, in] in float64."""
    weight = layer.base.weight.detach().double()
    return weight.T if isinstance(layer.base, Conv1D) else weight


def dense_forward(layer, x, lora_a, lora_b):
    """Return (W + gamma B A) x + b in float64."""
    y = x @ (dense_weight(layer) + GAMMA * lora_b @ lora_a).T
    return y if layer.base.bias is None else y + layer.base.bias.double()


def sum_of_magnitudes(layer, x):
    """Return |W||x| + |b| + gamma |B||A||x|, in which rounding errors are measured."""
    x, lora_a, lora_b = (t.detach().double().abs() for t in (x, layer.lora_a, layer.lora_b))
    y = x @ (dense_weight(layer).abs() + GAMMA * lora_b @ lora_a).T
    return y if layer.base.bias is None else y + layer.base.bias.double().abs()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_dense_one(base, dtype):
    layer = make_layer(base, dtype)
    x = torch.randn(BATCH, TOKENS, IN).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (BATCH, TOKENS, OUT))
    exact = dense_forward(layer, x.double(), layer.lora_a.double(), layer.lora_b.double())
    error = (y.double() - exact).abs() / sum_of_magnitudes(layer, x)
    # A, the product with A and its multiple, B, the product with B, and the sum round once each.
    assert error.max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_dense_map(base):
    layer = make_layer(base)
    x = torch.randn(BATCH, TOKENS, IN, requires_grad=True)
    weights = torch.randn(BATCH, TOKENS, OUT)
    (layer(x) * weights).sum().backward()

    exact = [t.detach().double().requires_grad_() for t in (x, layer.lora_a, layer.lora_b)]
    (dense_forward(layer, *exact) * weights.double()).sum().backward()
    for ours, truth in zip((x, layer.lora_a, layer.lora_b), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_only_adapters_get_gradients():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.LayerNorm(OUT), nn.Linear(OUT, IN))
    inject_adapters(model, AdapterSpec(rank=RANK))
    model(torch.randn(BATCH, IN)).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"0.lora_a", "0.lora_b", "2.lora_a", "2.lora_b"}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_initialization(monkeypatch, base, dtype):
    layer = make_layer(base, dtype)
    layer.reset_adapter("name")
    x = torch.randn(BATCH, TOKENS, IN).to(dtype)
    assert layer.lora_a.abs().min() > 0
    exact = dense_forward(layer, x.double(), layer.lora_a.double(), layer.lora_b.double())
    for order in (None, *ORDERS):
        monkeypatch.setattr(
            contraction, "choose_order", lambda *args, order=order: order or choose_order(*args)
        )
        if base == "conv1d":  # laid out anew, W is multiplied in another order
            error = (layer(x).double() - exact).abs() / sum_of_magnitudes(layer, x)
            assert error.max() < (IN + 1) * torch.finfo(dtype).eps / 2  # of IN products and a bias
        else:
            assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("base", BASES)
def test_shapes_and_attributes(base):
    layer = make_layer(base, torch.bfloat16)
    assert layer.lora_a.shape == (RANK, IN)
    assert layer.lora_b.shape == (OUT, RANK)
    assert {layer.lora_a.dtype, layer.lora_b.dtype} == {torch.float32}
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert layer.extra_repr() == "in_features=7, out_features=11, rank=3, alpha=4, gamma=2.3094"


def test_the_adapter_may_be_stored_in_another_dtype():
    layer = make_layer(dtype=torch.bfloat16)
    narrow = LoRALinear(layer.base, ADAPTER, dtype=torch.bfloat16)
    narrow.reset_adapter("name")
    layer.reset_adapter("name")
    assert narrow.lora_a.dtype == torch.bfloat16
    assert torch.equal(narrow.lora_a, layer.lora_a.bfloat16())


def test_what_counts_as_linear():
    assert is_linear(nn.Linear(IN, OUT))
    assert is_linear(Conv1D(OUT, IN))
    assert not is_linear(nn.Conv1d(IN, OUT, 1))
    assert not is_linear(nn.Embedding(IN, OUT))
    assert linear_features(Conv1D(OUT, IN)) == linear_features(nn.Linear(IN, OUT)) == (IN, OUT)


def test_dropout_falls_on_the_adapters_input_only():
    layer = make_layer(dropout=0.4)
    x = torch.randn(BATCH, TOKENS, IN)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    assert (dropped == 0).any()
    expected = layer.base(x) + GAMMA * dropped @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("base", BASES)
def test_gradients_through_dropout(base):
    layer = make_layer(base, dropout=0.4)
    x = torch.randn(BATCH, TOKENS, IN, requires_grad=True)
    weights = torch.randn(BATCH, TOKENS, OUT)
    torch.manual_seed(5)
    (layer(x) * weights).sum().backward()
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), 0.4).double()
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.6])

    exact = [t.detach().double().requires_grad_() for t in (x, layer.lora_a, layer.lora_b)]
    y = exact[0] @ dense_weight(layer).T + GAMMA * (exact[0] * mask) @ exact[1].T @ exact[2].T
    (y * weights.double()).sum().backward()
    for ours, truth in zip((x, layer.lora_a, layer.lora_b), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_dropout_is_off_in_evaluation():
    layer = make_layer(dropout=0.9)
    plain = LoRALinear(layer.base, ADAPTER)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(BATCH, TOKENS, IN)
    assert not torch.equal(layer(x), plain(x))
    assert torch.equal(layer.eval()(x), plain(x))


def draw(rank, init="kaiming_uniform", name="model.layers.0.q_proj", width=1000):
    layer = LoRALinear(nn.Linear(width, OUT), ResolvedAdapter(rank, 4.0, "rslora"))
    layer.reset_adapter(name, init)
    assert not layer.lora_b.any()
    return layer.lora_a.detach()


@pytest.mark.parametrize("rank", [4, 64, 512])
@pytest.mark.parametrize(
    ("init", "kurtosis"), [("kaiming_uniform", 1.8), ("gaussian", 3.0)], ids=["uniform", "gaussian"]
)
def test_the_variance_of_a_is_free_of_the_rank(rank, init, kurtosis):
    entries = draw(rank, init).double().flatten()
    variance, count = 1 / 3000, entries.numel()
    five_sigma = 5 * math.sqrt((kurtosis - 1) / count)
    assert entries.pow(2).mean() / variance == pytest.approx(1.0, abs=five_sigma)
    assert entries.mean() / math.sqrt(variance) == pytest.approx(0.0, abs=5 / math.sqrt(count))
    # The fourth moment tells the two apart.
    assert entries.pow(4).mean() / variance**2 == pytest.approx(kurtosis, rel=0.25)


def test_uniform_is_torchs_kaiming_uniform():
    reference = torch.empty(64, 1000)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    ours = draw(64)
    bound = 1 / math.sqrt(1000)
    assert reference.abs().max() <= bound
    assert 0.999 * bound < ours.abs().max() <= bound


@pytest.mark.parametrize("rank", [4, 64])
def test_rank_corrected_is_kaiming_over_the_root_of_the_rank(rank):
    torch.testing.assert_close(draw(rank, "rank_corrected"), draw(rank) / math.sqrt(rank))


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
@pytest.mark.parametrize("width", [7, 16, 33])
def test_draws_are_nested_in_the_rank(init, width):
    assert torch.equal(draw(4, init, width=width), draw(16, init, width=width)[:4])


def test_draws_of_different_modules_are_unrelated():
    first, second = draw(64, name="layers.0.q_proj"), draw(64, name="layers.1.q_proj")
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(first.numel())


def test_rows_of_a_module_are_unrelated():
    correlation = torch.corrcoef(draw(64)) - torch.eye(64)
    assert correlation.abs().max() < 6 / math.sqrt(1000)


def test_draws_do_not_depend_on_the_order_of_the_modules():
    def adapters(names):
        model = nn.ModuleDict({name: nn.Linear(IN, OUT + i) for i, name in enumerate(names)})
        inject_adapters(model, AdapterSpec(rank=RANK))
        return {path: layer.lora_a for path, layer in adapter_layers(model)}

    forth, back, alone = adapters("abc"), adapters("cba"), adapters("b")
    assert all(torch.equal(forth[name], back[name]) for name in "abc")
    assert torch.equal(forth["b"], alone["b"])


def test_draws_depend_on_the_seed_and_not_on_what_was_drawn_before():
    torch.manual_seed(1)
    first = draw(RANK)
    torch.rand(17)
    assert torch.equal(draw(RANK), first)
    torch.manual_seed(2)
    assert not torch.equal(draw(RANK), first)
    torch.manual_seed(1)
    assert torch.equal(draw(RANK), first)


def test_drawing_does_not_advance_the_global_stream():
    layer = make_layer()
    before = torch.get_rng_state()
    layer.reset_adapter("name")
    layer.reset_adapter("name", "gaussian")
    LoRALinear(layer.base, ADAPTER)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_do_not_depend_on_the_default_dtype():
    layer = make_layer()
    layer.reset_adapter("name")
    expected = layer.lora_a.detach().clone()
    torch.set_default_dtype(torch.float64)
    try:
        layer.reset_adapter("name")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(layer.lora_a, expected)


@pytest.mark.parametrize("base", BASES)
def test_autocast_with_a_bfloat16_base_and_float32_adapters(base):
    layer = make_layer(base, torch.bfloat16)
    x = torch.randn(BATCH, TOKENS, IN)
    weights = torch.randn(BATCH, TOKENS, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (y.float() * weights).sum().backward()

    exact = [t.detach().double().requires_grad_() for t in (layer.lora_a, layer.lora_b)]
    truth = dense_forward(layer, x.double(), *exact)
    (truth * weights.double()).sum().backward()
    error = (y.double() - truth).abs() / sum_of_magnitudes(layer, x)
    assert error.max() < 4 * torch.finfo(torch.bfloat16).eps
    for ours, reference in zip((layer.lora_a, layer.lora_b), exact, strict=True):
        assert ours.grad.dtype == torch.float32
        difference = (ours.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert difference < 2 * torch.finfo(torch.bfloat16).eps
    assert layer.base.weight.grad is None


# What a base does beyond `W x + b`


def adapter_alone(layer, x):
    return GAMMA * x @ layer.lora_a.T @ layer.lora_b.T


@pytest.mark.parametrize("base", BASES)
def test_hooks_of_the_base_act(base):
    layer = make_layer(base)
    x = torch.randn(BATCH, TOKENS, IN)
    plain = layer.base(x)
    assert layer.has_whole_weight()
    handle = layer.base.register_forward_hook(lambda module, inputs, y: 3 * y)
    assert not layer.has_whole_weight()
    torch.testing.assert_close(layer(x), 3 * plain + adapter_alone(layer, x))
    handle.remove()
    assert layer.has_whole_weight()
    handle = layer.base.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    torch.testing.assert_close(layer(x), layer.base(x) + adapter_alone(layer, x))
    assert not torch.allclose(layer.base(x), plain)
    handle.remove()
    torch.testing.assert_close(layer(x), plain + adapter_alone(layer, x))


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_base_are_called(hook):
    layer = make_layer()
    x = torch.randn(BATCH, TOKENS, IN, requires_grad=True)
    calls = []
    getattr(layer.base, hook)(lambda module, *gradients: calls.append(gradients[-1][0]))
    layer(x).sum().backward()
    (gradient,) = calls
    torch.testing.assert_close(gradient, torch.ones(BATCH, TOKENS, OUT))


def test_a_forward_put_on_the_base_acts():
    layer = make_layer()
    x = torch.randn(BATCH, TOKENS, IN)
    forward = layer.base.forward
    layer.base.forward = lambda x: 3 * forward(x)
    torch.testing.assert_close(layer(x), 3 * forward(x) + adapter_alone(layer, x))


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_subclass_of_linear_is_called():
    layer = LoRALinear(Halved(IN, OUT).requires_grad_(False), ADAPTER)
    nn.init.normal_(layer.lora_a)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(BATCH, TOKENS, IN)
    exact = F.linear(x, layer.weight, layer.bias) / 2 + adapter_alone(layer, x)
    torch.testing.assert_close(layer(x), exact)


@pytest.mark.parametrize("trained", ["weight", "bias", "weight and bias"])
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_a_trained_base_gets_its_gradients(base, trained):
    layer = make_layer(base)
    names = trained.split(" and ")
    for name in names:
        getattr(layer.base, name).requires_grad_()
    x = torch.randn(BATCH, TOKENS, IN)
    weights = torch.randn(BATCH, TOKENS, OUT)
    (layer(x) * weights).sum().backward()
    gradient = torch.einsum("bto,bti->oi", weights, x)
    exact = {"weight": gradient.T if base == "conv1d" else gradient, "bias": weights.sum((0, 1))}
    for name, value in exact.items():
        if name in names:
            torch.testing.assert_close(getattr(layer.base, name).grad, value)
        else:
            assert getattr(layer.base, name).grad is None
    down = x @ layer.lora_a.T
    torch.testing.assert_close(
        layer.lora_b.grad, GAMMA * torch.einsum("bto,btr->or", weights, down)
    )


@pytest.mark.parametrize("shape", [(BATCH * TOKENS, IN), (BATCH, TOKENS, IN), (IN,)])
def test_the_output_may_be_changed_in_place(shape):
    layer = make_layer()
    x = torch.randn(shape)
    output, seen = layer(x), []
    output.register_hook(seen.append)
    torch.relu_(output).square().sum().backward()
    found = layer.lora_b.grad
    y = layer.base(x) + adapter_alone(layer, x)
    exact = torch.autograd.grad(torch.relu(y).square().sum(), (y, layer.lora_b))
    # Hooks of before are kept.
    torch.testing.assert_close((*seen, found), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_a_merged_layer_is_its_base(base):
    layer = make_layer(base)
    x = torch.randn(BATCH, TOKENS, IN)
    before = layer(x)
    merge_adapters(layer)
    assert layer.merged
    assert torch.equal(layer(x), layer.base(x))
    torch.testing.assert_close(layer(x), before)
    unmerge_adapters(layer)
    assert torch.equal(layer(x), before)


def test_shapes_of_a_layer_without_data():
    layer = make_layer("linear").to("meta")
    y = layer(torch.empty(BATCH, TOKENS, IN, device="meta"))
    y.sum().backward()
    assert y.shape == (BATCH, TOKENS, OUT)
    assert layer.lora_a.grad.shape == (RANK, IN)
