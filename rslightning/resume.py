"""Where a run goes on: the newest whole checkpoint of a run, and the newest run of a configuration.

Everything here is a function of the configuration and of the disk: each process of a run comes to
the same answer before the processes know of each other.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from rslightning.checkpoint import is_checkpoint
from rslightning.checkpoint_folder import CHECKPOINTS, LAST, damage_of, list_steps, newest_whole
from rslightning.errors import UserError

CONFIG_FILE: Final = "config.yaml"

NO_PART: Final = (
    "ckpt_path",
    "auto_resume",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.logger.init_args.version",
)
"""Keys in which two runs of the same configuration may differ."""

AUTO_RANK: Final = ("model.adapter.rank", "auto")
"""A key whose value is replaced by a number before it is saved."""

VERSION: Final = re.compile(r"version_(\d+)")

VERSIONED_LOGGERS: Final = ("TensorBoardLogger", "CSVLogger")


class Found(NamedTuple):
    """A checkpoint to go on from, and sentences that the user is told."""

    path: Path
    said: list[str]


def resolve_checkpoint(name: str, trainer: Mapping[str, Any]) -> Found:
    """Return the checkpoint that `--ckpt_path NAME` means.

    Args:
        name: A checkpoint, where a damaged one means the newest one of before that is whole; a run
            folder, its `checkpoints/`, or the `last.ckpt` there: the newest that is whole; or
            `last`: the same of the newest run that has one.
        trainer: Configuration of the Trainer.

    Raises:
        UserError: If there is none, or none is whole.
    """
    if name == "last":
        folder = next((run / CHECKPOINTS for run in list_runs(trainer)), None)
        if folder is None:
            raise UserError(f"There is no run with a checkpoint in {runs_folder(trainer)}.")
        return _newest(folder)
    path = Path(name)
    if path.is_dir() and not is_checkpoint(path):
        return _newest(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
    if path.name == LAST and list_steps(path.parent):
        return _newest(path.parent)
    if not path.exists():
        raise UserError(f"There is no checkpoint {path}.")
    damage = damage_of(path)
    if damage is None:
        return Found(path, [])
    earlier = [p for _, p in list_steps(path.parent) if p.stat().st_mtime < path.stat().st_mtime]
    for other in reversed(earlier):
        if damage_of(other) is None:
            said = f"{path} is not whole ({damage}): going on from {other.name} of before."
            return Found(other, [said])
    raise UserError(f"{path} is not whole ({damage}), and no checkpoint of before is beside it.")


def _newest(folder: Path) -> Found:
    path, damaged = newest_whole(folder)
    return Found(path, [f"{each}: going on from {path.name}." for each in damaged])


def runs_folder(trainer: Mapping[str, Any]) -> Path:
    """Return the folder in which the runs of a configuration are.

    Args:
        trainer: Configuration of the Trainer.

    Raises:
        UserError: If the logger is one that keeps its runs elsewhere.
    """
    root, logger = Path(trainer.get("default_root_dir") or "."), trainer.get("logger")
    if logger is None or logger is True:
        return root / "lightning_logs"
    if logger is False:
        return root
    if isinstance(logger, Mapping) and logger["class_path"].endswith(VERSIONED_LOGGERS):
        options = logger.get("init_args") or {}
        return Path(options["save_dir"]) / (options.get("name") or "")
    raise UserError(
        "To find a run again takes one logger, a TensorBoardLogger or a CSVLogger; give the path "
        "of the checkpoint as ckpt_path."
    )


def list_runs(trainer: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the runs of a configuration that have a checkpoint, the newest first.

    Raises:
        UserError: As `runs_folder`.
    """
    folder = runs_folder(trainer)
    found = [folder, *folder.iterdir()] if folder.is_dir() else []
    runs = [run for run in found if list_steps(run / CHECKPOINTS)]
    yield from sorted(runs, key=_age, reverse=True)


def _age(run: Path) -> tuple[int, float]:
    match = VERSION.fullmatch(run.name)
    return int(match[1]) if match else -1, list_steps(run / CHECKPOINTS)[-1][1].stat().st_mtime


class Run(NamedTuple):
    """A run that a configuration goes on with."""

    folder: Path
    checkpoint: Found


def find_run(config: Mapping[str, Any]) -> tuple[Run | None, str]:
    """Return the newest run of a configuration that has a checkpoint, and a sentence.

    Args:
        config: Options of a fit, in plain values.

    Raises:
        UserError: As `runs_folder`, or if no checkpoint of the run is whole.
    """
    other = "there is none yet"
    for run in list_runs(config["trainer"]):
        try:
            saved = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        difference = _first_difference(saved, config)
        if difference is None:
            found = _newest(run / CHECKPOINTS)
            return Run(run, found), f"auto_resume: going on with {run} from {found.path.name}."
        if other == "there is none yet":
            other = f"{run} has {difference}"
    return None, f"auto_resume: a new run begins; {other}."


def _first_difference(saved: Any, now: Mapping[str, Any]) -> str | None:
    """Return where two configurations differ in a key that both have, with both values."""
    before, after = dict(_flat(saved)), dict(_flat(now))
    for key, value in after.items():
        if key in NO_PART or (key, value) == AUTO_RANK or key not in before:
            continue
        if before[key] != value:
            return f"{key} {before[key]!r}, not {value!r}"
    return None


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is no mapping."""
    if not isinstance(value, Mapping) or not value:
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}" if key else str(name))
