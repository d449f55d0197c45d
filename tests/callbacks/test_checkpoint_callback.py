import os
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rslightning.callbacks import TrainableCheckpoint
from rslightning.callbacks.non_finite_guard import NonFiniteError
from rslightning.checkpoint_folder import newest_whole
from rslightning.errors import RunError, UserError
from rslightning.rslora import AdapterSpec
from rslightning.strategies import FSDP2Strategy


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
    assert files(tmp_path) == ["last.ckpt", "step-6.ckpt", "step-7.ckpt"]
    folder = tmp_path / "checkpoints"
    steps = {name: step_of(folder / name) for name in files(tmp_path)}
    assert steps == {"last.ckpt": 7, "step-6.ckpt": 6, "step-7.ckpt": 7}


class TwoOptimizers(LightningModule):
    """Steps twice in each batch, by hand: as a GAN."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(2))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for part, optimizer in zip(self.parts, self.optimizers(), strict=True):
            loss = part(batch).sum()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.parts]


def test_a_writer_in_the_background_is_refused(make_trainer, make_module, make_data, tmp_path):
    with pytest.raises(UserError, match="leave it out of"):
        fit(
            *(make_trainer, make_module(), make_data(), TrainableCheckpoint()),
            plugins=[AsyncCheckpointIO()],
            max_steps=1,
        )
    assert not list(tmp_path.iterdir())


def test_intervals_that_steps_of_several_optimizers_pass_over(make_trainer, tmp_path):
    data = torch.utils.data.DataLoader(torch.ones(9, 2))
    fit(make_trainer, TwoOptimizers(), data, TrainableCheckpoint(5, keep_last=9), max_epochs=1)
    assert [step_of(path) for path in (tmp_path / "checkpoints").glob("step-*")]
    assert files(tmp_path) == [
        "last.ckpt",
        "step-10.ckpt",
        "step-16.ckpt",
        "step-18.ckpt",
        "step-6.ckpt",
    ]


def test_more_are_kept_on_request(make_trainer, make_module, make_data, tmp_path):
    callback = TrainableCheckpoint(every_n_steps=1, keep_last=3)
    fit(make_trainer, make_module(), make_data(), callback, max_steps=5)
    assert files(tmp_path) == ["last.ckpt", "step-3.ckpt", "step-4.ckpt", "step-5.ckpt"]


def test_steps_are_optimizer_steps(make_trainer, make_module, make_data, tmp_path):
    options = {"max_steps": 3, "accumulate_grad_batches": 2}
    fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), **options)
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt", "step-3.ckpt"]


def test_a_run_shorter_than_the_interval_leaves_its_end(
    make_trainer, make_module, make_data, tmp_path
):
    module = make_module()
    fit(make_trainer, module, make_data(), TrainableCheckpoint(), max_steps=3)
    assert files(tmp_path) == ["last.ckpt", "step-3.ckpt"]
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.trainable_state().keys()
    for name, tensor in module.trainable_state().items():
        assert torch.equal(saved["state_dict"][name], tensor)


def fail(*arguments):
    raise RuntimeError("the device is lost")


def test_a_dry_run_leaves_nothing(make_trainer, make_module, make_data, tmp_path):
    module, data = make_module(), make_data()
    fit(make_trainer, module, data, TrainableCheckpoint(1), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
    failing = LambdaCallback(on_validation_start=fail)
    with pytest.raises(RuntimeError, match="the device is lost"):
        fit(make_trainer, module, data, TrainableCheckpoint(1), failing, fast_dev_run=True)
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
    """Raise, as a lost device would, between the second and the third step or within the third."""

    def __init__(self, hook, error=RuntimeError):
        self.batches = 0

        def fail(trainer, *arguments):
            self.batches += 1
            if trainer.global_step == 2 and self.batches % trainer.accumulate_grad_batches == 0:
                raise error("the device is lost")

        setattr(self, hook, fail)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_train_batch_start", "on_before_backward"]
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_exception_leaves_the_step_before_it_from_which_a_run_goes_on_exactly(
    make_trainer, make_module, make_data, tmp_path, hook, accumulated
):
    def run(*callbacks, **options):
        module = make_module(adapter=AdapterSpec(rank=3, alpha=5.0, dropout=0.2))
        options = {"max_steps": 5, "accumulate_grad_batches": accumulated} | options
        fit(make_trainer, module, make_data(), *callbacks, **options)
        return module.trainable_state()

    with pytest.raises(RuntimeError, match="the device is lost"):
        run(TrainableCheckpoint(), Fail(hook))
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt"]
    assert step_of(tmp_path / "checkpoints/step-2.ckpt") == 2
    resumed = run(TrainableCheckpoint(), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    whole = run()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning"
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_checkpoint_that_another_callback_writes_is_of_its_own_step(
    make_trainer, make_module, make_data, tmp_path, accumulated
):
    def run(*callbacks, **options):
        module = make_module()
        options |= {"max_steps": 5, "accumulate_grad_batches": accumulated}
        fit(make_trainer, module, make_data(), *callbacks, **options)
        return module.trainable_state()

    others = ModelCheckpoint(tmp_path / "others", "{step}", save_top_k=-1, every_n_train_steps=3)
    whole = run(others, TrainableCheckpoint())
    resumed = run(TrainableCheckpoint(), ckpt_path=tmp_path / "others" / "step=3.ckpt")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_an_exception_within_the_optimizer_leaves_the_last_interval(
    make_trainer, make_module, make_data, tmp_path, monkeypatch
):
    step = torch.optim.AdamW.step

    def fail(self, closure):
        step(self, closure)
        if all(state["step"] == 3 for state in self.state.values()):
            raise RuntimeError("half of the weights are new")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="half of the weights are new"):
        fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), max_steps=5)
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt"]


class AtStep(Callback):
    """Do something when a step begins."""

    def __init__(self, **actions):
        self.actions = {int(name.removeprefix("step")): act for name, act in actions.items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.actions.pop(trainer.global_step, lambda: None)()


@pytest.fixture
def disk():
    """Return functions that fill the disk, for files of a size, and clear it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    def clear():
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield fill, clear
    clear()


