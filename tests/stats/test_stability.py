import copy
import math

import numpy as np
import pytest
import torch

from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.scaling import RANK_EXPONENT
from rslightning.rslora.spec import AdapterSpec
from rslightning.stats.stability import (
    FLAT,
    MATMUL,
    Float32Compute,
    RankPoint,
    Slopes,
    Step,
    Theory,
    describe_stability,
    fit_slopes,
    log_log_slope,
    predict_slopes,
    root_mean_square,
    verdict,
)

RANKS = [4, 32, 256, 1000]
STEP = Step("AdamW", 5e-5)
IDS = torch.tensor([[3, 7, 11, 5, 2], [19, 23, 8, 13, 42]])


@pytest.mark.parametrize("slope", [-1.5, 0.0, 0.5])
def test_the_slope_of_a_power_law_is_its_exponent(slope):
    assert log_log_slope(RANKS, [3.7 * r**slope for r in RANKS]) == pytest.approx(slope, abs=1e-12)


def test_the_slope_is_that_of_least_squares():
    values = [0.31, 2.9, 1.7, 8.8]
    expected = np.polyfit(np.log(RANKS), np.log(values), 1)[0]
    assert log_log_slope(RANKS, values) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("ranks", "values"),
    [
        ([4, 8], [1.0, 0.0]),
        ([4, 8], [math.inf, 1.0]),
        ([4, 8], [1.0, math.nan]),
        ([8, 8], [1.0, 2.0]),
        ([8], [1.0]),
    ],
)
def test_no_slope_where_none_is_defined(ranks, values):
    assert math.isnan(log_log_slope(ranks, values))


