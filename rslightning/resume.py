"""Where a run goes on: the newest whole checkpoint of a run, and the newest run of a configuration.

Everything here is a function of the configuration and of the disk: each process of a run comes to
the same answer before the processes know of each other.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from rslightning.checkpoint import find_state, is_adapter, is_checkpoint
from rslightning.checkpoint_folder import CHECKPOINTS, LAST, damage_of, list_steps, newest_whole
from rslightning.errors import UserError
from rslightning.run_config import first_difference, newest_config

VERSION: Final = re.compile(r"version_(\d+)")

VERSIONED_LOGGERS: Final = ("TensorBoardLogger", "CSVLogger")


class Found(NamedTuple):
    """A checkpoint to go on from, and sentences that the user is told."""

    path: Path
    said: list[str]


def resolve_checkpoint(name: str, trainer: Mapping[str, Any], adapter_alone: bool = False) -> Found:
    """Return the checkpoint that `--ckpt_path NAME` means.

    Args:
        name: A checkpoint, where a damaged one means the newest one of before that is whole; a run
            folder, its `checkpoints/`, or the `last.ckpt` there: the newest that is whole; or
            `last`: the same of the newest run that has one.
        trainer: Configuration of the Trainer.
        adapter_alone: Whether the adapter is all that is wanted, and not how far its run is: then
            an adapter folder is taken, too, and of a run folder what `find_state` takes.

    Raises:
        UserError: If there is none, or none is whole.
    """
    path = Path(name)
    if name == "last":
        run = next(list_runs(trainer), None)
        if run is None:
            raise UserError(f"There is no run with a checkpoint in {runs_folder(trainer)}.")
        path = run
    if path.is_dir() and not is_checkpoint(path):
        return Found(*find_state(path)) if adapter_alone else _newest_in(path)
    if path.name == LAST and list_steps(path.parent):
        return _newest(path.parent)
    if not path.exists():
        raise UserError(f"There is no checkpoint {path}.")
    return _whole_or_before(path)


def _newest_in(folder: Path) -> Found:
    """Return the newest checkpoint of a run folder, or of a folder of checkpoints."""
    if is_adapter(folder):
        raise UserError(
            f"{folder} holds an adapter, and no run that could go on: begin anew from it with "
            f"--model.start_from {folder}."
        )
    return _newest(folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder)


def _whole_or_before(path: Path) -> Found:
    damage = damage_of(path)
    if damage is None:
        return Found(path, [])
    if path.is_file() and not _was_archive(path):
        raise UserError(f"{path} is no checkpoint.")
    earlier = [p for _, p in list_steps(path.parent) if p.stat().st_mtime < path.stat().st_mtime]
    for other in reversed(earlier):
        if damage_of(other) is None:
            said = f"{path} is not whole ({damage}): going on from {other.name} of before."
            return Found(other, [said])
    raise UserError(f"{path} is not whole ({damage}), and no checkpoint of before is beside it.")


def _was_archive(path: Path) -> bool:
    """Tell whether a file can be what is left of one of torch: its beginning, or blank."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\0\0", b"")


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
    return int(match[1]) if match else -1, run.stat().st_mtime


class Run(NamedTuple):
    """A run that a configuration goes on with; one that has no checkpoint yet begins again."""

    folder: Path
    checkpoint: Found | None


def find_run(config: Mapping[str, Any]) -> tuple[Run | None, str]:
    """Return the newest run of a configuration, and a sentence.

    Args:
        config: Options of a fit, in plain values.

    Raises:
        UserError: As `runs_folder`, or if no checkpoint of the run is whole, or it is in use.
    """
    folder, other = runs_folder(config["trainer"]), "there is none yet"
    runs = [folder, *folder.iterdir()] if folder.is_dir() else []
    for run in sorted(runs, key=_age, reverse=True):
        saved = newest_config(run)
        if saved is None:
            continue
        difference = first_difference(saved, config)
        if difference is None:
            return _go_on(run)
        if other == "there is none yet":
            other = f"{run} has {difference}"
    return None, f"auto_resume: a new run begins; {other}."


def _go_on(run: Path) -> tuple[Run, str]:
    if _is_held(run):
        raise UserError(
            f"{run} is of this configuration, and another process trains it now: wait for it, or "
            "leave auto_resume out to begin a run beside it."
        )
    if not list_steps(run / CHECKPOINTS):
        return Run(run, None), f"auto_resume: beginning again in {run}, which has no checkpoint."
    found = _newest(run / CHECKPOINTS)
    return Run(run, found), f"auto_resume: going on with {run} from {found.path.name}."


_HELD: Final[dict[Path, int]] = {}
"""Folder of the run that this process trains -> the open descriptor by which it is held."""


def hold(run: Path) -> None:
    """Let other processes know that a run is trained; this one gives it back when it ends."""
    give_back()
    descriptor = os.open(run, os.O_RDONLY)
    with suppress(OSError):  # held already, or a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _HELD[run.resolve()] = descriptor


def give_back() -> None:
    """Let go of the run that this process holds."""
    while _HELD:
        os.close(_HELD.popitem()[1])


def _is_held(run: Path) -> bool:
    """Tell whether another process of this machine trains a run."""
    if run.resolve() in _HELD:
        return False
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(descriptor)
