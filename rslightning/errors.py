"""The kinds of failure that a user is told about, and how: one sentence and an exit status."""

import os
import signal
import tempfile
import traceback
from pathlib import Path
from typing import Final

from rslightning.redaction import redact

DEBUG: Final = "--debug"
DEBUG_VARIABLE: Final = "RSLIGHTNING_DEBUG"


class UserError(ValueError):
    """What the user asked for cannot be done as asked; the message says what to change. Exit 2."""


class RunError(RuntimeError):
    """The request was sound and its execution failed (full disk, lost file). Exit 1."""


STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Told to end, Ctrl-C, SLURM's ahead of its time limit, and a terminal that is closed."""


class StoppedError(RunError):
    """A signal ended the run between two steps or batches; exit 128 + its number.

    Schedulers and shells know such a status as that of a process that a signal has ended.

    Args:
        signum: The signal.
        step: How many optimizer steps are done; None where none is made.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        self.signum = signal.Signals(signum)
        self.status = 128 + signum
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {self.signum.name}{after}")


def describe_failure(error: BaseException) -> tuple[str, int]:
    """Return a sentence and an exit status for what ended a command.

    Where that is unexpected, its traceback is written into a temporary file, which the sentence
    names: a run of days need not be repeated to see it. With `--debug`, it is printed.
    """
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    if isinstance(error, StoppedError):
        return str(error), error.status
    said = " ".join(str(error).split())
    if isinstance(error, UserError | RunError):
        return said, 2 if isinstance(error, UserError) else 1
    text = ": ".join(filter(None, [type(error).__name__, said]))
    return f"{text} ({_keep_traceback(error)})", 1


def _keep_traceback(error: BaseException) -> str:
    """Return, in a few words, where to find the traceback of an error."""
    path = Path(tempfile.gettempdir()) / f"rslightning-error-{os.getpid()}.txt"
    try:
        path.write_text(redact("".join(traceback.format_exception(error))), encoding="utf-8")
    except OSError:
        return f"this is unexpected: {DEBUG} shows where it happened"
    return f"this is unexpected: {path} shows where it happened"
