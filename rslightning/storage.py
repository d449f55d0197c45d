"""Files that exist whole or not at all, and tensors in safetensors.

A folder is written aside on the same file system, described by a manifest, flushed, and renamed
into its place. Whenever the process dies, and whenever the machine does, the place holds what was
there before or what is new, whole.
"""

import ctypes
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError, safe_open

from rslightning.errors import RunError, UserError
from rslightning.manifest import write_manifest

if TYPE_CHECKING:
    from torch import Tensor

TENSORS_METADATA = {"format": "pt"}

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
SYNC_FILE_RANGE_WRITE = 2

CODES: Final = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Dtype of torch -> its name in safetensors' format, in the order of the tensors in a file."""


@contextmanager
def new_folder(path: str | Path, replace: bool = False, step: int | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends, and vanishes when it fails.

    Args:
        path: Where the folder shall be; its parents are made.
        replace: Whether a folder that is there already gives way, after the new one is complete.
        step: Optimizer step of a run whose state it holds, for its manifest.

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
        _remove_left_behind(path)
        aside = Path(tempfile.mkdtemp(prefix=f"{_own_mark(path)}{os.getpid()}.", dir=path.parent))
        yield aside
        write_manifest(aside, step)
        put_in_place(aside, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"Could not write {path}: {reason_of(error)}.") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def put_in_place(aside: Path, path: Path) -> None:
    """Flush a file or folder to the disk and rename it `path`, in the place of what is there.

    That is one step of the file system where it can exchange two names (on Linux nearly all can).
    Else a folder's predecessor keeps its content under another name until the new one is there.

    Args:
        aside: What was written, whole, on the file system of `path`.
        path: Its name.

    Raises:
        OSError: If the file system refuses.
    """
    _open_to_others(aside)
    for each in [*aside.rglob("*"), aside]:
        flush(each)  # or the rename would outrun their bytes
    if (aside.is_dir() or path.is_dir()) and path.exists():
        if _exchange(aside, path):
            remove(aside)
        else:
            _replace_folder(aside, path)
    else:
        aside.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Force the bytes of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file that exists whole or not at all.

    Raises:
        OSError: If the file system refuses.
    """
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    put_in_place(aside, path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
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
def tensor_writer(
    path: Path, layout: "Mapping[str, Tensor]"
) -> "Iterator[Callable[[Tensor], None]]":
    """Yield a function that appends a tensor to a safetensors file; use within `new_folder`.

    One tensor at a time is in memory, and the disk writes while the next one is computed. The file
    is, byte for byte, that of `save_tensors`.

    Args:
        path: The file.
        layout: Name -> a tensor of the dtype and shape that will be written (on the meta device,
            say), in the order of `in_file_order`, in which they must come.

    Raises:
        ValueError: If another tensor comes than is expected.
    """
    left = iter(layout.items())
    with path.open("wb") as file:
        file.write(_header(layout))

        def write(tensor: "Tensor") -> None:
            name, expected = next(left)
            if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
                raise ValueError(f"{name} of {path} is {tensor.dtype} {list(tensor.shape)}")
            start = file.tell()
            file.write(_bytes_of(tensor))
            file.flush()
            _start_writing(file.fileno(), start, file.tell() - start)

        yield write
        if (missing := next(left, None)) is not None:
            raise ValueError(f"{missing[0]} of {path} did not come")


def in_file_order(layout: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Sort tensors as safetensors does: the widest dtype first, so that all are aligned; by name.

    Args:
        layout: Name -> tensor.
    """
    order = list(CODES)
    names = sorted(layout, key=lambda name: (order.index(_dtype_name(layout[name])), name))
    return {name: layout[name] for name in names}


def _header(layout: "Mapping[str, Tensor]") -> bytes:
    """Return the beginning of a safetensors file: a length, and JSON that is padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": TENSORS_METADATA}
    end = 0
    for name, tensor in layout.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": CODES[_dtype_name(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dtype_name(tensor: "Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes_of(tensor: "Tensor") -> memoryview:
    import torch

    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _start_writing(descriptor: int, start: int, count: int) -> None:
    """Let the disk begin with what was written; Linux would wait until memory is short."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        begin(descriptor, ctypes.c_int64(start), ctypes.c_int64(count), SYNC_FILE_RANGE_WRITE)


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


def _exchange(aside: Path, path: Path) -> bool:
    """Let two names change places in one step; return False where that is not to be had."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(aside.absolute()), os.fsencode(path.absolute())
    return bool(rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def _replace_folder(aside: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.old.", dir=path.parent) as keep:
        old = path.rename(Path(keep) / path.name)
        try:
            aside.rename(path)
        finally:
            if not path.exists():
                old.rename(path)


def _own_mark(path: Path) -> str:
    """Return how the names begin under which this machine writes `path`."""
    return f".{path.name}.{socket.gethostname()}."


def _remove_left_behind(path: Path) -> None:
    """Remove what processes of this machine have left that died while they wrote `path`."""
    mark = _own_mark(path)
    for other in list(path.parent.iterdir()):
        process = other.name.removeprefix(mark).partition(".")[0]
        if other.name.startswith(mark) and process.isdigit() and not _is_alive(int(process)):
            remove(other)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _open_to_others(folder: Path) -> None:
    """Give the files the permissions that the user's umask grants; libraries write private ones."""
    os.umask(mask := os.umask(0))
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def reason_of(error: Exception) -> str:
    """Return why the file system refused, in its own words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
