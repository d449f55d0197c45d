"""The folder of a run's checkpoints: which one is the newest that is whole.

In the run's folder it is beside `adapter/` and `merged/`. It holds `step-N.ckpt`, files or folders,
and `last.ckpt`, a link to the one that was saved last.
"""

import re
from pathlib import Path
from typing import Final

from rslightning.errors import UserError
from rslightning.manifest import find_damage
from rslightning.safe_load import load_plain
from rslightning.storage import flush, remove

CHECKPOINTS: Final = "checkpoints"
ADAPTER_FOLDER: Final = "adapter"  # what the run trained, and merged into its base, when it ends
MERGED_FOLDER: Final = "merged"
LAST: Final = "last.ckpt"
STEP_NAME: Final = re.compile(r"step-(\d+)\.ckpt")


def step_name(step: int) -> str:
    """Return the name of the checkpoint of an optimizer step."""
    return f"step-{step}.ckpt"


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of each checkpoint in a folder, the newest last."""
    paths = list(folder.iterdir()) if folder.is_dir() else []
    matches = [(STEP_NAME.fullmatch(path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in matches if match)


def point_last(folder: Path, step: int) -> None:
    """Let `last.ckpt` mean the checkpoint of a step, in one step of the file system.

    Raises:
        OSError: If the file system refuses.
    """
    aside, last = folder / f".{LAST}", folder / LAST
    remove(aside)
    aside.symlink_to(step_name(step))
    if last.is_dir() and not last.is_symlink():
        remove(last)  # a copy, in which a link became what it pointed to
    aside.replace(last)
    flush(folder)


def damage_of(path: Path) -> str | None:
    """Return in a few words what is wrong with a checkpoint; None if it can be gone on from."""
    damage = find_damage(path)
    if damage is None and not path.is_dir():
        try:
            load_plain(path)
        except UserError as error:
            return str(error).removeprefix(f"{path} ").rstrip(".")
    return damage


def newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """Return the newest checkpoint that is whole, and a sentence for each newer one that is not.

    The newest is what `last.ckpt` means, or one that was saved after that and before the process
    died that would have moved the link. Every byte is read.

    Args:
        folder: A folder of checkpoints.

    Raises:
        UserError: If there is none, or none is whole.
    """
    damaged: list[str] = []
    candidates = newest_first(folder)
    for path in candidates:
        damage = damage_of(path)
        if damage is None:
            return path, damaged
        damaged.append(f"{path} is not whole ({damage})")
    if damaged:
        raise UserError(f"No checkpoint can be gone on from: {'; '.join(damaged)}.")
    raise UserError(f"There is no checkpoint in {folder}.")


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints that `newest_whole` looks at, whole or not, in that order."""
    steps, last = list_steps(folder)[::-1], folder / LAST
    if last.is_symlink():
        match = STEP_NAME.fullmatch(str(last.readlink()))
        target = int(match[1]) if match else -1
        since = last.lstat().st_mtime_ns
        return [p for step, p in steps if step <= target or p.stat().st_mtime_ns > since]
    return ([last] if last.exists() else []) + [path for _, path in steps]
