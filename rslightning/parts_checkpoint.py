"""A checkpoint in parts: each process writes the rows that it has, and reads those that it needs.

The folder holds `part-RANK-of-PROCESSES.safetensors`, in which a tensor's rows continue those of
the part before, and `meta.pt`: whatever is no such tensor, written last. So nothing is gathered,
any number of processes can go on, and no file holds code.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from rslightning.errors import UserError
from rslightning.safe_load import load_plain
from rslightning.storage import open_tensors, save_tensors

META_FILE: Final = "meta.pt"
STATE: Final = "state_dict."
"""Before the names of the module's tensors."""

PART_NAME: Final = re.compile(r"part-(\d+)-of-(\d+)\.safetensors")


def write_part(path: Path, rank: int, processes: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the rows that one of `processes` has of each tensor, [rows, ...], none included."""
    save_tensors(tensors, path / f"part-{rank:05d}-of-{processes:05d}.safetensors")


def is_parts_folder(path: Path) -> bool:
    """Return whether such a checkpoint was written, or begun, here."""
    return path.is_dir() and any(PART_NAME.fullmatch(file.name) for file in path.iterdir())


class Parts:
    """The open files of a folder; see `open_parts`."""

    def __init__(self, files: list[Any]) -> None:
        self._files = files
        self.names: list[str] = list(files[0].keys())

    def count(self, name: str) -> int:
        """Return how many rows a tensor has."""
        return sum(file.get_slice(name).get_shape()[0] for file in self._files)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows [start, stop) of a tensor; no others are read."""
        found: list[Tensor] = []
        first = 0
        for file in self._files:
            part = file.get_slice(name)
            size = part.get_shape()[0]
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high or not found:
                found.append(part[low : max(low, high)])
            first += size
        return torch.cat(found)


@contextmanager
def open_parts(path: Path) -> Iterator[Parts]:
    """Open the parts of a checkpoint.

    Raises:
        UserError: If one is missing or damaged, or they are of several runs.
    """
    found = sorted(file.name for file in path.iterdir() if PART_NAME.fullmatch(file.name))
    processes = {int(match[2]) for name in found if (match := PART_NAME.fullmatch(name))}
    if len(processes) != 1 or processes != {len(found)}:
        raise UserError(
            f"{path} holds {len(found)} parts of {max(processes)}: it was not written or copied to "
            "the end."
        )
    with ExitStack() as stack:
        yield Parts([stack.enter_context(open_tensors(path / name)) for name in found])


def read_meta(path: Path) -> dict[str, Any]:
    """Return what is no tensor in parts.

    Raises:
        UserError: If it is missing, damaged, or holds objects that only a pickle could restore.
    """
    if not (path / META_FILE).exists():
        raise UserError(f"{path} lacks {META_FILE}: it was not written to the end.")
    content: dict[str, Any] = load_plain(path / META_FILE)
    return content


def read_parts_folder(path: Path) -> dict[str, Any]:
    """Return what a checkpoint file would hold but for the optimizer, with whole tensors.

    Raises:
        UserError: As `open_parts` and `read_meta`.
    """
    content = read_meta(path)
    with open_parts(path) as parts:
        state = {
            name.removeprefix(STATE): parts.rows(name, 0, parts.count(name))
            for name in parts.names
            if name.startswith(STATE)
        }
    return {**content, "state_dict": state}
