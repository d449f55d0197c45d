"""Read the trained adapter out of whatever a run left: checkpoint, adapter folder or run folder."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from rslightning.errors import UserError
from rslightning.rslora.adapters import Adapter, LayerAdapter
from rslightning.rslora.peft_format import CONFIG_FILE, read_adapter
from rslightning.rslora.spec import AdapterSpec

MODEL_PREFIX: Final = "model."
"""Under this name a CausalLMModule keeps the language model."""


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
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is no checkpoint that can be opened safely: {reason}") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {error}") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path} holds no state_dict: it is no Lightning checkpoint.")
    return content


def _from_checkpoint(path: Path) -> Adapter:
    checkpoint = read_checkpoint(path)
    hparams = checkpoint.get("hyper_parameters", {})
    if not hparams.get("adapter"):
        raise UserError(
            f"{path} has no adapter: it is from full fine-tuning or another program. The merged/ "
            "folder of a full fine-tuning run is the model itself."
        )
    spec = AdapterSpec(**hparams["adapter"])
    matrices: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint["state_dict"].items():
        module, _, matrix = name.removeprefix(MODEL_PREFIX).rpartition(".")
        matrices.setdefault(module, {})[matrix] = tensor
    try:
        layers = {path_: _layer(path_, pair, spec) for path_, pair in matrices.items()}
    except KeyError as error:
        raise UserError(f"{path} lacks the matrix {error} of an adapter.") from None
    return Adapter(layers, hparams.get("base_model"), spec.dropout)


def _layer(path: str, pair: Mapping[str, Tensor], spec: AdapterSpec) -> LayerAdapter:
    return LayerAdapter(pair["lora_a"], pair["lora_b"], spec.resolve(path))
