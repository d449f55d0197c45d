"""From folders to studies: the runs of a sweep that can be compared, with what to draw of them."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from rslightning.errors import UserError
from rslightning.experiments.differences import tell_apart
from rslightning.experiments.runs import Run, Setting, is_run, method_order, read_run, read_yaml

DEFAULT_FIGURES: Final = {
    "perplexity": "perplexity",
    "gradient_norms": "gradient_norms",
    "moments": "moments",
}
"""What is drawn of runs that belong to no sweep, as far as they wrote it."""

NO_SETTING: Final = Setting("", "", "", "", "", None)


class Cell(NamedTuple):
    """What a run is apart from its seed; sorts by rank and rate within its method."""

    method: str
    rank: int | None
    rate: float | None

    @property
    def order(self) -> tuple[Any, ...]:
        """The key by which cells are sorted."""
        return (*method_order(self.method), self.rank or 0, self.rate or 0.0)


@dataclass(frozen=True)
class Study:
    """Runs whose losses can be compared.

    Attributes:
        name: Of the sweep or the folder.
        title: In words.
        setting: What the runs have in common.
        figures: File name -> kind of figure.
        claims: Names of the claims that it is to decide.
        runs: By method, rank, rate, seed and name.
        rate: The rate that the sweep takes as the untuned one; null if it names none.
        absent: Names of the sweep's cells that have no folder yet.
    """

    name: str
    title: str
    setting: Setting
    figures: dict[str, str]
    claims: tuple[str, ...]
    runs: tuple[Run, ...]
    rate: float | None = None
    absent: tuple[str, ...] = ()

    @cached_property
    def cells(self) -> dict[Cell, list[Run]]:
        """The runs of each cell, one per seed; of all states.

        Where several runs of a cell have one seed, each run is a cell that its name tells apart:
        nothing says which of them is meant, and they are no further seeds.
        """
        varied = _methods_with_several_alphas(self.runs)
        found: dict[Cell, list[Run]] = {}
        for run in self.runs:
            found.setdefault(cell_of(run, varied), []).append(run)
        cells: dict[Cell, list[Run]] = {}
        for cell, runs in found.items():
            if not _repeats(runs):
                cells[cell] = runs
                continue
            for run in runs:
                cells[cell._replace(method=f"{cell.method}, {run.name}")] = [run]
        return {cell: cells[cell] for cell in sorted(cells, key=lambda cell: cell.order)}

    @property
    def repeated(self) -> list[str]:
        """The names of the runs that have method, rank, rate and seed in common with another."""
        varied = _methods_with_several_alphas(self.runs)
        return [run.name for run in self.runs if cell_of(run, varied) not in self.cells]

    @property
    def seeds(self) -> list[int]:
        """The seeds of all its runs."""
        return sorted({run.seed for run in self.runs if run.seed is not None})


def cell_of(run: Run, varied: set[str]) -> Cell:
    """Return a run's cell; alpha is named where a method has several (`varied`)."""
    if run.method == "run":
        return Cell(run.name, None, run.learning_rate)
    method = run.method
    if method in varied and run.alpha is not None:
        method += f", alpha {run.alpha:g}"
    return Cell(method, run.rank, run.learning_rate)


def find_studies(folders: Sequence[str]) -> list[Study]:
    """Return the studies in `folders`: sweeps, single runs, or folders of them at any depth.

    Raises:
        UserError: If a folder does not exist or holds no run, or a file in it cannot be read.
    """
    studies: list[Study] = []
    for folder in folders:
        path = Path(folder)
        if not path.is_dir():
            raise UserError(f"There is no folder {folder}; name a run folder or a sweep's.")
        found = list(_studies_in(path))
        if not found:
            raise UserError(f"There is no run in {folder}: no event files below it.")
        studies += found
    return _with_distinct_names(studies)


def _studies_in(path: Path) -> Iterator[Study]:
    """Yield the studies of each sweep below `path`, then those of the runs outside of sweeps."""
    sweeps: list[Path] = []
    runs: list[Path] = []
    for folder in _walk(path):
        (sweeps if (folder / "sweep.yaml").is_file() else runs).append(folder)
    for sweep in sweeps:
        yield from _sweep_studies(sweep)
    name = path.resolve().name
    loose = [read_run(run, _name(run, path) or name, in_sweep=False) for run in runs]
    yield from _by_setting(loose, name, name, DEFAULT_FIGURES, ())


