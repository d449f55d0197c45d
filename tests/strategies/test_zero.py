"""DeepSpeed under Lightning: what ours puts right, and what both refuse."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from strategy_fits import (
    CLIP,
    Fit,
    ignoring_deepspeed,
    make_fit_data,
    make_fit_module,
    make_fit_trainer,
    matrices,
    scalar_deviation,
)

from rslightning.errors import UserError

cpu = pytest.importorskip("deepspeed_cpu")

WHOLE = Fit(save_every=5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_engine_clips_at_the_trainers_value_and_steps_in_the_trainers_steps(run, stage):
    facts = run(WHOLE.under(f"zero{stage}")).facts()
    assert facts["engine_clip"] == CLIP
    assert facts["engine_steps"] == facts["global_step"] == 10


def test_lightning_alone_halves_the_gradient_of_two_micro_batches(run):
    """Lightning divides the loss by the number of micro-batches, and DeepSpeed does again."""
    fit = Fit(steps=1, merge=None)
    single = run(fit).scalars["grad_norm/total"][0]
    ours = run(fit.under("zero2")).scalars["grad_norm/total"][0]
    theirs = run(fit.under("upstream2")).scalars["grad_norm/total"][0]
    assert ours == pytest.approx(single, rel=1e-5)
    assert theirs == pytest.approx(single / 2, rel=1e-5), (
        "Lightning divides the loss once now: delete ZeroStrategy.backward, the first point of its "
        "docstring, OnceScaledDeepSpeedPrecision in tests/deepspeed_cpu.py, and this test."
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_masters_are_written(run, stage):
    # The weights beside them are rounded to bfloat16.
    fit = Fit(steps=3, precision="bf16-mixed", save_every=3, options=(("dtype", "bfloat16"),))
    left = run(fit.under(f"zero{stage}"))
    masters, written = matrices(left.checkpoint()), matrices(left.folder / "adapter")
    assert written.keys() == masters.keys()
    for name, master in masters.items():
        assert torch.equal(written[name], master)
        assert not torch.equal(master, master.bfloat16().float())
    truth = run(fit)
    assert scalar_deviation(left, truth, "train/loss") < 0.01


# --- refusals -------------------------------------------------------------------------------------


def test_a_layout_of_gradients_that_deepspeed_reads_wrongly():
    with pytest.raises(UserError) as caught:
        cpu.CPUZeroStrategy(config={"zero_optimization": {"round_robin_gradients": True}})
    assert str(caught.value) == (
        "round_robin_gradients is not supported: leave it out of the config."
    )


def test_clipping_by_value(fork, places, tmp_path):
    fit = replace(Fit(steps=1, merge=None), strategy="zero2")

    def rank(_):
        trainer = make_fit_trainer(fit, tmp_path, [], gradient_clip_algorithm="value")
        with ignoring_deepspeed(fit), pytest.raises(MisconfigurationException) as caught:
            trainer.fit(make_fit_module(fit, places), make_fit_data(fit, places))
        assert str(caught.value) == "DeepSpeed does not support clipping gradients by value."

    assert fork(1, rank) == [0]


@pytest.fixture
def refusal(monkeypatch):
    """Return a function that says how a run of so many processes refuses a checkpoint."""

    def message(path, stage, processes):
        monkeypatch.setattr(cpu.CPUZeroStrategy, "world_size", processes)
        with pytest.raises(UserError) as caught:
            cpu.CPUZeroStrategy(stage=stage).load_checkpoint(path)
        return str(caught.value)

    return message


def test_a_file(run, refusal):
    path = run(WHOLE.under("fsdp2")).checkpoint()
    assert refusal(path, 2, 2) == (
        f"{path} was not written by DeepSpeed: take the strategy that wrote it, or begin anew from "
        f"its adapters with --model.start_from {path}."
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_a_folder_of_other_processes(run, refusal, stage):
    path = run(WHOLE.under(f"zero{stage}")).checkpoint()
    assert refusal(path, stage, 5) == (
        f"{path} was written by 2 processes, and DeepSpeed goes on with as many, not with 5: "
        f"start 2, or begin anew from its adapters with --model.start_from {path}."
    )


@pytest.mark.parametrize(("wrote", "now"), [(1, 3), (2, 3), (3, 2), (3, 1)])
def test_a_folder_of_another_stage(run, refusal, wrote, now):
    path = run(WHOLE.under(f"zero{wrote}")).checkpoint()
    first, second = ("3", "1 or 2") if wrote == 3 else ("1 or 2", "3")
    assert refusal(path, now, 2) == (
        f"{path} was written with ZeRO stage {first}, from which stage {second} cannot go on: take "
        f"that stage, or begin anew from its adapters with --model.start_from {path}."
    )


def test_what_is_not_refused(run, refusal, monkeypatch):
    path = run(WHOLE.under("zero2")).checkpoint()
    read = []
    monkeypatch.setattr(
        "lightning.pytorch.strategies.DeepSpeedStrategy.load_checkpoint",
        lambda self, path, weights_only: read.append(path),
    )
    monkeypatch.setattr(cpu.CPUZeroStrategy, "world_size", 2)
    cpu.CPUZeroStrategy(stage=2).load_checkpoint(path)
    assert read == [path]
