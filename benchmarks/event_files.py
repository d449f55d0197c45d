"""Reading 100,000 points from event files: ours against TensorBoard's EventAccumulator.

    python benchmarks/event_files.py [--points 100000]

Both read the same file, written by torch's SummaryWriter: 20 tags, one value in each event. Each
reading is one pass in a fresh object; the fastest of three counts. Both must agree on every value.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from rslightning.experiments.event_files import read_events

TAGS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=100_000)
    points = parser.parse_args().points
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), points)
        ours, curves = fastest(lambda: read_events(Path(folder)).curves)
        theirs, accumulator = fastest(lambda: accumulate(folder))
    for tag, curve in curves.items():
        events = accumulator.Scalars(tag)
        assert curve.steps.tolist() == [event.step for event in events], tag
        assert curve.values.tolist() == [event.value for event in events], tag
    print(f"{points:,} points: ours {ours:.2f} s, EventAccumulator {theirs:.2f} s")


def write(folder: Path, points: int) -> None:
    with SummaryWriter(folder, max_queue=1000) as writer:
        for index in range(points):
            writer.add_scalar(f"group/tag_{index % TAGS}", index / 7, index // TAGS)


def accumulate(folder: str) -> Any:
    accumulator = EventAccumulator(folder, {"scalars": 0})
    accumulator.Reload()
    return accumulator


def fastest(read: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of the fastest of three, and what was read."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = read()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


if __name__ == "__main__":
    main()
