"""Encoded data sets on disk, under a key of everything that they depend on.

A cache folder exists whole or not at all (it is renamed into place), and is built by one process
while others that want the same one wait for it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from rslightning.errors import RunError
from rslightning.manifest import find_damage
from rslightning.storage import new_folder

FORMAT: Final = 3
"""Part of every key: raise it when what is written changes."""

CACHE_VARIABLE: Final = "RSLIGHTNING_CACHE"


def cache_root() -> Path:
    """Return the folder of all caches: `$RSLIGHTNING_CACHE`, else `~/.cache/rslightning`."""
    return Path(os.environ.get(CACHE_VARIABLE, "~/.cache/rslightning")).expanduser()


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return a name for the content that `parts` (JSON values) determine."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """Return the cache folder of `key`, built by `build(empty folder)` if it is not there.

    Raises:
        RunError: If the file system refuses.
    """
    folder = cache_root() / key
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock")).acquire()
    except OSError as error:
        raise RunError(
            f"The cache folder {folder.parent} cannot be written ({error.strerror}); "
            f"set {CACHE_VARIABLE} to another one."
        ) from None
    with lock:
        if not _is_whole(folder):
            with new_folder(folder, replace=True) as aside:
                build(aside)
    return folder


def _is_whole(folder: Path) -> bool:
    """Tell whether a cache is there with every byte that was written; else it is built anew.

    To read it takes less time than the digest of the files that it was made of, if it was of files.
    """
    return folder.is_dir() and find_damage(folder) is None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
