"""What a sweep shows while it runs: a live table on a terminal, else a line for each event."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rslightning.experiments.cells import TRAINING, Status
from rslightning.experiments.event_files import read_events

REFRESH_SECONDS: Final = 2.0


class SweepTable:
    """Shows which cells run, how far they are, and how the others ended; a context manager.

    Args:
        folder: The sweep's.
        total: Number of its cells.
        done: How many need not be run.
    """

    def __init__(self, folder: Path, total: int, done: int) -> None:
        self._folder, self._total, self._done = folder, total, done
        self._failed = 0
        self._waiting = total - done
        self._started: dict[str, float] = {}
        self._seconds: list[float] = []  # that cells took
        self._slots = 1
        self._drawn = 0.0
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> "SweepTable":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def update(self, running: Iterable[str], ended: Mapping[str, Status | None]) -> None:
        """Take what runs and what has ended since the last call."""
        now = time.monotonic()
        for name in sorted(set(running) - set(self._started) - set(ended)):
            self._started[name] = now
            self._slots = max(self._slots, len(self._started))
            self._say(f"start  {name}")
        for name, status in ended.items():
            seconds = now - self._started.pop(name)
            self._seconds.append(seconds)
            self._done += 1
            self._failed += status is None or status.state == "failed"
            self._say(f"{describe(status):<6} {name} ({seconds:.0f} s); {self._summary()}")
        if self._console.is_terminal and now - self._drawn > REFRESH_SECONDS:
            self._drawn = now
            self._live.update(self._table(now), refresh=True)

    def _say(self, line: str) -> None:
        if self._console.is_terminal:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def _summary(self) -> str:
        left = self._total - self._done
        rest = ""
        if left and self._seconds:
            mean = sum(self._seconds) / len(self._seconds)
            rest = f", about {_minutes(mean * left / self._slots)} left"
        return f"{self._done} of {self._total} done, {self._failed} failed{rest}"

    def _table(self, now: float) -> Table:
        table = Table(title=f"{self._folder}: {self._summary()}", title_justify="left")
        for heading in ("cell", "step", "loss", "time", "time left"):
            table.add_column(heading, justify="left" if heading == "cell" else "right")
        for name, began in sorted(self._started.items()):
            step, total, loss = read_progress(self._folder / name)
            seconds = now - began
            left = _minutes(seconds * (total - step) / step) if step and total > 0 else ""
            of = f"{step}/{total}" if total > 0 else str(step)
            table.add_row(name, of, loss, _minutes(seconds), left)
        return table


def read_progress(folder: Path) -> tuple[int, int, str]:
    """Return how many steps a cell has made, of how many (-1: unknown), and its last loss."""
    curve = read_events(folder).curves.get(TRAINING)
    if curve is None or not (folder / "config.yaml").exists():
        return 0, -1, ""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return int(curve.steps[-1]) + 1, config["trainer"]["max_steps"], f"{curve.values[-1]:.4f}"


def describe(status: Status | None) -> str:
    """Return how a cell ended, in a few words."""
    if status is None:
        return "killed: it goes on when the sweep is started again"
    return status.state if not status.message else f"{status.state}: {status.message}"


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"
