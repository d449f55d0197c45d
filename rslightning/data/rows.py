"""Where rows come from: a Hub name, a folder or a file, through `datasets`, on one code path."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rslightning.assets import resolve_asset
from rslightning.data.cache import file_digest
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


class Rows:
    """The rows of one split, not yet read.

    Args:
        source: A local file, or (Hub name, configuration, split).
    """

    def __init__(self, source: Path | tuple[str, str | None, str]) -> None:
        self.source = source

    @property
    def name(self) -> str:
        """What a person calls the place that the rows come from."""
        return str(self.source) if isinstance(self.source, Path) else self.source[0]

    def open(self) -> Any:
        """Return the rows as a `datasets.Dataset`, memory-mapped.

        Raises:
            UserError: If they cannot be read; of JSON lines the first bad one is named.
        """
        import datasets

        if not isinstance(self.source, Path):
            name, subset, split = self.source
            return datasets.load_dataset(name, subset, split=split)
        kind = LOADERS[self.source.suffix]
        try:
            return datasets.load_dataset(kind, data_files=str(self.source), split="train")
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            if kind == "json":
                _refuse_bad_line(self.source)
            raise UserError(f"{self.source} cannot be read: {_reason(error)}.") from None

    def identity(self) -> Any:
        """Return JSON values that change when the rows do, without tokenizing them."""
        if isinstance(self.source, Path):
            return file_digest(self.source)
        return [*self.source, self.open()._fingerprint]


def find_rows(path: str, split: str, subset: str | None = None) -> Rows | None:
    """Return the rows of one split, or None where the data has no such split.

    Args:
        path: Hub name, folder (with a file per split, named after it) or single file (which is the
            training split), or `asset:NAME`.
        split: `train` or `held_out`.
        subset: Configuration of a Hub data set that has several.

    Raises:
        UserError: If nothing readable is at `path`.
    """
    local = Path(resolve_asset(path)).expanduser()
    if local.is_dir():
        file = _file_of_split(local, split)
    elif local.suffix in LOADERS or local.exists():
        file = local if split == "train" else None
    elif path.startswith((".", "/", "~")):
        raise UserError(f"{path} does not exist.")
    else:
        return _find_on_hub(path, split, subset)
    if file is None:
        return None
    _check_file(file)
    return Rows(file)


def check_columns(columns: Sequence[str], needed: Sequence[str], path: str) -> None:
    """Raise `UserError` unless all `needed` are among `columns`."""
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}; its columns are {', '.join(columns)}."
        )


def _file_of_split(folder: Path, split: str) -> Path | None:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in LOADERS]
    if not files:
        raise UserError(f"{folder} holds no {', '.join(LOADERS)} file.")
    for name in SPLIT_NAMES[split]:
        for path in files:
            if path.stem == name or path.stem.endswith(f"_{name}"):
                return path
    if split == "train" and len(files) == 1:
        return files[0]
    if split == "train":
        listed = ", ".join(path.name for path in files)
        raise UserError(f"{folder} has no file named after the split train; it has {listed}.")
    return None


def _check_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if path.suffix not in LOADERS:
        raise UserError(f"{path} is no {', '.join(LOADERS)} file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty.")


def _find_on_hub(name: str, split: str, subset: str | None) -> Rows | None:
    import datasets

    try:
        available = datasets.get_dataset_split_names(name, subset)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} is neither a file or folder here nor a data set that can be fetched: "
            f"{_reason(error)}."
        ) from None
    found = next((s for s in SPLIT_NAMES[split] if s in available), None)
    return Rows((name, subset, found)) if found else None


def _refuse_bad_line(path: Path) -> None:
    """Raise `UserError` that names the first line that is no JSON object, if there is one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line.decode("utf-8")) if line.strip() else {}
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}, is not UTF-8 text.") from None
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is not JSON: {error}.") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}, is JSON, but no object of columns.")


def _reason(error: Exception) -> str:
    """Return the first line of what went wrong; `datasets` wraps the errors of its readers."""
    lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".!")
