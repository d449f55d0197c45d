"""Kill a process at every step that it makes on files, as a power cut would, too.

A forked process does something, and its system calls are watched (`ptrace`). Those that change
files in a folder are its events; successive writes to one file are a single one. At a point, the
process is killed just before an event. Then, `torn`, the power goes: of every file that was written
and not flushed since, only the first half is left.
"""

import ctypes
import errno
import os
import platform
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

TRACEME, CONTINUE, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 7, 24, 0x4200, 0x420E
STOPS_ARE_MARKED, DIES_WITH_TRACER = 0x1, 0x100000
ENTRY = 1

# Name -> number, and which argument is the file: a descriptor, or a path.
CALLS = {
    "x86_64": {
        "open": 2,
        "openat": 257,
        "write": 1,
        "pwrite64": 18,
        "writev": 20,
        "sendfile": 40,
        "copy_file_range": 326,
        "ftruncate": 77,
        "fsync": 74,
        "fdatasync": 75,
        "rename": 82,
        "renameat": 264,
        "renameat2": 316,
        "unlink": 87,
        "unlinkat": 263,
        "rmdir": 84,
        "mkdir": 83,
        "mkdirat": 258,
        "symlink": 88,
        "symlinkat": 266,
        "link": 86,
        "linkat": 265,
    },
    "aarch64": {
        "openat": 56,
        "write": 64,
        "pwrite64": 68,
        "writev": 66,
        "sendfile": 71,
        "copy_file_range": 285,
        "ftruncate": 46,
        "fsync": 82,
        "fdatasync": 83,
        "renameat": 38,
        "renameat2": 276,
        "unlinkat": 35,
        "mkdirat": 34,
        "symlinkat": 36,
        "linkat": 37,
    },
}
WRITES = {"write": 0, "pwrite64": 0, "writev": 0, "sendfile": 0, "copy_file_range": 2}
FLUSHES = {"fsync", "fdatasync"}
BY_DESCRIPTOR = WRITES | dict.fromkeys(FLUSHES | {"ftruncate"}, 0)
# Which argument is the path that changes; of `...at`, a descriptor of its folder is before it.
BY_PATH = {
    "open": 0,
    "openat": 1,
    "rename": 1,
    "renameat": 3,
    "renameat2": 3,
    "unlink": 0,
    "unlinkat": 1,
    "rmdir": 0,
    "mkdir": 0,
    "mkdirat": 1,
    "symlink": 1,
    "symlinkat": 2,
    "link": 1,
    "linkat": 3,
}
CHANGES = os.O_CREAT | os.O_TRUNC
ASIDE = re.compile(r"/\.[^/]+")  # names that differ from run to run


class Event(NamedTuple):
    """A change of a file that is about to be made."""

    call: str
    path: str


class Run(NamedTuple):
    """What a watched process did until it ended or was killed."""

    events: list[Event]
    unflushed: set[tuple[int, int]]  # device and inode


class _Info(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("_pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
LIBC.ptrace.restype = ctypes.c_long


def ptrace(request: int, process: int = 0, address: int = 0, data: int = 0) -> None:
    if LIBC.ptrace(request, process, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def can_watch() -> bool:
    """Tell whether processes may be watched here."""
    try:
        return bool(watch(lambda: None, Path("/nowhere")).events == [])
    except (OSError, KeyError):
        return False


def watch(act: Callable[[], None], folder: Path, stop_before: int | None = None) -> Run:
    """Let a forked process do something, and kill it before an event, if one is given."""
    names = {number: name for name, number in CALLS[platform.machine()].items()}
    if (child := os.fork()) == 0:
        _act(act)
    os.waitpid(child, 0)
    ptrace(SETOPTIONS, child, 0, STOPS_ARE_MARKED | DIES_WITH_TRACER)
    run, last, passed = Run([], set()), None, 0
    while True:
        ptrace(SYSCALL, child, 0, passed)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            code = os.waitstatus_to_exitcode(status)
            assert code == 0, f"the watched process ended with {code}"
            return run
        stop = os.WSTOPSIG(status)
        passed = 0 if stop == signal.SIGTRAP | 0x80 else stop
        if passed:
            continue
        info = _Info()
        ptrace(GET_SYSCALL_INFO, child, ctypes.sizeof(info), ctypes.addressof(info))
        name = names.get(info.number) if info.op == ENTRY else None
        if name is None or (path := _changed(child, name, list(info.arguments))) is None:
            continue
        if not path.startswith(f"{folder}/") and path != str(folder):
            continue
        event = Event("write" if name in WRITES else name, ASIDE.sub("/.aside", path))
        if not (name in WRITES and last == event):
            if len(run.events) == stop_before:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return run
            run.events.append(event)
        last = event
        _note(child, run, name, list(info.arguments))


def _act(act: Callable[[], None]) -> None:
    try:
        ptrace(TRACEME)
        os.kill(os.getpid(), signal.SIGSTOP)
        torch.set_num_threads(1)  # those of OpenMP stayed in the process that was forked
        act()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _changed(process: int, name: str, arguments: list[int]) -> str | None:
    """Return the path that a call is about to change."""
    if name in BY_DESCRIPTOR:
        return _opened(process, arguments[BY_DESCRIPTOR[name]])
    place = BY_PATH[name]
    flags = {"open": 1, "openat": 2}.get(name)
    if flags is not None and not arguments[flags] & CHANGES:
        return None
    path = Path(_text(process, arguments[place]))
    if path.is_absolute():
        return str(path)
    has_folder = "at" in name  # else it is relative to where the process is
    inside = _opened(process, arguments[place - 1]) if has_folder else None
    return str(Path(inside or str(Path(f"/proc/{process}/cwd").readlink())) / path)


def _opened(process: int, descriptor: int) -> str | None:
    try:
        return str(Path(f"/proc/{process}/fd/{descriptor}").readlink())
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def _note(process: int, run: Run, name: str, arguments: list[int]) -> None:
    """Remember what is written and not flushed."""
    if name in WRITES or name in FLUSHES:
        found = Path(f"/proc/{process}/fd/{arguments[BY_DESCRIPTOR[name]]}").stat()
        inode = (found.st_dev, found.st_ino)
        (run.unflushed.discard if name in FLUSHES else run.unflushed.add)(inode)


def _text(process: int, address: int) -> str:
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).partition(b"\0")[0].decode()


def cut_power(run: Run, folder: Path) -> bool:
    """Leave half of each file that was not flushed; return whether there was one."""
    found = False
    for path in folder.rglob("*"):
        status = path.lstat()
        if path.is_file() and (status.st_dev, status.st_ino) in run.unflushed and status.st_size:
            os.truncate(path, status.st_size // 2)
            found = True
    return found


class Point(NamedTuple):
    """Where a process was killed."""

    number: int
    event: Event | None  # what it was about to do; None after the last one
    torn: bool


def crash_points(
    act: Callable[[], None], folder: Path, begin: Callable[[], None]
) -> Iterator[Point]:
    """Yield each point at which `act` can die, when it has.

    Args:
        act: What is done in a forked process.
        folder: Where it changes files.
        begin: Puts the folder into its first state.
    """
    begin()
    events = watch(act, folder).events
    for number in range(len(events) + 1):
        event = events[number] if number < len(events) else None
        for torn in (False, True):
            begin()
            run = watch(act, folder, number)
            assert run.events == events[:number], "it does something else each time"
            if not torn or cut_power(run, folder):
                yield Point(number, event, torn)
