"""DeepSpeed under Lightning: what ours puts right, and what both refuse."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
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

from rslightning.deepspeed_checkpoint import DEEPSPEED_CLASSES
from rslightning.errors import UserError
from rslightning.safe_load import load_plain

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


# --- what a folder holds --------------------------------------------------------------------------


def module_states(checkpoint):
    """Return what the first process wrote beside the optimizer's state."""
    [file] = (checkpoint / "checkpoint").glob("*mp_rank_00_model_states.pt")
    return load_plain(file, DEEPSPEED_CLASSES)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2])
def test_trained_weights_are_there_once(run, stage, precision):
    fit = Fit(steps=2, precision=precision, save_every=2, merge=None)
    checkpoint = run(fit.under(f"zero{stage}")).checkpoint()
    assert module_states(checkpoint)["module"] == {}
    twice = module_states(run(fit.under(f"zero{stage}_twice")).checkpoint())["module"]
    masters = matrices(checkpoint)
    assert twice.keys() == {f"model.{name}" for name in masters}
    for name, master in masters.items():
        weight = twice[f"model.{name}"]
        assert weight.dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
        assert torch.equal(weight, master.to(weight.dtype))


def test_the_tool_that_deepspeed_puts_beside_a_folder_reads_it(run):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoint = run(WHOLE.under("zero2")).checkpoint()
    found = get_fp32_state_dict_from_zero_checkpoint(checkpoint, exclude_frozen_parameters=True)
    truth = matrices(checkpoint)
    assert found.keys() == {f"model.{name}" for name in truth}
    assert all(torch.equal(found[f"model.{name}"], master) for name, master in truth.items())


def test_full_fine_tuning_keeps_its_weights(run, places):
    fit = Fit(steps=2, rank=None, optimizer="SGD", save_every=2, merge=None)
    found = module_states(run(fit.under("zero2")).checkpoint())["module"]
    base = load_file(places.bases / "llama" / "model.safetensors")
    assert found.keys() == {f"model.{name}" for name in base}
    assert not any(torch.equal(found[f"model.{name}"], weight) for name, weight in base.items())


def test_a_frozen_base_that_is_not_excluded(run, places, fork, tmp_path):
    """Then nothing is left out; parts of it are not evaluated."""
    base = load_file(places.bases / "llama" / "model.safetensors")

    def rank(_):
        for stage in (2, 3):
            fit = Fit(steps=1, merge=None).under(f"zero{stage}")
            path = tmp_path / f"{stage}.ckpt"
            options = {"stage": stage, "exclude_frozen_parameters": False}
            with ignoring_deepspeed(fit):
                trainer = make_fit_trainer(fit, tmp_path, [], cpu.CPUZeroStrategy(**options))
                module, data = make_fit_module(fit, places), make_fit_data(fit, places)
                trainer.fit(module, data)
                if stage == 2:
                    module.model.lm_head.weight.data.mul_(2)  # what is inside, not the base's own
                    trainer.save_checkpoint(path)
                    [living] = trainer.validate(module, data, verbose=False)
                    other = make_fit_module(fit, places)
                    assert trainer.validate(other, data, path, verbose=False) == [living]
                    continue
                trainer.save_checkpoint(path)
                with pytest.raises(UserError) as caught:
                    trainer.validate(make_fit_module(fit, places), data, path, verbose=False)
            assert str(caught.value) == (
                f"{path} has the frozen base inside, in parts that only a fit puts together: "
                f"evaluate its adapters with start_from={path}."
            )

    assert fork(2, rank) == [0, 0]
    found = module_states(tmp_path / "2.ckpt")["module"]
    trained = {f"model.{name}" for name in matrices(tmp_path / "2.ckpt")}
    frozen = {name for name in found if name not in trained}
    assert len(frozen) == len(base)
    assert trained < found.keys()


def test_overwriting_begins_with_what_was_there(run, tmp_path, monkeypatch):
    folder = run(WHOLE.under("zero2")).checkpoint()
    path = shutil.copytree(folder, tmp_path / "x.ckpt")
    (path / "checkpoint" / "notes.txt").write_text("somebody's")
    strategy = cpu.CPUZeroStrategy(stage=2)
    strategy.connect(LightningModule())
    monkeypatch.setattr(strategy, "barrier", lambda: None)
    monkeypatch.setattr(
        "lightning.pytorch.strategies.DeepSpeedStrategy.save_checkpoint",
        lambda *_: shutil.copy(next(folder.rglob("*_1_*optim_states.pt")), path / "checkpoint"),
    )
    strategy.save_checkpoint({}, path)  # as one that is interrupted when one part is written
    with pytest.raises(UserError, match="was not written to the end"):
        matrices(path)
    assert (path / "checkpoint" / "notes.txt").exists()


# --- refusals -------------------------------------------------------------------------------------


# A layout of gradients that DeepSpeed reads wrongly; masters of weights that are not saved.
@pytest.mark.parametrize(
    ("name", "value"), [("round_robin_gradients", True), ("load_from_fp32_weights", False)]
)
def test_an_option_of_deepspeed(name, value):
    cpu.CPUZeroStrategy(config={"zero_optimization": {name: not value}})
    with pytest.raises(UserError) as caught:
        cpu.CPUZeroStrategy(config={"zero_optimization": {name: value}})
    assert str(caught.value) == f"{name} is not supported: leave it out of the config."


def test_clipping_by_value(fork, places, tmp_path):
    fit = replace(Fit(steps=1, merge=None), strategy="zero2")

    def rank(_):
        trainer = make_fit_trainer(fit, tmp_path, [], gradient_clip_algorithm="value")
        with ignoring_deepspeed(fit), pytest.raises(MisconfigurationException) as caught:
            trainer.fit(make_fit_module(fit, places), make_fit_data(fit, places))
        assert str(caught.value) == "DeepSpeed does not support clipping gradients by value."

    assert fork(1, rank) == [0]


@pytest.fixture
def fitting(monkeypatch):
    """Return a function that returns the strategy of a fit of so many processes."""

    def strategy(stage, processes):
        monkeypatch.setattr(cpu.CPUZeroStrategy, "world_size", processes)
        made = cpu.CPUZeroStrategy(stage=stage)
        state = SimpleNamespace(fn=TrainerFn.FITTING)
        made.connect(SimpleNamespace(trainer=SimpleNamespace(state=state)))
        return made

    return strategy


@pytest.fixture
def refusal(fitting):
    """Return a function that says how a run of so many processes refuses a checkpoint."""

    def message(path, stage, processes):
        with pytest.raises(UserError) as caught:
            fitting(stage, processes).load_checkpoint(path)
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


def test_what_is_not_refused(run, fitting, monkeypatch):
    path = run(WHOLE.under("zero3")).checkpoint()
    read = []
    monkeypatch.setattr(
        "lightning.pytorch.strategies.DeepSpeedStrategy.load_checkpoint",
        lambda self, path, weights_only: read.append(path),
    )
    fitting(3, 2).load_checkpoint(path)
    assert read == [path]