def test_the_theory():
    found = {scaling: predict_slopes(p) for scaling, p in RANK_EXPONENT.items()}
    assert found == {  # as DESIGN and the paper say, longhand
        "lora": Theory(-0.5, -1.0, 0.0),
        "rslora": Theory(0.0, 0.0, 0.5),
        "quarter_root": Theory(0.25, 0.5, 0.75),
        "inverse_square": Theory(-1.5, -3.0, -1.0),
        "unit": Theory(0.5, 1.0, 1.0),
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("scaling", RANK_EXPONENT)
def test_the_theory_holds_on_one_linear_map(scaling, optimizer):
    """The formulas of the docstring, computed in numpy: no layer and no optimizer of torch."""
    draw = np.random.default_rng(0)
    a, x, g = draw.uniform(-1, 1, (4096, 17)), draw.normal(size=17), draw.normal(size=13)
    points = []
    for rank in (64, 512, 4096):
        gamma = rank ** -RANK_EXPONENT[scaling]
        down = a[:rank] @ x
        gradient = gamma * np.outer(g, down)
        step = gradient if optimizer == "sgd" else np.sign(gradient)
        change = gamma * step @ down
        points.append((rank, np.linalg.norm(gradient), np.linalg.norm(change)))
    ranks, norms, changes = zip(*points, strict=True)
    theory = predict_slopes(RANK_EXPONENT[scaling])
    assert log_log_slope(ranks, norms) == pytest.approx(theory.gradient_norm, abs=0.03)
    predicted = getattr(theory, f"output_change_{optimizer}")
    assert log_log_slope(ranks, changes) == pytest.approx(predicted, abs=0.03)


def points_of(scaling, gradient_slope, output_slope):
    return [RankPoint(scaling, r, 2 * r**gradient_slope, 5 * r**output_slope) for r in RANKS]


def test_each_scaling_has_its_own_slopes():
    points = points_of("lora", -0.5, 0.07) + points_of("rslora", 0.02, 0.5)
    first, second = fit_slopes(points, {"rslora": 0.5, "lora": 1.0})
    assert (first.scaling, second.scaling) == ("rslora", "lora")
    assert first.gradient_norm == pytest.approx(0.02)
    assert first.output_change == pytest.approx(0.5)
    assert second.gradient_norm == pytest.approx(-0.5)
    assert second.output_change == pytest.approx(0.07)
    assert (first.theory, second.theory) == (predict_slopes(0.5), predict_slopes(1.0))
    assert (first.is_flat, second.is_flat) == (False, True)


def slopes_of(**output_changes):
    return [Slopes(name, 0.0, x, predict_slopes(1.0)) for name, x in output_changes.items()]


@pytest.mark.parametrize(
    ("slopes", "sentence"),
    [
        (
            {"lora": -0.02, "rslora": 0.47},
            "lora (slope -0.02) keeps the output's change constant over the rank; rslora (slope "
            "+0.47) does not.",
        ),
        (
            {"lora": -0.99, "rslora": -FLAT},
            "lora (slope -0.99) and rslora (slope -0.10) do not keep the output's change constant "
            "over the rank.",
        ),
        (
            {"lora": 0.01, "rslora": 0.09},
            "lora (slope +0.01) and rslora (slope +0.09) keep the output's change constant over "
            "the rank.",
        ),
        (
            {"unit": 0.7},
            "unit (slope +0.70) does not keep the output's change constant over the rank.",
        ),
        (
            {"lora": math.nan, "rslora": 0.0},
            "rslora (slope +0.00) keeps the output's change constant over the rank; nothing can be "
            "said of lora, whose change is zero or not finite.",
        ),
    ],
)
def test_verdict(slopes, sentence):
    assert verdict(slopes_of(**slopes), STEP) == f"With AdamW at learning rate 5e-05, {sentence}"


def test_the_report_holds_every_number():
    points = points_of("lora", -0.5, 0.03) + points_of("rslora", 0.02, 0.46)
    slopes = fit_slopes(points, {"lora": 1.0, "rslora": 0.5})
    step = Step("Adafactor", 1e-3, "gradients clipped by norm at 1")
    lines = describe_stability(points, slopes, step).splitlines()
    assert lines[0] == (
        "Rank stability of the first step: Adafactor at learning rate 0.001, gradients clipped by "
        "norm at 1."
    )
    table = [line.split() for line in lines]
    for p in points:
        norm, change = f"{p.gradient_norm:.4e}", f"{p.output_change:.4e}"
        assert [p.scaling, str(p.rank), norm, change] in table
    assert ["lora", "gradient", "norm", "-0.50", "-0.50", "-0.50"] in table
    assert ["lora", "output", "change", "+0.03", "-1.00", "+0.00"] in table
    assert ["rslora", "gradient", "norm", "+0.02", "+0.00", "+0.00"] in table
    assert ["rslora", "output", "change", "+0.46", "+0.00", "+0.50"] in table
    assert verdict(slopes, step) in lines
    assert max(map(len, lines)) < 200


def test_root_mean_square():
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert root_mean_square(values) == pytest.approx(math.sqrt(np.mean(values.numpy() ** 2.0)))
    assert root_mean_square(values[:0]) == 0.0


def adapted(model):
    inject_adapters(model, AdapterSpec(rank=3))
    for _, layer in adapter_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_float32_compute_is_a_float32_copy(make_llama, make_gpt2, family, dtype):
    base = make_llama(53) if family == "llama" else make_gpt2()
    model = adapted(base.to(dtype)).eval()
    wide = copy.deepcopy(model).float()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    own = model(input_ids=IDS).logits
    with Float32Compute():
        logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, wide(input_ids=IDS).logits)
    assert torch.equal(own.float(), logits) == (dtype == torch.float32)
    assert torch.equal(model(input_ids=IDS).logits, own)  # outside, all is as it was
    for name, p in model.named_parameters():
        assert (id(p), p.dtype) == (before[name][0], before[name][1].dtype)
        assert torch.equal(p, before[name][1])


def test_float32_compute_reads_properties_where_they_are():
    tensor = torch.zeros(3, 5, dtype=torch.bfloat16)
    with Float32Compute():
        assert tensor.dtype == torch.float32
        inside = tensor.data
        assert torch.cat([tensor, tensor]).dtype == torch.float32
        assert torch.zeros(2, dtype=torch.float16).dtype == torch.float32
        assert torch.zeros(2, dtype=torch.int64).dtype == torch.int64
    assert tensor.dtype == torch.bfloat16
    assert inside.data_ptr() == tensor.data_ptr()  # no copy to read a property


def test_float32_compute_uses_and_restores_exact_products():
    kept = [backend.fp32_precision for backend in MATMUL]
    try:
        MATMUL[0].fp32_precision, MATMUL[1].fp32_precision = "tf32", "bf16"
        a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
        with Float32Compute():
            assert [backend.fp32_precision for backend in MATMUL] == ["ieee", "ieee"]
            assert (a @ b - (a.double() @ b.double())).abs().max() < 1e-4
        assert [backend.fp32_precision for backend in MATMUL] == ["tf32", "bf16"]
        with pytest.raises(RuntimeError), Float32Compute():
            a @ b[:3]
        assert [backend.fp32_precision for backend in MATMUL] == ["tf32", "bf16"]
    finally:
        for backend, precision in zip(MATMUL, kept, strict=True):
            backend.fp32_precision = precision
