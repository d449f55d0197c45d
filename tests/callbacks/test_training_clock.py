"""Waiting time where the host runs ahead of the device: on a CUDA that is imitated."""

import pytest
import torch

from rslightning.callbacks import training_clock
from rslightning.callbacks.training_clock import TrainingClock


class FakeDevice:
    """Works off what the host gives it; events happen when it comes to them."""

    def __init__(self, monkeypatch):
        self.host = self.busy_until = 0.0
        monkeypatch.setattr(training_clock, "time", self)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)

    def perf_counter(self):
        return self.host

    def launch(self, seconds):
        self.busy_until = max(self.host, self.busy_until) + seconds

    def synchronize(self):
        self.host = max(self.host, self.busy_until)


class Event:
    def record(self, stream):
        self.at = max(stream.host, stream.busy_until)

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


@pytest.mark.parametrize(("fetching", "waited"), [(0.5, 0.0), (3.0, 3 * 2 + 3.0)])
def test_a_device_that_has_work_does_not_wait(monkeypatch, fetching, waited):
    device = FakeDevice(monkeypatch)
    clock = TrainingClock(torch.device("cuda"))
    clock.begin_batch()
    device.launch(1.0)
    device.synchronize()
    clock.start()
    clock.end_batch()
    for _ in range(4):
        device.host += fetching
        clock.begin_batch()
        device.launch(1.0)
        clock.end_batch()
    device.synchronize()
    seconds, found = clock.read()
    # The first fetch is always waited for: the device had been worked off. Later ones only by what
    # they take longer than the device's second.
    assert found == pytest.approx(waited if waited else 0.5)
    assert seconds == pytest.approx(found + 4 * 1.0)
