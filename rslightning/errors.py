"""The kinds of failure that a user is told about, and how: one sentence and an exit status."""

import os
import signal
import traceback
from typing import Final

DEBUG: Final = "--debug"
DEBUG_VARIABLE: Final = "RSLIGHTNING_DEBUG"


class UserError(ValueError):
    """What the user asked for cannot be done as asked; the message says what to change. Exit 2."""


class RunError(RuntimeError):
    """The request was sound and its execution failed (full disk, lost file). Exit 1."""


class Stopped(RunError):
    """A signal ended the run between two steps, on all processes; exit 128 + its number.

    Schedulers and shells know such a status as that of a process that a signal has ended.

    Args:
        signum: The signal.
        step: How many optimizer steps are done.
    """

    def __init__(self, signum: int, step: int) -> None:
        self.signum = signal.Signals(signum)
        self.status = 128 + signum
        super().__init__(f"stopped by {self.signum.name} after step {step}")


def describe_failure(error: BaseException) -> tuple[str, int]:
    """Return a sentence and an exit status for what ended a command; print where, if asked to."""
    is_asked = os.environ.get(DEBUG_VARIABLE)
    if is_asked:
        traceback.print_exception(error)
    if isinstance(error, Stopped):
        return str(error), error.status
    if isinstance(error, UserError | RunError):
        return str(error), 2 if isinstance(error, UserError) else 1
    text = " ".join(str(error).split())
    where = "" if is_asked else f" (this is unexpected: {DEBUG} shows where it happened)"
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}", 1
