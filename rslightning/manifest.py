"""What a folder of ours held when it was written: `manifest.json`, sizes and checksums.

It tells a whole folder from one that was copied in part, or damaged since. The checksum is CRC-32:
it finds accidents, not forgeries. A checkpoint that is one file needs no manifest: it is a zip
archive, whose directory has the size and the CRC-32 of every entry.
"""

import json
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

MANIFEST_FILE: Final = "manifest.json"
BLOCK_BYTES: Final = 2**22
DOS_FOLDER: Final = 0x10  # of a zip entry's external attributes

WAY_OUT: Final = (
    f"copy or write it again, or remove its {MANIFEST_FILE} if another program changed it rightly"
)


def write_manifest(folder: Path, step: int | None = None) -> None:
    """Write `manifest.json` over all files of a folder that is complete otherwise.

    Args:
        folder: The folder.
        step: Optimizer step of a run whose state it holds, if it does.
    """
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST_FILE]
    with ThreadPoolExecutor() as threads:
        checksums = list(threads.map(_crc32, paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum}
        for path, checksum in zip(paths, checksums, strict=True)
    }
    content = {"files": files} if step is None else {"files": files, "step": step}
    text = json.dumps(content, indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def step_of(folder: Path) -> int | None:
    """Return the optimizer step whose state a folder holds, None where that is not known."""
    try:
        step = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("step")
    except (OSError, ValueError, AttributeError):
        return None
    return step if isinstance(step, int) else None


def find_damage(path: Path, suffix: str = "", contents: bool = True) -> str | None:
    """Return in a few words what is wrong with what we wrote, None if nothing is found.

    A folder without a manifest, as another program writes it, has nothing wrong with it.

    Args:
        path: A folder, or a checkpoint that is one file.
        suffix: How the names of the files end that are looked at, of a folder's.
        contents: Whether to read every byte; else sizes alone are compared.
    """
    if not path.is_dir():
        return _damage_of_archive(path, contents)
    if not (path / MANIFEST_FILE).exists():
        return None
    try:
        files: Any = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, (size, checksum) in expected.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{MANIFEST_FILE} names {name}, which is outside of the folder"
        if not name.endswith(suffix):
            continue
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes and was written with {size:,}"
        if contents and _crc32(file) != checksum:
            return f"{name} has other bytes than were written"
    return None


def _damage_of_archive(path: Path, contents: bool) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if contents else None
            folders = [entry.filename for entry in archive.infolist() if _is_folder(entry)]
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError):
        return "it ends too early, or its directory is damaged"
    if damaged is None and folders:
        return f"its entry {folders[0]} is marked as a folder"
    return None if damaged is None else f"its entry {damaged} has other bytes than were written"


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    """Tell whether torch would take an entry for a folder, and leave its tensor as memory was."""
    return entry.is_dir() or bool(entry.external_attr & DOS_FOLDER)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum
