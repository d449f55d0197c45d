import copy
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn, optim
from torch.optim import lr_scheduler

from rslightning.errors import UserError
from rslightning.optimizer import (
    build_optimizer,
    build_schedule,
    prefer_fused,
    refuse_parts,
)

SHAPES = [(5, 7), (11,), (3, 13)]
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def flags(optimizer):
    return [group["fused"] for group in optimizer.param_groups]


def train(optimizer, steps=4, seed=1):
    """Step on gradients from a seed; return the weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in weights]


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Adam])
def test_the_kernel_makes_the_steps_of_the_loop_in_float64(kind, monkeypatch):
    exact = train(kind(parameters(torch.float64), foreach=False, **SETTINGS))
    optimizer = kind(parameters(), **SETTINGS)
    prefer_fused(optimizer)
    calls = []
    name = "_fused_adamw_" if kind is optim.AdamW else "_fused_adam_"
    kernel = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *a, **k: calls.append(name) or kernel(*a, **k))
    for weight, truth in zip(train(optimizer), exact, strict=True):
        torch.testing.assert_close(weight.double(), truth, rtol=3e-6, atol=1e-7)
    assert len(calls) == 4  # the kernel it was, once per step
    moved = [(w - p.detach()).abs().max() for w, p in zip(exact, parameters(), strict=True)]
    assert min(moved) > 0.01


def test_state_is_float32_on_the_weights_device():
    optimizer = optim.AdamW(parameters())
    prefer_fused(optimizer)
    train(optimizer)
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert {m.dtype for m in moments} == {torch.float32}
    assert [m.shape for m in moments[::2]] == [torch.Size(shape) for shape in SHAPES]


@pytest.mark.parametrize(
    "chosen",
    [{"fused": False}, {"fused": True}, {"foreach": True}, {"foreach": False}],
)
def test_what_the_user_chose_stays(chosen):
    optimizer = optim.AdamW(parameters(), **chosen)
    before = copy.deepcopy(optimizer.state_dict())
    prefer_fused(optimizer)
    assert optimizer.state_dict() == before


def test_each_group_is_decided_alone():
    first, second, third = parameters()
    meta = nn.Parameter(torch.empty(3, 13, device="meta"))
    groups = [{"params": [first]}, {"params": [second], "fused": False}, {"params": [third, meta]}]
    optimizer = optim.AdamW(groups)
    prefer_fused(optimizer)
    assert flags(optimizer) == [True, False, None]


def test_a_parameter_of_another_class_is_left_alone():
    class Sharded(nn.Parameter):
        pass

    optimizer = optim.AdamW([Sharded(torch.zeros(3))])
    prefer_fused(optimizer)
    assert flags(optimizer) == [None]


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adafactor, optim.NAdam, optim.Adagrad])
def test_other_optimizers_are_left_alone(kind):
    optimizer = kind(parameters(), lr=1e-2)
    before = copy.deepcopy(optimizer.state_dict())
    prefer_fused(optimizer)
    assert str(optimizer.state_dict()) == str(before)


def test_a_run_that_began_without_the_kernel_goes_on_without_it():
    old = optim.AdamW(parameters(), **SETTINGS)
    train(old, steps=2)
    weights = [p.detach().clone() for p in old.param_groups[0]["params"]]
    saved = copy.deepcopy(old.state_dict())
    resumed = optim.AdamW([nn.Parameter(w) for w in weights], **SETTINGS)
    prefer_fused(resumed)
    assert flags(resumed) == [True]
    resumed.load_state_dict(saved)
    assert flags(resumed) == [None]
    for ours, truth in zip(train(resumed, seed=2), train(old, seed=2), strict=True):
        assert torch.equal(ours, truth)


def test_float16_scaling_and_clipping_still_fit_together():
    """Lightning refuses to clip where the optimizer unscales by itself."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    scaled = optim.AdamW(parameters(), **SETTINGS)
    prefer_fused(scaled)
    plain = optim.AdamW(parameters(), foreach=False, **SETTINGS)
    for optimizer, factor in ((plain, 1.0), (scaled, 128.0)):
        generator = torch.Generator().manual_seed(1)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = factor * torch.randn(p.shape, generator=generator)
    scaler.scale(torch.ones(()))  # as a backward pass would, it starts the scaler
    scaler.unscale_(scaled)
    plugin.clip_gradients(scaled, 0.5)
    torch.nn.utils.clip_grad_norm_(plain.param_groups[0]["params"], 0.5)
    scaler.step(scaled)
    plain.step()
    ours, truth = (o.param_groups[0]["params"] for o in (scaled, plain))
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-7)


def fit(make_trainer, module, data, **options):
    torch.manual_seed(7)
    trainer = make_trainer(**({"max_steps": 3, "limit_val_batches": 0} | options))
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize(("chosen", "expected"), [({}, True), ({"fused": False}, False)])
def test_a_fit_takes_the_kernel_unless_told_not_to(
    chosen, expected, make_trainer, make_module, make_data
):
    module = make_module(optimizer=partial(optim.AdamW, lr=1e-2, **chosen))
    trainer = fit(make_trainer, module, make_data())
    (optimizer,) = trainer.optimizers
    assert flags(optimizer) == [expected]
    moments = [s["exp_avg"] for s in optimizer.state.values()]
    assert len(moments) == 28
    assert {m.dtype for m in moments} == {torch.float32}


