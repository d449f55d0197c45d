import shutil
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from rslightning.experiments.event_files import PATTERN, read_events, records


def write(folder, values, tag="train/loss", first=0, time=None):
    with SummaryWriter(folder) as writer:
        for step, value in enumerate(values, first):
            writer.add_scalar(tag, value, step, walltime=time)


def the_file(folder) -> Path:
    (path,) = folder.glob(PATTERN)
    return path


def test_scalars_are_those_that_tensorboard_reads(tmp_path):
    values = np.random.default_rng(0).normal(size=57)
    write(tmp_path, values)
    write(tmp_path, values[:5] ** 2, tag="grad_norm/mean", first=3)
    accumulator = EventAccumulator(str(tmp_path), {"scalars": 0}).Reload()
    curves = read_events(tmp_path).curves
    assert sorted(curves) == sorted(accumulator.Tags()["scalars"])
    for tag, curve in curves.items():
        expected = accumulator.Scalars(tag)
        assert curve.steps.tolist() == [event.step for event in expected]
        assert curve.values.tolist() == [event.value for event in expected]
    np.testing.assert_array_equal(curves["train/loss"].values, values.astype(np.float32))


def test_scalars_in_tensors_are_read_and_other_tensors_are_not(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("new", 2.5, 7, new_style=True)
        writer.add_scalar("double", 0.1, 3, new_style=True, double_precision=True)
        writer.add_text("words", "a text", 1)
        writer.add_histogram("spread", np.arange(9.0), 1)
    curves = read_events(tmp_path).curves
    assert set(curves) == {"new", "double"}
    assert (curves["new"].steps.tolist(), curves["new"].values.tolist()) == ([7], [2.5])
    assert curves["double"].values.tolist() == [0.1]


def test_values_that_are_not_finite_stay(tmp_path):
    write(tmp_path, [1.0, float("nan"), float("inf")])
    values = read_events(tmp_path).curves["train/loss"].values
    assert np.isnan(values[1])
    assert np.isinf(values[2])


@pytest.mark.parametrize("missing", [1, 5, 20, 30])
def test_a_torn_last_record_is_the_end_of_the_file(tmp_path, missing):
    write(tmp_path / "whole", [4.0, 3.0, 2.0])
    content = the_file(tmp_path / "whole").read_bytes()
    assert len(list(records(content))) == 4  # the version, and three events
    length = 12 + len(list(records(content))[-1]) + 4
    assert missing < length
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "events.out.tfevents.1.x").write_bytes(content[:-missing])
    assert read_events(tmp_path / "torn").curves["train/loss"].values.tolist() == [4.0, 3.0]


def test_garbage_at_the_end_is_the_end_of_the_file(tmp_path):
    write(tmp_path, [4.0, 3.0])
    path = the_file(tmp_path)
    garbage = (8).to_bytes(8, "little") + b"\0\0\0\0" + b"\xff" * 8 + b"\0\0\0\0"
    path.write_bytes(path.read_bytes() + garbage)
    assert read_events(tmp_path).curves["train/loss"].values.tolist() == [4.0, 3.0]


def test_the_newest_value_of_a_step_wins_whatever_the_files_are_called(tmp_path):
    write(tmp_path / "new", [2.2, 2.3, 2.4], first=2, time=2000.0)
    write(tmp_path / "old", [1.0, 1.1, 1.2, 1.3], time=1000.0)
    both = tmp_path / "both"
    both.mkdir()
    shutil.copy(the_file(tmp_path / "new"), both / "events.out.tfevents.1.a")
    shutil.copy(the_file(tmp_path / "old"), both / "events.out.tfevents.2.a")
    curve = read_events(both).curves["train/loss"]
    assert curve.steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(curve.values, [1.0, 1.1, 2.2, 2.3, 2.4], rtol=1e-6)


def test_a_step_written_twice_in_one_file_has_its_later_value(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("x", 1.0, 5, walltime=9.0)
        writer.add_scalar("x", 2.0, 5, walltime=9.0)
    assert read_events(tmp_path).curves["x"].values.tolist() == [2.0]


def test_settings_are_those_of_the_hparams_tab(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for summary in hparams({"adapter.gamma_r": 2.5, "optimizer": "AdamW"}, {}):
            writer.file_writer.add_summary(summary)
    assert read_events(tmp_path).settings == {"adapter.gamma_r": 2.5, "optimizer": "AdamW"}


def test_a_folder_without_event_files_holds_nothing(tmp_path):
    assert read_events(tmp_path) == ({}, {})
