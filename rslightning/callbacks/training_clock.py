"""The time that training takes, without what interrupts it."""

import time
from typing import Any

import torch


class TrainingClock:
    """Wall time of training in seconds, and what of it passes between two micro-batches.

    Pauses, and what is between a pause's begin and the next micro-batch, belong to neither.

    Args:
        device: Whose time is waiting time: on CUDA the host runs ahead of the device, which stands
            idle only when it has worked off what the host has given it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_started = False
        self._is_paused = self._is_in_batch = False
        self._since = self._seconds = self._waited = 0.0
        self._ended: Any = None
        self._gaps: list[tuple[Any, Any]] = []

    @property
    def is_between_batches(self) -> bool:
        """Whether the clock runs and no micro-batch does."""
        return self.is_started and not self._is_in_batch and not self._is_paused

    def start(self) -> None:
        """Start, at the end of a micro-batch."""
        self.is_started, self._since = True, time.perf_counter()

    def begin_batch(self) -> None:
        """Note that a micro-batch is there."""
        if self._is_paused:
            self._is_paused, self._since = False, time.perf_counter()
        elif self.is_started:
            self._gaps.append((self._ended, self._mark()))
        self._is_in_batch = True

    def end_batch(self) -> None:
        """Note that the next micro-batch is waited for."""
        self._is_in_batch, self._ended = False, self._mark()

    def pause(self) -> None:
        """Stand still until the next micro-batch; the device has nothing left to do."""
        self._seconds += time.perf_counter() - self._since
        self._is_paused = True

    def read(self) -> tuple[float, float]:
        """Return seconds of training and of waiting; the device has nothing left to do."""
        self._waited += sum(self._between(*gap) for gap in self._gaps)
        self._gaps.clear()
        return self._seconds + time.perf_counter() - self._since, self._waited

    def _mark(self) -> Any:
        """Return this moment: on CUDA that when the device has come so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, one: Any, other: Any) -> float:
        if self.device.type != "cuda":
            return float(other - one)
        return float(one.elapsed_time(other)) / 1000
