"""Scalars land at the step where `train/loss` lands, many of them in one event."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.data import DataLoader

from rslightning.callbacks.scalars import optimizer_step, write_scalars


class Probe(Callback):
    """Writes beside whatever the module logs, before each optimizer step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        step = optimizer_step(trainer)
        write_scalars(trainer, {f"probe/{i}": step + i / 8 for i in range(5)}, step)


class SaveAt(Callback):
    """Saves once, where Lightning's own checkpoints are saved."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def events_of(folder):
    files = sorted(folder.glob("events.out.tfevents.*"))
    return [event for file in files for event in EventFileLoader(str(file)).Load()]


def steps_of(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in events.Scalars(tag)]


def tensorboard(folder, **options):
    return TensorBoardLogger(str(folder), name="", version="", **options)


@pytest.mark.parametrize("accumulate", [1, 5])  # 6 batches: 5 leave a window of 1
def test_the_step_of_the_training_loss(make_trainer, make_module, make_data, tmp_path, accumulate):
    trainer = make_trainer(
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        logger=tensorboard(tmp_path),
        log_every_n_steps=1,
        callbacks=[Probe()],
        limit_val_batches=0,
    )
    trainer.fit(make_module(), make_data())
    expected = list(range(18 if accumulate == 1 else 6))
    assert steps_of(tmp_path, "train/loss") == expected
    assert steps_of(tmp_path, "probe/0") == expected


@pytest.mark.parametrize(("accumulate", "steps_done"), [(1, 3), (1, 5), (2, 1), (2, 3), (2, 4)])
def test_the_step_after_resuming(make_trainer, tmp_path, accumulate, steps_done):
    options = {
        "accumulate_grad_batches": accumulate,
        "limit_train_batches": 5,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    path = tmp_path / "resume.ckpt"
    saving = SaveAt(steps_done, path)
    make_trainer(max_steps=steps_done + 1, callbacks=[saving], **options).fit(LoggingModel())
    options |= {"logger": tensorboard(tmp_path), "callbacks": [Probe()]}
    make_trainer(max_epochs=3, **options).fit(ResumableModel(), ckpt_path=path)
    steps = steps_of(tmp_path, "probe/0")
    assert steps == steps_of(tmp_path, "loss")
    assert steps[0] == steps_done
    assert len(steps) > 3


class LoggingModel(BoringModel):
    """Lightning's demo model; logs its loss."""

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        self.log("loss", output["loss"])
        return output


class ResumableLoader(DataLoader):
    """Says that it resumes, so that Lightning does not warn."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class ResumableModel(LoggingModel):
    def train_dataloader(self):
        return ResumableLoader(super().train_dataloader().dataset)


class TwoOptimizers(LightningModule):
    """The second optimizer steps on every third batch only."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        for optimizer in [first, second] if batch_idx % 3 == 2 else [first]:
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([p], lr=0.1) for p in (self.net.weight, self.net.bias)]

    def train_dataloader(self):
        return BoringModel().train_dataloader()


def test_the_step_under_manual_optimization(make_trainer, tmp_path):
    trainer = make_trainer(
        max_epochs=2,
        limit_train_batches=5,
        logger=tensorboard(tmp_path),
        log_every_n_steps=1,
        callbacks=[Probe()],
    )
    trainer.fit(TwoOptimizers())
    assert steps_of(tmp_path, "loss") == list(range(10))
    # Batches 2 and 7 are the third of their epoch: both optimizers step in them.
    assert steps_of(tmp_path, "probe/0") == [0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9]


def fit_once(make_trainer, loggers, callbacks):
    trainer = make_trainer(
        max_steps=3, logger=loggers, log_every_n_steps=1, callbacks=callbacks, limit_val_batches=0
    )
    trainer.fit(LoggingModel())
    return trainer


def test_many_values_are_one_event(make_trainer, tmp_path):
    fit_once(make_trainer, tensorboard(tmp_path), [Probe()])
    probes = [
        event
        for event in events_of(tmp_path)
        if any(value.tag.startswith("probe/") for value in event.summary.value)
    ]
    assert [(event.step, len(event.summary.value)) for event in probes] == [(0, 5), (1, 5), (2, 5)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("probe/3")] == [0.375, 1.375, 2.375]


def test_all_loggers_get_them(make_trainer, tmp_path):
    csv = CSVLogger(str(tmp_path / "csv"), name="", version="")
    fit_once(make_trainer, [tensorboard(tmp_path / "board", prefix="run"), csv], [Probe()])
    assert steps_of(tmp_path / "board", "run-probe/4") == [0, 1, 2]
    assert steps_of(tmp_path / "board", "run-loss") == [0, 1, 2]
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert "probe/4" in rows[0]
    assert len([row for row in rows[1:] if "1.5" in row.split(",")]) == 1


def test_a_second_fit_with_the_same_logger(make_trainer, tmp_path):
    logger = tensorboard(tmp_path)
    fit_once(make_trainer, logger, [Probe()])
    assert logger.experiment.file_writer is None  # closed by the first
    fit_once(make_trainer, logger, [Probe()])
    tags = [value.tag for event in events_of(tmp_path) for value in event.summary.value]
    assert tags.count("probe/0") == tags.count("loss") == 6


def test_no_logger_is_no_failure(make_trainer):
    assert fit_once(make_trainer, False, [Probe()]).global_step == 3


def test_only_the_first_process_writes():
    class Refusing:
        def log_metrics(self, metrics, step):
            raise AssertionError

    write_scalars(SimpleNamespace(is_global_zero=False, loggers=[Refusing()]), {"x": 1.0}, 0)
    with pytest.raises(AssertionError):
        write_scalars(SimpleNamespace(is_global_zero=True, loggers=[Refusing()]), {"x": 1.0}, 0)