def test_training_outlives_a_full_disk(make_trainer, make_module, make_data, tmp_path, disk):
    fill, clear = disk
    events = AtStep(step2=fill, step4=clear)
    module = make_module()
    with pytest.warns(UserWarning, match="could not be saved") as told:
        fit(make_trainer, module, make_data(), TrainableCheckpoint(2, 3), events, max_steps=6)
    folder = tmp_path / "checkpoints"
    assert [str(each.message) for each in told if "saved" in str(each.message)] == [
        f"{folder}/step-4.ckpt could not be saved: File too large. step-2.ckpt stays the newest; "
        "the next one is due in 2 steps."
    ]
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt", "step-6.ckpt"]
    saved = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], x) for name, x in module.trainable_state().items())


def test_a_disk_that_stays_full_fails_the_run_at_its_end(
    make_trainer, make_module, make_data, tmp_path, disk
):
    module = make_module()
    callbacks = [TrainableCheckpoint(2), AtStep(step3=disk[0])]
    with pytest.warns(UserWarning, match="could not be saved"), pytest.raises(RunError) as caught:
        fit(make_trainer, module, make_data(), *callbacks, max_steps=6)
    assert str(caught.value) == "The final state is in no checkpoint: File too large."
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt"]
    assert newest_whole(tmp_path / "checkpoints")[0].name == "step-2.ckpt"


def test_a_lost_folder_is_made_again(make_trainer, make_module, make_data, tmp_path):
    lose = AtStep(step3=lambda: shutil.rmtree(tmp_path / "checkpoints"))
    fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), lose, max_steps=4)
    assert files(tmp_path) == ["last.ckpt", "step-4.ckpt"]


