"""Signals that mean something else for a while."""

import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any


class TakenSignals:
    """Handles signals, and gives them back what they meant before."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def take(
        self, numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
    ) -> None:
        """Let a handler have some signals.

        A SIGHUP that is ignored, as `nohup` lets it be, stays so: the terminal is gone, and the run
        goes on.
        """
        self.give_back()
        for number in numbers:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, handler)

    def give_back(self) -> None:
        """Let the signals that were taken mean what they meant."""
        while self._before:
            signal.signal(*self._before.popitem())
