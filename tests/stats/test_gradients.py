"""Squared norms against float64, and the choice of what is read."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rslightning.rslora import AdapterSpec, inject_adapters
from rslightning.stats.distributed import read_deepspeed_squares, read_squares
from rslightning.stats.gradients import (
    GradientSource,
    gradient_sources,
    squared_norms,
    summarize,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_norms_are_exact_in_every_dtype(dtype):
    torch.manual_seed(0)
    shapes = [(3,), (7, 5), (1_000_003,)]
    gradients = [torch.randn(shape).to(dtype) for shape in shapes]
    expected = [gradient.double().norm().item() for gradient in gradients]
    squares = squared_norms(gradients, CPU)
    assert squares.sqrt().tolist() == pytest.approx(expected, rel=1e-7)


def test_gradients_of_several_dtypes_stay_in_order():
    ones = torch.ones(3)
    entries = [[0, 0, 2]], [1.0, 2.0, 4.0]  # the first is 1 + 2
    sparse = torch.sparse_coo_tensor(*entries, (5,), check_invariants=True)
    gradients = [None, ones.half() * 2, ones, torch.empty(0, 4), sparse, ones.half(), None]
    expected = [0, 12, 3, 0, 25, 3, 0]
    assert squared_norms(gradients, CPU).tolist() == pytest.approx(expected, rel=1e-12)


def test_no_gradient_at_all_is_zero():
    assert squared_norms([None, None], CPU).tolist() == [0, 0]


def test_infinite_gradients_are_not_hidden():
    squares = squared_norms([torch.tensor([1.0, math.inf]), torch.tensor([math.nan])], CPU)
    norms = summarize([GradientSource("", "other", nn.Parameter())] * 2, squares.tolist())
    assert squares[0] == math.inf
    assert math.isnan(norms["mean"])
    assert math.isnan(norms["total"])


def test_the_summary():
    p = nn.Parameter()
    sources = [GradientSource(*where, p) for where in (("x.y", "a"), ("x.y", "b"), ("", "other"))]
    norms = summarize(sources, [9.0, 16.0, 144.0], per_layer=True)
    assert norms == {"mean": 19 / 3, "total": 13, "a": 3, "b": 4, "x.y": 5, "layer": 12}
    assert set(summarize(sources, [1.0, 1.0, 1.0])) == {"mean", "total", "a", "b"}


def test_a_layer_named_like_a_summary_does_not_hide_it():
    source = GradientSource("total", "other", nn.Parameter())
    norms = summarize([source, GradientSource("x", "other", nn.Parameter())], [9.0, 16.0], True)
    assert norms == {"mean": 3.5, "total": 5, "layer.total": 3, "x": 4}


def paths_of(sources):
    return [(source.layer, source.kind) for source in sources]


def test_our_adapters(tiny_llama):
    report = inject_adapters(tiny_llama, AdapterSpec(rank=3, targets=["q_proj", "down_proj"]))
    sources = gradient_sources(tiny_llama)
    layers = ["self_attn.q_proj", "mlp.down_proj"]
    expected = [
        (f"model.layers.{i}.{layer}", k) for i in range(2) for layer in layers for k in "ab"
    ]
    assert paths_of(sources) == expected
    assert len(sources) == 2 * len(report.modules)
    assert {source.parameter.shape[0] for source in sources if source.kind == "a"} == {3}


def test_frozen_matrices_are_left_out(tiny_llama):
    inject_adapters(tiny_llama, AdapterSpec(rank=3, targets=["q_proj"]))
    for name, parameter in tiny_llama.named_parameters():
        parameter.requires_grad_(name.endswith("lora_b"))
    assert [source.kind for source in gradient_sources(tiny_llama)] == ["b", "b"]


def peft_model(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, use_rslora=True, target_modules=["q_proj"], **options)
    return peft.get_peft_model(model, config)


def test_peft_adapters(tiny_llama):
    model = peft_model(tiny_llama)
    sources = gradient_sources(model)
    path = "base_model.model.model.layers.{}.self_attn.q_proj"
    assert paths_of(sources) == [(path.format(i), kind) for i in range(2) for kind in "ab"]
    shapes = {kind: {tuple(s.parameter.shape) for s in sources if s.kind == kind} for kind in "ab"}
    assert shapes == {"a": {(3, 24)}, "b": {(24, 3)}}


def test_only_the_active_peft_adapter(tiny_llama):
    model = peft_model(tiny_llama)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    active = {p for name, p in model.named_parameters() if "second" in name}
    assert {source.parameter for source in gradient_sources(model)} == active
    assert len(active) == 4


def test_dora_counts_in_the_total_only(tiny_llama):
    sources = gradient_sources(peft_model(tiny_llama, use_dora=True))
    assert [source.kind for source in sources] == ["a", "b", "other"] * 2


def test_embedding_adapters(tiny_llama):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=3, target_modules=["embed_tokens"]))
    sources = gradient_sources(model)
    assert [(source.kind, tuple(source.parameter.shape)) for source in sources] == [
        ("a", (3, 53)),
        ("b", (24, 3)),
    ]


def test_a_plain_model_is_read_whole():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    model.exploratory_layer = nn.Linear(2, 5)  # "lora" in a name makes no adapter
    model[1].requires_grad_(False)
    assert (
        paths_of(gradient_sources(model))
        == [("0", "other")] * 2 + [("exploratory_layer", "other")] * 2
    )


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert len(gradient_sources(model)) == 1


def test_a_choice_without_adapters_is_read_whole(tiny_llama):
    inject_adapters(tiny_llama, AdapterSpec(rank=3, targets=["q_proj"]))
    head = tiny_llama.lm_head.requires_grad_(True)
    first = next(s.parameter for s in gradient_sources(tiny_llama))
    assert paths_of(gradient_sources(tiny_llama, [head.weight, first])) == [
        ("model.layers.0.self_attn.q_proj", "a")
    ]
    assert paths_of(gradient_sources(tiny_llama, [head.weight])) == [("lm_head", "other")]


def test_shards_copies_and_partial_sums(run_processes):
    """Two processes, one DTensor of each placement: every entry counts once."""
    from torch import distributed
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    def parameter(whole, placement, mesh, gradient=None):
        made = nn.Parameter(distribute_tensor(whole, mesh, [placement]))
        made.grad = distribute_tensor(whole, mesh, [placement]) if gradient is None else gradient
        return made

    def rank(number):
        distributed.init_process_group("gloo", rank=number, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        whole = torch.arange(15.0).reshape(3, 5)
        part = DTensor.from_local(whole * (0.25, 0.75)[number], mesh, [Partial()])
        one_row = torch.ones(1, 4)  # the second process holds nothing of it
        parameters = [
            parameter(whole, Shard(0), mesh),
            parameter(whole, Shard(1), mesh),
            parameter(whole, Replicate(), mesh),
            parameter(whole, Replicate(), mesh, gradient=part),
            parameter(one_row, Shard(0), mesh),
            nn.Parameter(torch.ones(2)),
        ]
        parameters[-1].grad = torch.ones(2)
        squares = read_squares(parameters, CPU).tolist()
        expected = whole.square().sum().item()
        assert squares == pytest.approx([expected] * 4 + [4.0, 2.0], rel=1e-12)
        distributed.destroy_process_group()

    assert run_processes(2, rank) == [0, 0]


@pytest.mark.parametrize(
    ("owner", "optimizer"),
    [
        ({}, {"loss_scale": 8.0}),
        (
            {},
            {"loss_scale": 1.0, "torch_autocast_gradscaler": SimpleNamespace(get_scale=lambda: 8)},
        ),
        ({"torch_autocast_z0_gradscaler": SimpleNamespace(get_scale=lambda: 8)}, {}),
    ],
)
def test_deepspeed_loss_scale_is_divided_out(owner, optimizer):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 8.0)
    engine = SimpleNamespace(
        zero_optimization_stage=lambda: 1, optimizer=SimpleNamespace(**optimizer), **owner
    )
    squares = read_deepspeed_squares(engine, [parameter, parameter], CPU)
    assert squares.tolist() == pytest.approx([3.0, 3.0], rel=1e-12)


@pytest.mark.parametrize("scale", [None, 1.0])  # DeepSpeed has none in some modes
def test_deepspeed_without_a_loss_scale(scale):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = SimpleNamespace(loss_scale=scale)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2, optimizer=optimizer)
    squares = read_deepspeed_squares(engine, [parameter], CPU)
    assert squares.tolist() == pytest.approx([3.0], rel=1e-12)
