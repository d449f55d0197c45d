"""Read the trained adapter out of whatever a run left: checkpoint, adapter folder or run folder."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from rslightning.errors import UserError
from rslightning.rslora.adapters import Adapter, LayerAdapter
from rslightning.rslora.peft_format import CONFIG_FILE, read_adapter
from rslightning.rslora.quantized import QuantizedBase
from rslightning.rslora.spec import AdapterSpec, ResolvedAdapter

MODEL_PREFIX: Final = "model."
"""Under this name a CausalLMModule keeps the language model."""

GLOBAL: Final = re.compile(r"GLOBAL ([\w.]+)")


def load_adapter(path: str | Path) -> Adapter:
    """Return the adapter at `path`.

    Args:
        path: A Lightning checkpoint file, an adapter folder (ours or PEFT's), or a run folder,
            whose `adapter/` is taken.

    Raises:
        UserError: If there is none, or it is damaged or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if path.is_file():
        return _from_checkpoint(path)
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).exists():
            return read_adapter(folder)
    raise UserError(
        f"{path} is neither a checkpoint file nor a folder with {CONFIG_FILE} or adapter/ in it."
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a Lightning checkpoint, opened without running any code from it.

    Raises:
        UserError: If the file is damaged, or holds objects that only a pickle could restore.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is damaged, incomplete or no checkpoint.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what is raised depends on the bytes that are found
        raise UserError(f"{path} cannot be opened: {_reason(error)}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} holds no state_dict: it is no Lightning checkpoint.")
    return content


def _reason(error: Exception) -> str:
    """Say why torch refused; its own text advises to run the code after all."""
    if isinstance(error, pickle.UnpicklingError) and (found := GLOBAL.search(str(error))):
        return f"it holds {found[1]}, which could run code"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _from_checkpoint(path: Path) -> Adapter:
    checkpoint = read_checkpoint(path)
    hparams = checkpoint.get("hyper_parameters") or {}
    spec = _adapter_spec(path, hparams)
    matrices: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint["state_dict"].items():
        module, _, matrix = name.removeprefix(MODEL_PREFIX).rpartition(".")
        matrices.setdefault(module, {})[matrix] = tensor
    if not matrices:
        raise UserError(f"{path} holds no adapter matrices.")
    transposed = checkpoint.get("transposed", ())
    layers = {
        module: _layer(f"{path}: {module}", pair, spec.resolve(module), module in transposed)
        for module, pair in matrices.items()
    }
    quantized = checkpoint.get("quantized")
    base = QuantizedBase(**quantized) if quantized else None
    return Adapter(layers, hparams.get("base_model"), spec.dropout, base)


def _adapter_spec(path: Path, hparams: Mapping[str, Any]) -> AdapterSpec:
    saved = hparams.get("adapter")
    known = {field.name for field in fields(AdapterSpec)}
    if not isinstance(saved, dict) or not saved or not known.issuperset(saved):
        raise UserError(
            f"{path} has no adapter: it is from full fine-tuning or another program. The merged/ "
            "folder of a full fine-tuning run is the model itself."
        )
    return AdapterSpec(**saved)


def _layer(
    name: str, pair: Mapping[str, Tensor], numbers: ResolvedAdapter, transposed: bool
) -> LayerAdapter:
    if set(pair) != {"lora_a", "lora_b"}:
        raise UserError(f"{name} has {', '.join(sorted(pair))} in place of lora_a and lora_b.")
    lora_a, lora_b = pair["lora_a"], pair["lora_b"]
    ranks = (*lora_a.shape[:1], *lora_b.shape[1:])
    if ranks != (numbers.rank, numbers.rank):
        raise UserError(
            f"{name} has matrices of shape {list(lora_a.shape)} and {list(lora_b.shape)}, which "
            f"are not of the rank {numbers.rank} in its hyperparameters."
        )
    return LayerAdapter(lora_a, lora_b, numbers, transposed)
