"""Files that exist whole or not at all, and tensors in safetensors.

A folder is written aside on the same file system, flushed, and renamed into its place.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from rslightning.errors import RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor

TENSORS_METADATA = {"format": "pt"}


@contextmanager
def new_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends, and vanishes when it fails.

    Args:
        path: Where the folder shall be; its parents are made.
        replace: Whether a folder that is there already gives way, after the new one is complete.

    Raises:
        UserError: If `path` is a file, or not empty and `replace` is false.
        RunError: If the file system refuses: no space, no permission, not a folder.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose another folder or remove it.")
    if not replace and path.exists() and any(path.iterdir()):
        raise UserError(f"{path} exists and is not empty; choose another folder or remove it.")
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield aside
        _open_to_others(aside)
        _flush(aside)
        _move_into_place(aside, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"Could not write {path}: {_reason(error)}.") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def put_in_place(aside: Path, path: Path) -> None:
    """Flush a file or folder to the disk and rename it `path`, in the place of what is there.

    Args:
        aside: What was written, whole, on the file system of `path`.
        path: Its name. A file replaces a file in one step; a folder's predecessor keeps its content
            under another name until the new one is there.

    Raises:
        OSError: If the file system refuses.
    """
    _open_to_others(aside)
    _flush(aside)
    if aside.is_dir() or path.is_dir():
        _move_into_place(aside, path)
    else:
        aside.replace(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path) -> None:
    """Write `tensors` to the safetensors file `path`; use within `new_folder`."""
    from safetensors.torch import save_file  # imports torch, which folders do without

    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        path,
        metadata=TENSORS_METADATA,
    )


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading tensor by tensor, memory-mapped.

    Raises:
        UserError: If the file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); it is damaged or incomplete: "
            "copy or download it again."
        ) from None


def _move_into_place(aside: Path, path: Path) -> None:
    if not path.exists():
        aside.rename(path)
        return
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.old.", dir=path.parent) as keep:
        old = path.rename(Path(keep) / path.name)
        try:
            aside.rename(path)
        finally:
            if not path.exists():
                old.rename(path)


def _open_to_others(folder: Path) -> None:
    """Give the files the permissions that the user's umask grants; libraries write private ones."""
    os.umask(mask := os.umask(0))
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _flush(folder: Path) -> None:
    """Force a file, or all of a folder, to the disk: the rename must not outrun their bytes."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