def test_the_adapters_of_a_bfloat16_base_have_float32_state(make_trainer, make_module, make_data):
    module = make_module(dtype="bfloat16")
    trainer = fit(make_trainer, module, make_data(), precision="bf16-mixed")
    assert module.model.dtype == torch.bfloat16
    states = trainer.optimizers[0].state.values()
    assert {s[name].dtype for s in states for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_an_8_bit_optimizer_trains_and_resumes(
    name, make_trainer, make_module, make_data, tmp_path
):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    make = partial(getattr(bitsandbytes.optim, name), lr=1e-2, min_8bit_size=100, weight_decay=0.0)
    module = make_module(optimizer=make)
    with warnings.catch_warnings():  # pages are a matter of GPUs
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        trainer = fit(make_trainer, module, make_data())
        state = trainer.optimizers[0].state
        kinds = {(p.numel() >= 100, s["state1"].dtype) for p, s in state.items()}
        # Small tensors keep a state of 32 bits.
        assert kinds == {(True, torch.uint8), (False, torch.float32)}
        half = make_module(optimizer=make)
        fit(make_trainer, half, make_data(), max_steps=2).save_checkpoint(tmp_path / "two.ckpt")
        again = make_module(optimizer=make)
        make_trainer(max_steps=3, limit_val_batches=0).fit(
            again, make_data(), ckpt_path=tmp_path / "two.ckpt"
        )
    truth = module.trainable_state()
    for path, tensor in again.trainable_state().items():
        assert torch.equal(tensor, truth[path]), path
    exact = make_module(optimizer=partial(optim.AdamW, lr=1e-2, weight_decay=0.0))
    fit(make_trainer, exact, make_data())
    distance = sum(float((t - truth[n]).norm() ** 2) for n, t in exact.trainable_state().items())
    size = sum(float(t.norm() ** 2) for t in exact.trainable_state().values())
    assert 0 < (distance / size) ** 0.5 < 0.05


def test_the_command_line_chooses(model_folder, orca_folder, tmp_path, monkeypatch):
    """`fused: false` in YAML, and an optimizer of bitsandbytes by its class path."""
    from rslightning.cli import RecipeCLI

    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    monkeypatch.chdir(tmp_path)
    found = []
    for name in ("torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit"):
        options = ["--model.optimizer.init_args.fused=false"] if name.startswith("torch") else []
        cli = RecipeCLI(
            [
                f"--model.base_model={model_folder}",
                "--model.adapter.rank=3",
                f"--model.optimizer={name}",
                "--model.optimizer.init_args.lr=0.01",
                *options,
                "--data=rslightning.data.OpenOrca",
                f"--data.path={orca_folder}",
            ],
            run=False,
        )
        cli.model.configure_model()
        optimizer = cli.model.configure_optimizers()
        found.append((type(optimizer).__name__, optimizer.param_groups[0].get("fused")))
    assert found == [("AdamW", False), ("AdamW8bit", None)]


def test_adafactor_is_refused_where_it_gets_parts():
    adafactor = optim.Adafactor(parameters())
    with pytest.raises(
        UserError, match=r"^Adafactor looks at whole matrices, and ModelParallelStr"
    ):
        refuse_parts(adafactor, ModelParallelStrategy())
    refuse_parts(adafactor, DDPStrategy())
    refuse_parts(optim.AdamW(parameters()), ModelParallelStrategy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(optim.AdamW, lr=-1.0), "Invalid learning rate: -1.0"),
        (partial(optim.AdamW, betas=(0.9, 2)), "Invalid beta parameter at index 1: 2"),
        (partial(optim.AdamW, betas=3), "TypeError: "),
        (optim.SparseAdam, "SparseAdam is for sparse gradients; take Adam."),
    ],
)
def test_what_an_optimizer_says_of_its_arguments_is_told(make, message):
    with pytest.raises(UserError) as caught:
        build_optimizer(make, parameters())
    assert str(caught.value).startswith(f"model.optimizer: {message}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(lr_scheduler.LinearLR, start_factor=0.0), "Starting multiplicative factor "),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=0), "ZeroDivisionError: "),
        (partial(lr_scheduler.StepLR, step_size=0), "ZeroDivisionError: "),
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=0), "Expected positive integer"),
        (
            lr_scheduler.ReduceLROnPlateau,
            "ReduceLROnPlateau waits for a metric, which is not supported.",
        ),
        (
            partial(ReduceLROnPlateau, monitor="val/loss"),
            "ReduceLROnPlateau waits for a metric, which is not supported.",
        ),
    ],
)
def test_what_a_schedule_says_of_its_arguments_is_told(make, message):
    with pytest.raises(UserError) as caught:
        build_schedule(make, optim.AdamW(parameters()))
    assert str(caught.value).startswith(f"model.lr_scheduler: {message}")


@pytest.mark.parametrize(
    "kind",
    [
        optim.AdamW,
        lambda trained: optim.AdamW(trained, lr=torch.tensor(0.1)),  # is changed in place
        partial(optim.SGD, momentum=0.5),
        optim.Adafactor,
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        partial(lr_scheduler.LinearLR, total_iters=3),
        partial(lr_scheduler.CosineAnnealingLR, T_max=5),
        partial(lr_scheduler.StepLR, step_size=2),
        partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=5, cycle_momentum=False),
    ],
)
def test_a_schedule_that_was_tried_is_that_which_was_not(kind, make):
    def rates(build):
        optimizer = build_optimizer(kind, parameters())
        schedule, found = build(make, optimizer), []
        for _ in range(5):
            train(optimizer, steps=1)
            found.append(
                [copy.deepcopy(dict(group, params=None)) for group in optimizer.param_groups]
            )
            schedule.step()
        return found

    assert rates(build_schedule) == rates(lambda make, optimizer: make(optimizer))
