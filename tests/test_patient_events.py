import resource
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from rslightning import patient_events
from rslightning.errors import RunError
from rslightning.patient_events import waiting_events


@pytest.fixture
def disk():
    """Return functions: no file may grow beyond so many bytes; any may."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield (
        lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1])),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps(folder):
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]


def log(writer, numbers):
    for step in numbers:
        writer.add_scalar("loss", step / 7, step)
    writer.flush()


def test_events_wait_for_a_full_disk(tmp_path, disk):
    fill, clear = disk
    with waiting_events():
        writer = SummaryWriter(tmp_path)
        log(writer, range(100))
        (file,) = tmp_path.iterdir()
        fill(file.stat().st_size + 20)  # half an event
        with pytest.warns(UserWarning, match=r"^Events wait, since .* File too large\.$"):
            log(writer, range(100, 150))
        assert steps(tmp_path) == list(range(100))  # no half of one is there
        log(writer, range(150, 200))  # is not told again
        clear()
        log(writer, range(200, 250))
        assert steps(tmp_path) == list(range(250))
        writer.close()


@pytest.mark.filterwarnings("ignore:Events wait:UserWarning")
def test_what_waits_is_written_at_the_end(tmp_path, disk):
    fill, clear = disk
    with waiting_events():
        writer = SummaryWriter(tmp_path)
        log(writer, range(10))
        fill(1)
        log(writer, range(10, 20))
        writer.close()
        clear()
    assert steps(tmp_path) == list(range(20))


@pytest.mark.filterwarnings("ignore:Events wait:UserWarning")
def test_what_is_missing_at_the_end_is_told(tmp_path, disk):
    fill, clear = disk

    def run():
        with waiting_events():
            writer = SummaryWriter(tmp_path)
            log(writer, range(10))
            fill(1)
            log(writer, range(10, 20))
            writer.close()

    with pytest.raises(RunError, match=r"^The disk took no more: \d+ bytes of events of .*missing"):
        run()
    clear()
    assert steps(tmp_path) == list(range(10))


@pytest.mark.filterwarnings("ignore:Events wait:UserWarning")
def test_not_everything_waits_for_ever(tmp_path, disk, monkeypatch):
    fill, clear = disk
    monkeypatch.setattr(patient_events, "MOST_BYTES", 200)

    def run():
        with waiting_events():
            writer = SummaryWriter(tmp_path)
            fill(1)
            log(writer, range(100))
            clear()
            writer.close()

    with pytest.raises(
        RunError, match=r"^The disk took no more: [\d,]+ bytes of events are missing"
    ):
        run()


@pytest.mark.filterwarnings("ignore:Events wait:UserWarning")
def test_a_lost_folder(tmp_path):
    folder = tmp_path / "run"
    with waiting_events():
        writer = SummaryWriter(folder)
        log(writer, range(10))
        shutil.rmtree(folder)
        log(writer, range(10, 20))
        folder.mkdir()
        log(writer, range(20, 30))
        writer.close()
    assert steps(folder) == list(range(10, 30))


def test_the_working_folder_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with waiting_events():
        writer = SummaryWriter("run")
        log(writer, range(10))
        (tmp_path / "elsewhere").mkdir()
        writer.close()
    assert steps(tmp_path / "run") == list(range(10))
    assert list((tmp_path / "elsewhere").iterdir()) == []
