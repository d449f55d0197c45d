import os
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rslightning.callbacks import TrainableCheckpoint
from rslightning.callbacks.non_finite_guard import NonFiniteError


def fit(make_trainer, module, data, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(7)
    options = {"limit_val_batches": 0, "enable_checkpointing": bool(callbacks), **options}
    trainer = make_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def files(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_files_are_named_by_steps_and_the_newest_stay(
    make_trainer, make_module, make_data, tmp_path
):
    fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), max_steps=7)
    assert files(tmp_path) == ["last.ckpt", "step-4.ckpt", "step-6.ckpt"]
    folder = tmp_path / "checkpoints"
    steps = {name: step_of(folder / name) for name in files(tmp_path)}
    assert steps == {"last.ckpt": 7, "step-4.ckpt": 4, "step-6.ckpt": 6}


def test_more_are_kept_on_request(make_trainer, make_module, make_data, tmp_path):
    callback = TrainableCheckpoint(every_n_steps=1, keep_last=3)
    fit(make_trainer, make_module(), make_data(), callback, max_steps=5)
    assert files(tmp_path) == ["last.ckpt", "step-3.ckpt", "step-4.ckpt", "step-5.ckpt"]


def test_steps_are_optimizer_steps(make_trainer, make_module, make_data, tmp_path):
    options = {"max_steps": 3, "accumulate_grad_batches": 2}
    fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), **options)
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt"]


def test_a_run_shorter_than_the_interval_leaves_its_end(
    make_trainer, make_module, make_data, tmp_path
):
    module = make_module()
    fit(make_trainer, module, make_data(), TrainableCheckpoint(), max_steps=3)
    assert files(tmp_path) == ["last.ckpt"]
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.trainable_state().keys()
    for name, tensor in module.trainable_state().items():
        assert torch.equal(saved["state_dict"][name], tensor)


def test_a_dry_run_leaves_nothing(make_trainer, make_module, make_data, tmp_path):
    module, data = make_module(), make_data()
    fit(make_trainer, module, data, TrainableCheckpoint(1), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


class ReadEvents(Callback):
    """Note, at each save, the steps whose loss has reached the disk."""

    def __init__(self):
        self.steps = {}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        events = EventAccumulator(trainer.log_dir).Reload()
        self.steps[trainer.global_step] = [e.step for e in events.Scalars("train/loss")]


def test_what_was_logged_up_to_a_checkpoint_is_on_the_disk_before_it(
    make_trainer, make_module, make_data, tmp_path
):
    """Else a run that is killed and goes on would lack losses."""
    reader = ReadEvents()
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    options = {"max_steps": 5, "logger": logger, "log_every_n_steps": 1}
    fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), reader, **options)
    assert {step: sorted(set(steps)) for step, steps in reader.steps.items()} == {
        2: [0, 1],
        4: [0, 1, 2, 3],
        5: [0, 1, 2, 3, 4],
    }


class Fail(Callback):
    """Raise in the third step, as a lost device would."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise RuntimeError("the device is lost")


def test_an_exception_leaves_the_state_before_it(make_trainer, make_module, make_data, tmp_path):
    with pytest.raises(RuntimeError, match="the device is lost"):
        fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(), Fail(), max_steps=5)
    assert "step-2.ckpt" in files(tmp_path)
    assert step_of(tmp_path / "checkpoints/step-2.ckpt") == 2


@pytest.mark.parametrize("dies_in", ["write", "rename"])
def test_a_process_that_dies_while_it_saves_leaves_the_files_before(
    make_trainer, make_module, make_data, tmp_path, run_processes, monkeypatch, dies_in
):
    def die(*arguments, **options):
        os._exit(9)

    class DieAtFour(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step == 3 and dies_in == "write":
                monkeypatch.setattr(trainer.strategy, "save_checkpoint", half_written)
            if trainer.global_step == 3 and dies_in == "rename":
                monkeypatch.setattr(Path, "replace", die)

    def half_written(checkpoint, filepath, storage_options=None):
        Path(filepath).write_bytes(b"PK half a file")
        die()

    def run(_):
        callbacks = [TrainableCheckpoint(2), DieAtFour()]
        fit(make_trainer, make_module(), make_data(), *callbacks, max_steps=6)

    assert run_processes(1, run) == [9]
    whole = [name for name in files(tmp_path) if not name.startswith(".")]
    assert whole == ["last.ckpt", "step-2.ckpt"]
    assert [step_of(tmp_path / "checkpoints" / name) for name in whole] == [2, 2]
    resumed = TrainableCheckpoint(2)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        fit(make_trainer, make_module(), make_data(), resumed, ckpt_path=last, max_steps=6)
    assert all(not name.startswith(".") for name in files(tmp_path))
    assert step_of(tmp_path / "checkpoints" / "last.ckpt") == 6


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RuntimeError, []), (NonFiniteError, ["last.ckpt", "step-2.ckpt"])],
)
def test_several_processes_save_before_an_error_that_all_of_them_have(
    make_trainer, make_module, make_data, tmp_path, run_processes, error, expected
):
    class Raise(Callback):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.global_step == 2:
                raise error("a fault")

    def run(_):
        callbacks = [TrainableCheckpoint(), Raise()]
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        with pytest.raises(error):
            fit(make_trainer, make_module(), make_data(), *callbacks, max_steps=5, **options)

    assert run_processes(2, run) == [0, 0]
    folder = tmp_path / "checkpoints"
    assert (files(tmp_path) if folder.exists() else []) == expected


# Resuming writes into the folder of the run that it goes on with.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_resuming_from_the_last_goes_on_as_if_uninterrupted(
    make_trainer, make_module, make_data, tmp_path
):
    def run(module, *callbacks, **options):
        return fit(make_trainer, module, make_data(), *callbacks, **options)

    whole, resumed = make_module(), make_module()
    run(whole, max_steps=9)  # into the second pass over the 6 batches
    run(make_module(), TrainableCheckpoint(2), max_steps=3)
    path = tmp_path / "checkpoints/last.ckpt"
    trainer = run(resumed, TrainableCheckpoint(2), max_steps=9, ckpt_path=path)
    assert trainer.global_step == 9
    assert step_of(path) == 9
    for name, tensor in whole.trainable_state().items():
        assert torch.equal(resumed.trainable_state()[name], tensor), name


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_resumed_run_does_not_save_within_a_step(make_trainer, make_module, make_data, tmp_path):
    options = {"accumulate_grad_batches": 2}
    fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), max_steps=2, **options)
    before = (tmp_path / "checkpoints/step-2.ckpt").read_bytes()
    options |= {"max_steps": 3, "ckpt_path": tmp_path / "checkpoints/last.ckpt"}
    fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), **options)
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt"]
    assert (tmp_path / "checkpoints/step-2.ckpt").read_bytes() == before
