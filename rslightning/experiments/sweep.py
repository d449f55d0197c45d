"""`rslightning sweep`: run every cell of a grid, several at once, and go on where it was left.

runs/figure2/sweep.yaml          what is swept, with its cells
runs/figure2/options.yaml        the fragment that all cells have in common
runs/figure2/lora_rank4/         a cell: what its fit left, output.log, status.json
"""

import argparse
import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import yaml
from filelock import FileLock, Timeout

from rslightning.errors import RunError, UserError
from rslightning.experiments.cells import Status, Task, forget, logger_arguments, read_status
from rslightning.experiments.claims import check_claim
from rslightning.experiments.figures import check_figures
from rslightning.experiments.grid import Cell, Sweep, describe_cells, read_sweep
from rslightning.experiments.local import LocalLauncher, visible_devices
from rslightning.experiments.slurm import SlurmLauncher
from rslightning.experiments.table import SweepTable
from rslightning.plain_yaml import read_plain_yaml
from rslightning.recipes import find_config
from rslightning.redaction import redact_values

SWEEP_FILE: Final = "sweep.yaml"
OPTIONS_FILE: Final = "options.yaml"
LOCK_FILE: Final = ".lock"

CONFIGURATION_READER: Final = "rslightning.cli"
"""By its name, since its layer is above this one; it is loaded in other processes only."""


def sweep(arguments: argparse.Namespace) -> None:
    """Carry out `rslightning sweep --config SWEEP [options of fit]`.

    Raises:
        UserError: If the file is no sweep, an option or value of a cell is wrong, there is no such
            figure, claim or launcher, the folder is in use or holds cells of another configuration.
        RunError: If a cell failed; the others have been run.
    """
    plan = read_sweep(find_config(arguments.config))
    check_figures(plan.name, plan.figures)
    for claim in plan.claims:
        check_claim(claim)
    folder = Path(arguments.output or f"runs/{plan.name}")
    cells = plan.cells()
    local = LocalLauncher([None], arguments.threads)
    if arguments.dry_run:
        _read_configurations(local, plan, cells, arguments.options)
        print(as_script(plan, folder, cells, arguments.options))
        return
    print(describe_cells(cells), "reading the configurations ...", sep="\n", flush=True)
    facts = _read_configurations(local, plan, cells, arguments.options)
    local.slots = choose_slots(facts, arguments.jobs, arguments.threads, os.environ)
    launcher: LocalLauncher | SlurmLauncher = local
    if arguments.launcher == "slurm":
        launcher = SlurmLauncher(folder / "slurm", plan.slurm)
    folder.mkdir(parents=True, exist_ok=True)  # whatever can be refused has been, but its cells
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            write_plan(plan, folder, cells, arguments.options)
            _run(arguments, plan, folder, cells, launcher, facts["in_processes"])
    except Timeout:
        raise UserError(f"{folder} is being swept by another process.") from None


def _read_configurations(
    local: LocalLauncher, plan: Sweep, cells: Sequence[Cell], options: Sequence[str]
) -> dict[str, Any]:
    """Return what `check_cells` says; the sweep's folder, if there is one, stays as it is."""
    with TemporaryDirectory() as aside:
        folder = Path(aside)
        _write(folder / OPTIONS_FILE, options_text(plan))
        common = _common_arguments(plan, folder, options)
        configurations = [_arguments(folder, cell, common) for cell in corners(cells)]
        facts: dict[str, Any] = local.ask(check_cells, configurations)
    return facts


def as_script(plan: Sweep, folder: Path, cells: Sequence[Cell], options: Sequence[str]) -> str:
    """Return the commands of all cells for a shell, after one that writes the file they share."""
    lines = [f"# {describe_cells(cells)}"]
    if plan.options:
        path, text = shlex.quote(str(folder / OPTIONS_FILE)), shlex.quote(options_text(plan))
        lines.append(f"mkdir -p {shlex.quote(str(folder))} && printf %s {text} > {path}")
    common = _common_arguments(plan, folder, options)
    words = (["rslightning", "fit", *_arguments(folder, cell, common)] for cell in cells)
    return "\n".join([*lines, *map(shlex.join, words)])


