"""Where rows come from: a Hub name, a folder or a file, through `datasets`, on one code path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rslightning.assets import resolve_asset
from rslightning.errors import UserError

LOADERS: Final = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
SPLIT_NAMES: Final = {
    "train": ("train",),
    "held_out": ("held_out", "heldout", "validation", "valid", "val", "dev", "test"),
}


def load_rows(path: str, split: str, subset: str | None = None) -> Any | None:
    """Return the rows of one split as a `datasets.Dataset`, or None where it has no such split.

    Args:
        path: Hub name, folder (with a file per split, named after it) or single file (which is the
            training split), or `asset:NAME`.
        split: `train` or `held_out`.
        subset: Configuration of a Hub data set that has several.

    Raises:
        UserError: If nothing readable is at `path`.
    """
    local = Path(resolve_asset(path))
    if local.is_dir():
        return _load_folder(local, split)
    if local.suffix in LOADERS or local.exists():
        return _load_file(local) if split == "train" else None
    if path.startswith((".", "/", "~")):
        raise UserError(f"{path} does not exist.")
    return _load_hub(path, split, subset)


def check_columns(columns: Sequence[str], needed: Sequence[str], path: str) -> None:
    """Raise `UserError` unless all `needed` are among `columns`."""
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}; its columns are {', '.join(columns)}."
        )


def _load_folder(folder: Path, split: str) -> Any | None:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in LOADERS]
    if not files:
        raise UserError(f"{folder} holds no {', '.join(LOADERS)} file.")
    for name in SPLIT_NAMES[split]:
        for path in files:
            if path.stem == name or path.stem.endswith(f"_{name}"):
                return _load_file(path)
    if split == "train" and len(files) == 1:
        return _load_file(files[0])
    if split == "train":
        listed = ", ".join(path.name for path in files)
        raise UserError(f"{folder} has no file named after the split train; it has {listed}.")
    return None


def _load_file(path: Path) -> Any:
    import datasets

    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if path.suffix not in LOADERS:
        raise UserError(f"{path} is no {', '.join(LOADERS)} file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty.")
    try:
        return datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(f"{path} cannot be read: {error.__cause__ or error}.") from None


def _load_hub(name: str, split: str, subset: str | None) -> Any | None:
    import datasets

    try:
        available = datasets.get_dataset_split_names(name, subset)
        for candidate in SPLIT_NAMES[split]:
            if candidate in available:
                return datasets.load_dataset(name, subset, split=candidate)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is neither a file or folder here nor a data set that can be fetched: {error}"
        ) from None
    return None