def _sweep_studies(folder: Path) -> Iterator[Study]:
    sweep = read_yaml(folder / "sweep.yaml")
    cells = [run for run in _walk(folder, skip_sweep=True) if run != folder]
    runs = [read_run(run, _name(run, folder), in_sweep=True) for run in cells]
    name = re.sub(r"[^\w.-]+", "-", str(sweep.get("name") or folder.resolve().name))
    figures = sweep.get("figures") or {}
    if not isinstance(figures, dict):
        raise UserError(f"{folder / 'sweep.yaml'}: figures must be a mapping, file name: kind.")
    title, claims = str(sweep.get("title") or name), tuple(sweep.get("claims") or ())
    studies = list(_by_setting(runs, name, title, figures, claims))
    studies = studies or [Study(name, title, NO_SETTING, figures, claims, ())]
    rate, started = _rate(folder, sweep), {run.name for run in runs}
    absent = tuple(cell for cell in sweep.get("cells") or () if cell not in started)
    for study in studies:
        yield replace(study, rate=rate, absent=absent if study is studies[0] else ())


def _rate(folder: Path, sweep: dict[str, Any]) -> float | None:
    try:
        return None if sweep.get("rate") is None else float(sweep["rate"])
    except (TypeError, ValueError):
        raise UserError(
            f"{folder / 'sweep.yaml'}: rate must be a number, got {sweep['rate']!r}."
        ) from None


def _walk(path: Path, skip_sweep: bool = False) -> Iterator[Path]:
    """Yield the topmost sweep and run folders below `path`, itself included, in order of name."""
    for place, below, _ in os.walk(path):
        folder = Path(place)
        sweep = (folder / "sweep.yaml").is_file() and not (skip_sweep and folder == path)
        cell = skip_sweep and folder != path and (folder / "config.yaml").is_file()
        below.sort()
        if sweep or cell or is_run(folder):
            below.clear()
            yield folder


def _by_setting(
    runs: Sequence[Run],
    name: str,
    title: str,
    figures: dict[str, str],
    claims: tuple[str, ...],
) -> Iterator[Study]:
    """Yield one study for each setting: losses of different settings are not compared."""
    groups = _settings(runs)
    for index, setting in enumerate(sorted(groups, key=str), 1):
        own = groups[setting]
        label = name if len(groups) == 1 else f"{name}-{index}"
        heading = f"{title}: {setting.others}" if setting.others else title
        own.sort(key=lambda run: (cell_of(run, set()).order, run.seed or 0, run.name))
        yield Study(label, heading, setting, figures, claims, tuple(own))


def _settings(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """Return the runs of each setting, which names whatever else differs among them."""
    alike: dict[Setting, list[Run]] = {}
    for run in runs:
        alike.setdefault(_shared_setting(run, runs), []).append(run)
    groups: dict[Setting, list[Run]] = {}
    for setting, own in alike.items():
        words = tell_apart([run.config for run in own])
        for run, others in zip(own, words, strict=True):
            groups.setdefault(setting._replace(others=others), []).append(run)
    return groups


def _repeats(runs: Sequence[Run]) -> bool:
    """Tell whether a seed has several runs, among those that ended, if there are any."""
    ended = [run for run in runs if run.counts] or runs
    seeds = [run.seed for run in ended if run.seed is not None]
    return len(set(seeds)) < len(seeds)


def _shared_setting(run: Run, runs: Sequence[Run]) -> Setting:
    """Return a run's setting; full fine-tuning, which has no targets, takes those of the others."""
    if run.setting.targets:
        return run.setting
    targets = {other.setting.targets for other in runs} - {""}
    return run.setting._replace(targets=min(targets) if len(targets) == 1 else "")


def _methods_with_several_alphas(runs: Sequence[Run]) -> set[str]:
    alphas: dict[str, set[float | None]] = {}
    for run in runs:
        alphas.setdefault(run.method, set()).add(run.alpha)
    return {method for method, found in alphas.items() if len(found) > 1}


def _name(run: Path, above: Path) -> str:
    name = run.relative_to(above).as_posix()
    return "" if name == "." else name


def _with_distinct_names(studies: list[Study]) -> list[Study]:
    seen: Counter[str] = Counter()
    distinct = []
    for study in studies:
        seen[study.name] += 1
        again = f"-{seen[study.name]}" if seen[study.name] > 1 else ""
        distinct.append(replace(study, name=study.name + again))
    return distinct