def _run(
    arguments: argparse.Namespace,
    plan: Sweep,
    folder: Path,
    cells: list[Cell],
    launcher: LocalLauncher | SlurmLauncher,
    in_processes: bool,
) -> None:
    common = _common_arguments(plan, folder, arguments.options)
    tasks = [
        Task(cell.name, folder / cell.name, _arguments(folder, cell, common), in_processes)
        for cell in to_do(folder, cells, arguments.retry_failed)
    ]
    done = len(cells) - len(tasks)
    how = "as jobs of SLURM"
    if isinstance(launcher, LocalLauncher):
        how = f"{len(launcher.slots)} at a time"
    print(f"{done} of {len(cells)} are done; the others run {how}, in {folder}", flush=True)
    with SweepTable(folder, len(cells), done) as table:
        for running, ended in launcher.run(tasks):
            table.update(running, ended)
    _tell_end(folder, cells)


def to_do(folder: Path, cells: Sequence[Cell], retry_failed: bool) -> Iterator[Cell]:
    """Yield the cells that have not ended; what a failed one left is removed on request."""
    for cell in cells:
        status = read_status(folder / cell.name)
        if status is not None and status.state == "failed" and retry_failed:
            forget(folder / cell.name)
            status = None
        if status is None:
            yield cell


def check_cells(configurations: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Parse the options of fits, as the command would; return what the launcher needs to know.

    Raises:
        UserError: As `rslightning fit`.
    """
    import torch

    from rslightning.rslora.spec import AdapterSpec

    read = import_module(CONFIGURATION_READER).read_config
    configs = [read(["fit", *words]) for words in configurations]
    for config in configs:
        adapter = config["model"]["adapter"]
        if adapter is not None and adapter["rank"] != "auto":
            AdapterSpec(**adapter)  # refuses what the fits would
    trainers = [config["trainer"] for config in configs]
    several = any(trainer["devices"] not in ("auto", 1, "1") for trainer in trainers)
    on_gpu = torch.cuda.is_available() and trainers[0]["accelerator"] != "cpu"
    return {"in_processes": several, "gpus": torch.cuda.device_count() if on_gpu else 0}


def choose_slots(
    facts: dict[str, Any], jobs: int | None, threads: int, environment: Any
) -> list[str | None]:
    """Return what each of the fits that run at once gets as `CUDA_VISIBLE_DEVICES`.

    Args:
        facts: What `check_cells` returned.
        jobs: How many there shall be; None takes one for each device, or as many as cores serve.
        threads: Threads of each, on a CPU.
        environment: Environment variables.
    """
    if facts["in_processes"]:  # they divide the devices among themselves
        return [None] * (jobs or 1)
    if facts["gpus"]:
        devices = visible_devices(facts["gpus"], environment)
        return [devices[job % len(devices)] for job in range(jobs or len(devices))]
    return [None] * (jobs or max(1, _cores() // threads))


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _common_arguments(plan: Sweep, folder: Path, options: Sequence[str]) -> list[str]:
    """Return the options that all cells have in common."""
    bases = [str(find_config(name)) for name in plan.base]
    files = [*bases, str(folder / OPTIONS_FILE)] if plan.options else bases
    return [*(word for file in files for word in ("--config", file)), *options]


def _arguments(folder: Path, cell: Cell, common: Sequence[str]) -> list[str]:
    """Return a cell's own options after the common ones: the later wins."""
    return [*common, *cell.arguments(), *logger_arguments(folder, cell.name)]


def corners(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Yield cells until every value of every axis has been seen: enough to find a wrong one."""
    seen: set[str] = set()
    for cell in cells:
        values = {f"{axis}={value!r}" for axis, value in cell.values.items()}
        if not values <= seen:
            seen |= values
            yield cell


def write_plan(plan: Sweep, folder: Path, cells: list[Cell], options: Sequence[str]) -> None:
    """Write what is swept; cells that were begun before stay listed with their values.

    Raises:
        UserError: If the folder holds cells that were begun with another base, or a cell of the
            same name with other values.
    """
    path = folder / SWEEP_FILE
    content = {
        **asdict(plan),
        "arguments": list(options),
        "recipes": _recipes(plan, options),
        "cells": {cell.name: cell.values for cell in cells},
    }
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        cells_before = (before.get("cells") or {}).items()
        begun = {name: values for name, values in cells_before if (folder / name).exists()}
        if begun:
            _refuse_another_base(folder, before, content)
            _refuse_other_values(folder, begun, content["cells"])
        content["cells"] = begun | content["cells"]
    _write(folder / OPTIONS_FILE, options_text(plan))
    _write(path, yaml.safe_dump(content, sort_keys=False))


def options_text(plan: Sweep) -> str:
    """Return the fragment that all cells have in common, in YAML."""
    return yaml.safe_dump(plan.options, sort_keys=False)


def _write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _recipes(plan: Sweep, options: Sequence[str]) -> dict[str, Any]:
    """Return name -> what the base's files say now, and those that the options name."""
    words = [word for option in options for word in re.split("(?<=^--config)=", option)]
    named = [after for word, after in itertools.pairwise(words) if word == "--config"]
    files = {name: read_plain_yaml(find_config(name)) for name in [*plan.base, *named]}
    return {name: redact_values(content) for name, content in files.items()}


def _refuse_another_base(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in ("base", "options", "arguments"):
        if before.get(key) != now[key]:
            raise UserError(
                f"{folder} holds cells with {key} {before.get(key)!r}, this sweep has "
                f"{now[key]!r}: give another --output, or the same {key}."
            )
    for name, content in (before.get("recipes") or {}).items():  # earlier versions kept none
        if found := _first_difference(redact_values(content), now["recipes"].get(name)):
            key, old, new = found
            raise UserError(
                f"{folder} holds cells with {key} {old} from {name}, where it now is {new}: give "
                f"another --output, or the same {key}."
            )


def _refuse_other_values(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    for name, values in begun.items():
        if found := _first_difference(values, now.get(name, values)):
            key, old, new = found
            raise UserError(
                f"{folder} holds cell {name} with {key} {old}, this sweep has {new}: give another "
                f"--output, or remove {folder / name} to run that cell anew."
            )


def _first_difference(before: Any, now: Any, key: str = "") -> tuple[str, str, str] | None:
    """Return a key at which two contents differ, and what both have there; null if none does."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return (key or "content", repr(before), repr(now)) if before != now else None
    for name in dict.fromkeys([*before, *now]):
        inner = f"{key}.{name}" if key else str(name)
        if name not in before or name not in now:
            old, new = (repr(of[name]) if name in of else "unset" for of in (before, now))
            return inner, old, new
        if found := _first_difference(before[name], now[name], inner):
            return found
    return None


def _tell_end(folder: Path, cells: Sequence[Cell]) -> None:
    statuses: dict[str, Status | None] = {c.name: read_status(folder / c.name) for c in cells}
    counts = Counter("killed" if s is None else s.state for s in statuses.values())
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    print(f"  figures      rslightning report {folder} --output {folder}/report")
    print(f"  TensorBoard  tensorboard --logdir {folder}")
    bad = [name for name, status in statuses.items() if status is None or status.state == "failed"]
    if bad:
        status = statuses[bad[0]]
        said = status.message if status else "it was killed; the same command goes on with it."
        raise RunError(
            f"{len(bad)} of {len(cells)} cells did not finish ({', '.join(bad[:4])}"
            f"{', ...' if len(bad) > 4 else ''}); {bad[0]}: {said} See output.log in its folder."
        )
