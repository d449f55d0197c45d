"""What the side-by-side programs share: turns that alternate, medians, ratios, the machine."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield every name once per round, each round starting with another name."""
    for number in range(rounds):
        first = number % len(names)
        yield from [*names[first:], *names[:first]]


def time_in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 0.05
) -> dict[str, list[float]]:
    """Return name -> seconds of one call, a number per round, after a warm-up.

    Args:
        runs: What to call.
        rounds: How often each is measured.
        seconds: What one measurement takes at least: a short run is called several times.
    """
    calls = {name: _calls_within(run, seconds) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in turns(list(runs), rounds):
        start = time.perf_counter()
        for _ in range(calls[name]):
            runs[name]()
        finish()
        times[name].append((time.perf_counter() - start) / calls[name])
    return times


def _calls_within(run: Callable[[], object], seconds: float) -> int:
    run()
    finish()
    start = time.perf_counter()
    run()
    finish()
    return max(1, round(seconds / (time.perf_counter() - start) + 0.5))


def finish() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(times: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Return the median over the rounds of `name`'s time by `reference`'s in the same round."""
    pairs = zip(times[name], times[reference], strict=True)
    return statistics.median(mine / other for mine, other in pairs)


def update_share(weight: Tensor, lora_a: Tensor, lora_b: Tensor, gamma: float) -> float:
    """Return ||gamma B A|| / ||W||, from matrices of rank x rank."""
    a, b = lora_a.double(), lora_b.double()
    squared = torch.sum((b.T @ b) * (a @ a.T)).clamp(min=0.0)
    return float(gamma * squared.sqrt() / weight.double().norm())


def machine(*packages: str, device: str = "cpu") -> str:
    """Return processor or GPU, its threads, and the versions of Python, torch and `packages`."""
    listed = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    name = _processor() if device == "cpu" else torch.cuda.get_device_name()
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {listed}"
    )


def version(package: str) -> str:
    """Return the version of an installed package, or `not installed`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write what was measured, if `path` says where."""
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
