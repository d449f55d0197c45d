import io
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from rslightning.callbacks import StopOnSignal, TrainableCheckpoint
from rslightning.errors import RunError, StoppedError

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]

resumes = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Told(Callback):
    """Send signals to this process, of one rank, in the midst of a step."""

    def __init__(self, *signals, rank=0, step=2, micro_batch=0):
        self.signals, self.place = signals, (rank, step, micro_batch)
        self.micro_batch = 0

    def on_after_backward(self, trainer, pl_module):
        here = (trainer.global_rank, trainer.global_step, self.micro_batch)
        self.micro_batch = (self.micro_batch + 1) % trainer.accumulate_grad_batches
        if here == self.place:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def same_handlers():
    """The signals mean afterwards what they meant before."""
    # A shell that starts the tests in the background lets them ignore SIGINT, nohup SIGHUP, and a
    # Trainer that failed leaves handlers of its own.
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    at_start = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == usual
    for number, handler in at_start.items():
        signal.signal(number, handler)


def saved(folder: Path) -> dict[str, int]:
    return {
        path.name: torch.load(path, weights_only=True)["global_step"]
        for path in sorted((folder / "checkpoints").glob("*"))
    }


@pytest.fixture
def fit(make_trainer, make_module, make_data, tmp_path):
    """Return the function that fits: callbacks, and options of the Trainer."""

    def run(*callbacks, module=None, ckpt_path=None, **options):
        torch.manual_seed(7)
        options = {"limit_val_batches": 0, "max_steps": 6, "enable_checkpointing": True} | options
        callbacks = [StopOnSignal(), *callbacks]
        if options["enable_checkpointing"]:
            callbacks.append(TrainableCheckpoint(100))
        trainer = make_trainer(callbacks=callbacks, **options)
        module = module or make_module()
        trainer.fit(module, make_data(), ckpt_path=ckpt_path)
        return module.trainable_state()

    return run


def give_back(signals=SIGNALS):
    """Do what the command does not need to: its process ends."""
    for number in signals:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else 0)


@resumes
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_step_is_ended_and_saved_and_gone_on_from(fit, tmp_path, capfd, number):
    with pytest.raises(StoppedError) as caught:
        fit(Told(number, micro_batch=0), accumulate_grad_batches=2)
    give_back()
    assert str(caught.value) == f"stopped by {number.name} after step 3"
    assert caught.value.status == 128 + number
    assert saved(tmp_path) == {"last.ckpt": 3, "step-3.ckpt": 3}
    again = "; once more stops at once" if number == signal.SIGINT else ""
    assert f"{number.name}: stopping after this step{again}\n" in capfd.readouterr().err
    last = tmp_path / "checkpoints/last.ckpt"
    resumed = fit(accumulate_grad_batches=2, ckpt_path=last)
    whole = fit(accumulate_grad_batches=2, enable_checkpointing=False)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_stop_when_one_is_told(fit, run_processes, tmp_path, rank):
    def run(_):
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        with pytest.raises(StoppedError, match=r"^stopped by SIGTERM after step 3$"):
            fit(Told(signal.SIGTERM, rank=rank), **options)

    assert run_processes(2, run) == [0, 0]
    assert saved(tmp_path) == {"last.ckpt": 3, "step-3.ckpt": 3}


