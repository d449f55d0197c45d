"""Which files of a folder belong to a split: those that are named after it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rslightning.data.files import COMPRESSED, LOADERS
from rslightning.errors import UserError

TRAIN: Final = ("train", "training")
VALIDATION: Final = (
    ("held_out", "held-out", "heldout"),
    ("validation", "valid", "val"),
    ("dev",),
    ("eval", "evaluation"),
)
TEST: Final = ("test", "testing")
SPLIT_NAMES: Final = {
    "train": (TRAIN,),
    "held_out": (*VALIDATION, TEST),
    "test": (TEST, *VALIDATION),
}
"""Split -> what it may be called; the first names that are there count."""

NAMED_FILES: Final = 6  # in an error


class Part(NamedTuple):
    """A file of a split, and what its name says: what of, which number, of how many."""

    path: Path
    series: str
    number: int | None
    total: int | None


def files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the files of a split in order; none where the folder has no such split.

    A file is named after a split as `train`, `gsm8k-train` and `Train_2` are, or of several parts
    `train-00000-of-00002` (perhaps with a hash behind). In a folder where no name speaks of a split
    all files are training rows. Folders in it and hidden files are left out.

    Raises:
        UserError: If there is no file to read, none of the training split, one of several that do
            not say how they belong together, or not all parts of the split.
    """
    files = [path for path in sorted(folder.iterdir()) if _stem(path)]
    if not files:
        raise UserError(f"{folder} holds no {', '.join(LOADERS)} file.")
    for names in SPLIT_NAMES[split]:
        if parts := _named_after(files, names):
            return _in_order(folder, names[0], parts)
    if split != "train":
        return []
    if any(_speaks_of_a_split(path) for path in files):
        raise UserError(
            f"{folder} has no file named after the split train; it has {_listed(files)}. "
            "Name the training rows train.jsonl, say, or give the path of their file."
        )
    return files


def _stem(path: Path) -> str:
    """Return a file's name without its suffix, in snake case; empty if it is none with rows."""
    name = Path(path.stem) if path.suffix in COMPRESSED else path
    if name.suffix not in LOADERS or path.name.startswith("."):
        return ""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.stem).lower()


def _named_after(files: Sequence[Path], names: Sequence[str]) -> list[Part]:
    pattern = re.compile(
        rf"(?P<series>(.*[-_. ])?({'|'.join(names)}))"
        r"(-(?P<part>\d+)-of-(?P<total>\d+)(-[0-9a-f]{16})?|[-_. ]?(?P<number>\d+))?"
    )
    matches = [(path, match) for path in files if (match := pattern.fullmatch(_stem(path)))]
    return [
        Part(
            path, match["series"], _whole(match["part"] or match["number"]), _whole(match["total"])
        )
        for path, match in matches
    ]


def _whole(digits: str | None) -> int | None:
    return int(digits) if digits else None


def _in_order(folder: Path, split: str, parts: Sequence[Part]) -> list[Path]:
    """Return the files of parts that belong together, all there are, by their numbers."""
    numbers = {part.number: part.path for part in parts}
    series = {(part.series, part.total) for part in parts}
    listed = _listed([part.path for part in parts])
    if len(numbers) < len(parts) or len(series) > 1 or (None in numbers and len(parts) > 1):
        raise UserError(
            f"{folder} has several files of the split {split}, not numbered as its parts: "
            f"{listed}. Keep one, or name them {split}-00000-of-{len(parts):05} and so on."
        )
    total = parts[0].total
    if total is not None and set(numbers) not in (set(range(total)), set(range(1, total + 1))):
        raise UserError(
            f"{folder} lacks some of the {total} parts of the split {split}; it has {listed}."
        )
    return [path for _, path in sorted(numbers.items(), key=lambda item: item[0] or 0)]


def _speaks_of_a_split(path: Path) -> bool:
    """Tell whether a split other than the training split is a word of a file's name."""
    names = "|".join(name for names in SPLIT_NAMES["test"] for name in names)
    return re.search(rf"(?<![a-z])({names})(?![a-z])", _stem(path)) is not None


def _listed(files: Sequence[Path]) -> str:
    listed = ", ".join(path.name for path in files[:NAMED_FILES])
    return f"{listed} and {len(files) - NAMED_FILES} more" if len(files) > NAMED_FILES else listed
