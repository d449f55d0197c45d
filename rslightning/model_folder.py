"""A model folder in Hugging Face's layout, seen without transformers: configuration and tensors."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from rslightning.assets import PREFIX, resolve_asset
from rslightning.errors import UserError
from rslightning.manifest import MANIFEST_FILE, WAY_OUT, find_damage
from rslightning.storage import open_tensors

CONFIG_FILE: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
WEIGHTS_FILE: Final = "model.safetensors"
HUB_FILES: Final = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")


class ModelFolder:
    """Where a model's tensors are.

    Args:
        path: A folder with `config.json` and safetensors weights, in one file or sharded.

    Raises:
        UserError: If the folder is none, its configuration is no JSON object, or its weights are
            missing, damaged or only there as pickles.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a folder.")
        self.config = read_json(self.path / CONFIG_FILE)

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """File name -> names of its tensors, every file opened and its table read."""
        if (self.path / WEIGHTS_FILE).exists():  # before the index, as transformers does
            files = [WEIGHTS_FILE]
        elif (self.path / INDEX_FILE).exists():
            files = self._indexed_files()
        else:
            raise UserError(self._no_weights())
        shards = {}
        for file in files:
            with open_tensors(self.path / file) as tensors:
                shards[file] = list(tensors.keys())
        return shards

    @cached_property
    def tensor_names(self) -> set[str]:
        """Names of all tensors."""
        return {name for names in self.shards.values() for name in names}

    @cached_property
    def table(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> dtype, as safetensors writes it (`BF16`), and shape of all tensors."""
        table: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file, names in self.shards.items():
            with open_tensors(self.path / file) as tensors:
                for name in names:
                    part = tensors.get_slice(name)
                    table[name] = part.get_dtype(), tuple(part.get_shape())
        return table

    def check_weights(self) -> None:
        """Raise `UserError` unless every weight file is there, readable and of its whole size."""
        _ = self.shards
        if damage := find_damage(self.path, ".safetensors", contents=False):
            raise UserError(f"{self.path} is damaged: {damage}; {WAY_OUT}.")

    def other_files(self) -> list[Path]:
        """Configuration, tokenizer and templates: what is not weights, nor speaks of them."""
        about_weights = (INDEX_FILE, MANIFEST_FILE, "merge_report.json")
        return [path for path in description_files(self.path) if path.name not in about_weights]

    def _indexed_files(self) -> list[str]:
        index = self.path / INDEX_FILE
        weight_map = read_json(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not files or not all(isinstance(file, str) for file in files):
            raise UserError(f"{index} has no weight_map of file names.")
        for file in files:
            if Path(file).name != file:
                raise UserError(f"{index} names {file!r}, outside of its folder.")
        return sorted(set(files))

    def _no_weights(self) -> str:
        pickles = [*self.path.glob("*.bin"), *self.path.glob("*.pt"), *self.path.glob("*.pth")]
        if pickles:
            return (
                f"{self.path} has its weights only as a pickle ({pickles[0].name}), which could "
                "run code when opened; if you trust it, write it as safetensors with rslightning "
                f"convert --pickle {self.path} --output DIR."
            )
        return f"{self.path} has no {WEIGHTS_FILE} and no {INDEX_FILE}."


def description_files(folder: Path) -> list[Path]:
    """Return the files of configuration, tokenizer and templates, and code that they name.

    A model of its own code (`auto_map`) cannot be loaded without; here it is not run.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    settings = (path for path in files if path.name.endswith("config.json"))
    kinds = {".json", ".model", ".txt", ".jinja"}
    if any(b'"auto_map"' in path.read_bytes() for path in settings):
        kinds.add(".py")
    return [path for path in files if path.suffix in kinds]


def find_model_folder(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a model: a folder, `asset:NAME`, or a Hub name (fetched once).

    Raises:
        UserError: If there is no such folder and the Hub does not have it or cannot be reached.
    """
    folder = Path(resolve_asset(name)).expanduser()
    if folder.is_dir():
        return folder
    if _is_path(name):
        raise UserError(f"Base model {name} does not exist.")
    return _fetch(name, revision)


def read_model_config(name: str) -> dict[str, Any]:
    """Return the configuration of a model, of which a Hub name's is fetched alone.

    Raises:
        UserError: As `find_model_folder`, and if there is no JSON object in `config.json`.
    """
    if is_hub_name(name) and not _is_path(name):
        return read_json(_fetch(name, None, (CONFIG_FILE,)) / CONFIG_FILE)
    return read_json(find_model_folder(name) / CONFIG_FILE)


def is_hub_name(name: str) -> bool:
    """Tell whether `find_model_folder` takes `name` to the Hub, where it means the same to all."""
    return not name.startswith(PREFIX) and not Path(name).expanduser().is_dir()


def absolute_name(name: str) -> str:
    """Return a local folder's absolute path; a Hub name or `asset:NAME` as it is."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: If the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object.")
    return value


def unique_key(names: Iterable[str], wanted: str) -> str | None:
    """Return the name under which a checkpoint keeps `wanted`: itself, or without its prefix.

    Some checkpoints leave out the model's outermost segment (`h.0...` for `transformer.h.0...`).
    """
    names = set(names)
    if wanted in names:
        return wanted
    _, _, inner = wanted.partition(".")
    return inner if inner in names else None


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _fetch(name: str, revision: str | None, files: Sequence[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Base model {name} is no folder here and could not be fetched from the Hub: {reason}"
        ) from None