def test_a_folder_in_which_nothing_can_be_made(make_trainer, make_module, make_data, tmp_path):
    def spoil():
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("a file")

    def mend():
        (tmp_path / "checkpoints").unlink()

    events = AtStep(step3=spoil, step5=mend)
    with pytest.warns(
        UserWarning, match=r"There is none of before; the next one is due in 2 steps"
    ):
        fit(make_trainer, make_module(), make_data(), TrainableCheckpoint(2), events, max_steps=6)
    assert files(tmp_path) == ["last.ckpt", "step-6.ckpt"]


@pytest.mark.parametrize("parts", [False, True])
def test_several_processes_outlive_a_full_disk(
    make_trainer, make_module, make_data, tmp_path, run_processes, parts
):
    """Also where only one of them finds it full."""

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))

    def clear():
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    def run(rank):
        strategy = FSDP2Strategy(save_distributed_checkpoint=True) if parts else "ddp"
        options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False}
        full = rank == (1 if parts else 0)
        events = AtStep(step2=fill if full else str, step4=clear)
        callbacks = [TrainableCheckpoint(2, 3), events]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit(make_trainer, make_module(), make_data(), *callbacks, max_steps=6, **options)
        expected = 1 if rank == 0 else 0
        assert sum("step-4.ckpt could not be saved" in str(e.message) for e in told) == expected

    assert run_processes(2, run) == [0, 0]
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt", "step-6.ckpt"]
    assert newest_whole(tmp_path / "checkpoints") == (tmp_path / "checkpoints/step-6.ckpt", [])


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"keep_last": 0}])
def test_intervals_are_positive(options):
    with pytest.raises(ValueError, match=r"^checkpoint\.\w+ is 0; it must be positive\.$"):
        TrainableCheckpoint(**options)


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
    assert files(tmp_path) == ["last.ckpt", "step-2.ckpt", "step-3.ckpt"]
    assert (tmp_path / "checkpoints/step-2.ckpt").read_bytes() == before


class Validations(Callback):
    """Note the steps at which validations begin and what they find; fail in one of them."""

    def __init__(self, failing=None, hook="on_validation_start"):
        self.steps, self.losses = [], []

        def fail_once(trainer, *arguments):
            if trainer.global_step == failing:
                raise RuntimeError("the device is lost")

        if failing:
            setattr(self, hook, fail_once)

    def on_validation_epoch_start(self, trainer, pl_module):
        self.steps.append(trainer.global_step)

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(trainer.callback_metrics["val/loss"].item())


EVERY_TWO_STEPS = {
    "max_steps": 4,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "limit_val_batches": 2,
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end"])
@pytest.mark.parametrize("failing", [2, 4])  # within the run, and after its last step
def test_a_validation_that_was_due_is_made_by_the_run_that_goes_on(
    make_trainer, make_module, make_data, tmp_path, failing, hook
):
    def run(*callbacks, **options):
        module = make_module()
        trainer = fit(make_trainer, module, make_data(), *callbacks, **EVERY_TWO_STEPS, **options)
        assert (trainer.global_step, trainer.max_steps) == (4, 4)
        return module.trainable_state()

    whole, resumed = Validations(), Validations()
    state = run(TrainableCheckpoint(), whole)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RuntimeError, match="the device is lost"):
        run(TrainableCheckpoint(), Validations(failing, hook))
    path = tmp_path / "checkpoints/last.ckpt"
    assert step_of(path) == failing
    found = run(TrainableCheckpoint(), resumed, ckpt_path=path)
    assert resumed.steps == [step for step in whole.steps if step >= failing]
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_new_fit_makes_no_validation_of_one_that_failed(
    make_trainer, make_module, make_data, tmp_path
):
    """The callback's object may serve both."""
    checkpoint, failing, validations = TrainableCheckpoint(), Validations(4), Validations()
    with pytest.raises(RuntimeError, match="the device is lost"):
        fit(make_trainer, make_module(), make_data(), checkpoint, failing, **EVERY_TWO_STEPS)
    options = EVERY_TWO_STEPS | {"max_steps": 2}
    trainer = fit(make_trainer, make_module(), make_data(), checkpoint, validations, **options)
    assert trainer.global_step == 2
    assert validations.steps == [2]