def test_a_second_interrupt_stops_at_once_and_saves_nothing(fit, tmp_path):
    with pytest.raises(SystemExit) as caught:
        fit(Told(signal.SIGINT, signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores more of them
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert not (tmp_path / "checkpoints").exists()


def test_a_second_request_to_terminate_changes_nothing(fit, tmp_path):
    with pytest.raises(StoppedError):
        fit(Told(signal.SIGTERM, signal.SIGTERM))
    give_back()
    assert saved(tmp_path) == {"last.ckpt": 3, "step-3.ckpt": 3}


class ToldInValidation(Callback):
    """Send SIGTERM in the validation after so many steps."""

    def __init__(self, step):
        self.step, self.batches = step, 0

    def on_validation_batch_start(self, trainer, *arguments, **options):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            self.batches += 1
            os.kill(os.getpid(), signal.SIGTERM)


class ValidationLosses(Callback):
    """Keep the loss of each validation with the step that it follows."""

    def __init__(self):
        self.losses = {}

    def on_validation_end(self, trainer, pl_module):
        assert trainer.global_step not in self.losses
        self.losses[trainer.global_step] = trainer.callback_metrics["val/loss"].item()


EVERY_2_STEPS = {"limit_val_batches": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
EVERY_PASS = {"limit_val_batches": 2, "max_epochs": 2, "max_steps": -1, "limit_train_batches": 3}


@resumes
@pytest.mark.parametrize(
    ("options", "step"),
    [(EVERY_2_STEPS, 2), (EVERY_2_STEPS, 6), (EVERY_PASS, 3), (EVERY_PASS, 6)],
    ids=["within", "the last step", "a pass", "the last pass"],
)
def test_a_validation_is_interrupted_and_made_by_the_run_that_goes_on(fit, tmp_path, options, step):
    told, before, after, whole = ToldInValidation(step), *(ValidationLosses() for _ in range(3))
    with pytest.raises(StoppedError, match=rf"after step {step}$"):
        fit(told, before, **options)
    give_back()
    assert told.batches == 1
    assert saved(tmp_path) == {"last.ckpt": step, f"step-{step}.ckpt": step}
    resumed = fit(after, ckpt_path=tmp_path / "checkpoints/last.ckpt", **options)
    undisturbed = fit(whole, enable_checkpointing=False, **options)
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    assert before.losses | after.losses == whole.losses
    assert step in after.losses
    assert not before.losses.keys() & after.losses.keys()


@resumes
def test_what_a_validation_decides_is_decided_by_the_run_that_goes_on(fit, tmp_path):
    def stopping():
        return EarlyStopping("val/loss", stopping_threshold=100.0)  # of the first validation

    with pytest.raises(StoppedError, match=r"after step 2$"):
        fit(ToldInValidation(2), stopping(), **EVERY_2_STEPS)
    give_back()
    resumed = fit(stopping(), ckpt_path=tmp_path / "checkpoints/last.ckpt", **EVERY_2_STEPS)
    undisturbed = fit(stopping(), enable_checkpointing=False, **EVERY_2_STEPS)
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    assert saved(tmp_path)["last.ckpt"] == 2


def test_a_state_that_cannot_be_saved_is_a_failure(fit, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.warns(UserWarning, match="could not be saved"), pytest.raises(RunError) as caught:
        fit(Told(signal.SIGTERM))
    give_back()
    assert str(caught.value).startswith(
        "stopped by SIGTERM after step 3, and that step is in no checkpoint: "
    )


def test_what_nohup_ignores_is_ignored(fit, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(Told(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved(tmp_path) == {"last.ckpt": 6, "step-6.ckpt": 6}


def test_a_signal_is_told_while_a_line_is_written(fit, monkeypatch):
    class Writing(io.StringIO):
        def write(self, text):
            if "stopping after" in text:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")
            return len(text)

    monkeypatch.setattr(sys, "stderr", Writing())
    with pytest.raises(StoppedError):
        fit(Told(signal.SIGTERM))
    give_back()


def test_without_a_signal_nothing_is_different(fit):
    def disturbed(number):
        raise AssertionError(number)

    before = signal.signal(signal.SIGUSR1, disturbed)
    try:
        with warnings.catch_warnings(record=True) as told:
            fit(enable_checkpointing=False, max_steps=2)
        assert signal.getsignal(signal.SIGUSR1) is disturbed
        assert not [each for each in told if "signal" in str(each.message)]
    finally:
        signal.signal(signal.SIGUSR1, before)
