"""Open what torch.save wrote without running any code from it."""

import io
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from rslightning.errors import UserError

GLOBAL: Final = re.compile(r"GLOBAL ([\w.]+)")


class StandIn:
    """Takes the place of a library's class, whose own code then never runs.

    A dictionary that was the object's state becomes attributes; all else is dropped.
    """

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_plain(path: Path, stood_in: Sequence[str] = (), part: bytes | None = None) -> Any:
    """Return the tensors and plain values of a file.

    Args:
        path: The file.
        stood_in: Full names of classes that may occur, and become a `StandIn`.
        part: What is opened in place of the whole file: bytes of it that are a file of their own.

    Raises:
        UserError: If it is damaged, or holds objects that only a pickle could restore.
    """
    source: Any = path if part is None else io.BytesIO(part)
    if not zipfile.is_zipfile(source):
        raise UserError(f"{path} is damaged, incomplete or no checkpoint.")
    if part is not None:
        source.seek(0)
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in stood_in]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=part is None)
    except Exception as error:  # what is raised depends on the bytes that are found
        raise cannot_be_opened(path, error) from None


def cannot_be_opened(path: Path, error: Exception) -> UserError:
    """Return the error to raise; torch's own text advises to run the code after all."""
    if isinstance(error, pickle.UnpicklingError) and (found := GLOBAL.search(str(error))):
        return UserError(f"{path} cannot be opened: it holds {found[1]}, which could run code.")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(f"{path} cannot be opened: {reason}.")
