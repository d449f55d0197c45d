"""One cell of a sweep: its folder, what became of it, and running it.

A cell is a fit in a process of its own. Its folder holds what any fit leaves, and

    output.log     what it printed
    status.json    how it ended; missing while it runs and after a signal stopped or killed it
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from subprocess import Popen
from typing import Final, Literal

import yaml

from rslightning.errors import STOP_SIGNALS
from rslightning.experiments.event_files import read_events

STATUS_FILE: Final = "status.json"
OUTPUT_FILE: Final = "output.log"
LAST_CHECKPOINT: Final = "checkpoints/last.ckpt"
FLUSH_SECONDS: Final = 2

COMMAND: Final = "rslightning.__main__"
"""Where the command is: by its name, since its layer is above this one."""

SPEAKER: Final = "rslightning: "
"""How a sentence of ours that ends a command begins."""

STOPPED: Final = tuple(128 + number for number in STOP_SIGNALS)
"""Statuses of a fit that a signal has ended in order, or an interrupt before its first step."""

TRAINING, HELD_OUT = "train/loss", "val/loss"


@dataclass(frozen=True)
class Status:
    """How a cell ended.

    Attributes:
        state: `finished`, or `failed`: it said why, and would again.
        message: The sentence that it ended with, empty where all went well.
    """

    state: Literal["finished", "failed"]
    message: str = ""


@dataclass(frozen=True)
class Task:
    """A cell that is to be run.

    Attributes:
        name: The cell's.
        folder: Where it writes.
        arguments: Options of its fit, without those that go on from a checkpoint.
        in_processes: Whether the fit starts processes of its own.
        devices: What `CUDA_VISIBLE_DEVICES` shall be; None leaves it.
    """

    name: str
    folder: Path
    arguments: list[str]
    in_processes: bool = False
    devices: str | None = None


def logger_arguments(sweep: Path, name: str) -> list[str]:
    """Return the options that make a fit write into the folder of its cell."""
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {
            "save_dir": str(sweep.parent),
            "name": sweep.name,
            "version": name,
            "default_hp_metric": False,
        },
        "dict_kwargs": {"flush_secs": FLUSH_SECONDS},  # for whoever watches
    }
    return ["--trainer.logger", json.dumps(logger), "--trainer.enable_progress_bar", "false"]


def read_status(folder: Path) -> Status | None:
    """Return how a cell ended, None if it did not."""
    try:
        content = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
        return Status(content["state"], content["message"])
    except (OSError, ValueError, KeyError):
        return None


def write_status(folder: Path, status: Status) -> None:
    """Write how a cell ended; the file is there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{STATUS_FILE}"
    aside.write_text(json.dumps(asdict(status)) + "\n", encoding="utf-8")
    aside.replace(folder / STATUS_FILE)


def run_cell(task: Task) -> None:
    """Run a cell to its end in this process, and write how it ended, unless a signal ended it.

    It goes on from the last checkpoint of the folder. Should events of the time before that be
    missing then, since a killed process took them along, it runs again from its beginning.
    """
    goes_on = (task.folder / LAST_CHECKPOINT).exists()
    status = _fit(task)
    if goes_on and status == Status("finished") and has_gaps(task.folder):
        forget(task.folder)
        status = _fit(task)
    if status is not None:
        write_status(task.folder, status)


def forget(folder: Path) -> None:
    """Remove what a cell has left, but its output."""
    for name in ("checkpoints", "adapter", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in [*folder.glob("events.out.*"), *folder.glob("config*.yaml"), folder / STATUS_FILE]:
        path.unlink(missing_ok=True)


def has_gaps(folder: Path) -> bool:
    """Tell whether the event files of a cell lack a loss that the fit has logged."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    trainer, curves = config["trainer"], read_events(folder).curves
    intervals = {TRAINING: trainer["log_every_n_steps"], HELD_OUT: trainer["val_check_interval"]}
    if trainer["limit_val_batches"] == 0 or trainer["accumulate_grad_batches"] != 1:
        del intervals[HELD_OUT]
    return any(
        len(curves[tag].steps if tag in curves else ()) < trainer["max_steps"] // every
        for tag, every in intervals.items()
        if isinstance(every, int)
    )


def _fit(task: Task) -> Status | None:
    """Run a fit; return how it ended, None where a signal did that: it would go on if run again."""
    checkpoint = task.folder / LAST_CHECKPOINT
    goes_on = ["--ckpt_path", str(checkpoint)] if checkpoint.exists() else []
    arguments = ["fit", *task.arguments, *goes_on]
    task.folder.mkdir(parents=True, exist_ok=True)
    output = task.folder / OUTPUT_FILE
    with output_to(output):
        code = _in_processes(arguments) if task.in_processes else _here(arguments)
    if code in STOPPED or code < 0:
        return None
    return Status("finished") if code == 0 else Status("failed", last_line(output))


def _here(arguments: Sequence[str]) -> int:
    try:
        return int(import_module(COMMAND).main(arguments))
    except Exception:
        traceback.print_exc()
        return 1


def _in_processes(arguments: Sequence[str]) -> int:
    """Run a fit that starts processes of its own: Lightning starts them as it was started."""
    command = [sys.executable, "-m", "rslightning", *arguments]
    return Popen(command, env=alone(os.environ)).wait()


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without SLURM's variables, which speak of the sweep's processes."""
    return {name: v for name, v in environment.items() if not name.startswith("SLURM_")}


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append what this process and its children print to a file."""
    streams = sys.stdout, sys.stderr
    kept = [os.dup(stream.fileno()) for stream in streams]
    with path.open("a", encoding="utf-8") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            for stream, descriptor, number in zip(streams, kept, (1, 2), strict=True):
                stream.flush()
                os.dup2(descriptor, number)
                os.close(descriptor)


def last_line(path: Path) -> str:
    """Return the last line of an output that says something: an error, where one ended it."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line] or ["no output"]
    said = [line for line in lines if line.startswith(SPEAKER)]
    return said[-1].removeprefix(SPEAKER) if said else lines[-1]
