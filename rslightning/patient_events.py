"""TensorBoard's event files on a full disk: what is refused waits, and is written later.

TensorBoard's own writer ends its thread at the first error, and every event after that raises it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any, Final

from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.compat.tensorflow_stub.io import gfile

from rslightning.errors import RunError
from rslightning.storage import reason_of

MOST_BYTES: Final = 2**26
"""Of one file, that wait at most; what comes then is lost, and told at the end."""


class PatientFiles(gfile.LocalFileSystem):  # type: ignore[misc]  # tensorboard has no types
    """The local file system, on which an append that fails is repeated with the next one."""

    def __init__(self) -> None:
        self._waiting: dict[str, bytes] = {}
        self._refused: set[str] = set()  # of which it has been told
        self._lost = 0
        self._lock = Lock()

    def write(self, filename: Any, file_content: Any, binary_mode: bool = False) -> None:
        """Begin a file; one that is there already is emptied."""
        with suppress(FileNotFoundError):
            os.truncate(filename, 0)
        self.append(filename, file_content, binary_mode)

    def append(self, filename: Any, file_content: Any, binary_mode: bool = False) -> None:
        """Append to a file, after whatever waits for it."""
        # TensorBoard's thread writes later, when the working folder may be another one.
        path = str(Path(os.fsdecode(filename)).absolute())
        content = file_content if isinstance(file_content, bytes) else str(file_content).encode()
        with self._lock:
            self._append(path, self._waiting.pop(path, b"") + content)

    def _append(self, path: str, content: bytes) -> None:
        size = Path(path).stat().st_size if Path(path).exists() else 0
        try:
            super().append(path, content, binary_mode=True)
            self._refused.discard(path)
        except OSError as error:
            with suppress(OSError):  # a part of it may be there: the rest of the file would be lost
                os.truncate(path, size)
            kept = content[:MOST_BYTES]
            self._lost += len(content) - len(kept)
            self._waiting[path] = kept
            if path not in self._refused:
                self._refused.add(path)
                rank_zero_warn(f"Events wait, since {path} cannot be written: {reason_of(error)}.")

    def finish(self) -> None:
        """Write what waits, now that the run is over.

        Raises:
            RunError: If that fails again, or something was lost.
        """
        with self._lock:
            for path, content in list(self._waiting.items()):
                del self._waiting[path]
                with suppress(OSError):
                    self._append(path, content)
            left = sum(map(len, self._waiting.values())) + self._lost
            paths = ", ".join(self._waiting)
            self._waiting, self._lost = {}, 0
        if left:
            where = f" of {paths}" if paths else ""
            raise RunError(f"The disk took no more: {left:,} bytes of events{where} are missing.")


@contextmanager
def waiting_events() -> Iterator[None]:
    """Let TensorBoard's events wait for the disk within the block.

    Raises:
        RunError: At its end, if some are still missing then.
    """
    files, before = PatientFiles(), gfile.get_filesystem("")
    gfile.register_filesystem("", files)
    try:
        yield
        files.finish()
    finally:
        gfile.register_filesystem("", before)
