"""Weights that a model or adapter folder has only as pickles, written anew as safetensors.

Nothing else of the package opens a `.bin`: this is what the user asks for by name, once, for a
folder that is trusted. The files are opened with `weights_only=True` even then, so that what is no
tensor or plain value ends in an error and is not run.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch

from rslightning.errors import UserError
from rslightning.model_folder import INDEX_FILE, description_files, read_json
from rslightning.safe_load import load_plain
from rslightning.storage import save_tensors

PICKLED_INDEX: Final = "pytorch_model.bin.index.json"


def convert_pickles(folder: Path, aside: Path) -> list[str]:
    """Write a folder's pickled weights as safetensors, beside copies of its description.

    Args:
        folder: A model folder (`pytorch_model*.bin`) or PEFT's adapter folder
            (`adapter_model.bin`), as `save_pretrained` of transformers and PEFT wrote them.
        aside: An empty folder that takes the new files.

    Returns:
        Names of the new files of weights.

    Raises:
        UserError: If there is no such pickle, one is damaged, or holds more than named tensors.
    """
    pickles = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model.bin")])
    if not pickles:
        raise UserError(f"{folder} has no pytorch_model*.bin and no adapter_model.bin to convert.")
    for path in pickles:
        save_tensors(_named_tensors(path), aside / _new_name(path.name))
    for path in description_files(folder):
        if path.name != PICKLED_INDEX:
            shutil.copyfile(path, aside / path.name)
    if (folder / PICKLED_INDEX).exists():
        _write_index(read_json(folder / PICKLED_INDEX), folder, aside)
    return [_new_name(path.name) for path in pickles]


def _new_name(name: str) -> str:
    stem = name.removesuffix(".bin")
    return f"{stem.replace('pytorch_model', 'model', 1)}.safetensors"


def _named_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, each with memory of its own; tied ones are written twice."""
    content: Any = load_plain(path)
    wrong = not isinstance(content, dict) or next(
        (name for name, value in content.items() if not isinstance(value, torch.Tensor)), None
    )
    if wrong:
        raise UserError(f"{path} does not hold named tensors alone, so it is no file of weights.")
    seen: set[int] = set()
    tensors = {}
    for name, tensor in content.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return tensors


def _write_index(index: dict[str, Any], folder: Path, aside: Path) -> None:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and (aside / _new_name(Path(file).name)).exists()
        for file in weight_map.values()
    ):
        raise UserError(f"{folder / PICKLED_INDEX} names files that are not there.")
    weight_map = {name: _new_name(Path(file).name) for name, file in weight_map.items()}
    text = json.dumps({**index, "weight_map": weight_map}, indent=2)
    (aside / INDEX_FILE).write_text(f"{text}\n", encoding="utf-8")
