"""Read the trained adapter out of whatever a run left: checkpoint, adapter folder or run folder."""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from rslightning.checkpoint_folder import (
    ADAPTER_FOLDER,
    CHECKPOINTS,
    STEP_NAME,
    newest_first,
    newest_whole,
)
from rslightning.deepspeed_checkpoint import is_deepspeed_folder, read_deepspeed_folder
from rslightning.distributed_checkpoint import is_distributed_folder, read_distributed_folder
from rslightning.errors import UserError
from rslightning.manifest import step_of
from rslightning.parts_checkpoint import is_parts_folder, read_parts_folder
from rslightning.rslora.adapters import Adapter, LayerAdapter, plain_adapter
from rslightning.rslora.peft_format import CONFIG_FILE, read_adapter
from rslightning.rslora.quantized import QuantizedBase
from rslightning.rslora.spec import AdapterSpec, ResolvedAdapter
from rslightning.safe_load import load_plain

MODEL_PREFIX: Final = "model."
"""Under this name a CausalLMModule keeps the language model."""

MATRICES: Final = ("lora_a", "lora_b")


def load_adapter(path: str | Path) -> Adapter:
    """Return the adapter at `path`, which is anything that `find_state` takes.

    Raises:
        UserError: If there is none, or it is damaged or of another kind.
    """
    state, said = find_state(Path(path))
    for sentence in said:
        warnings.warn(sentence, stacklevel=2)
    return _from_checkpoint(state) if is_checkpoint(state) else read_adapter(state)


def find_state(path: Path) -> tuple[Path, list[str]]:
    """Return the checkpoint or adapter folder that `path` means, and sentences on damaged ones.

    Args:
        path: A checkpoint (file, DeepSpeed folder or sharded folder); an adapter folder (ours or
            PEFT's); a run folder, whose newest state is taken: its `adapter/`, or a checkpoint that
            is newer; or a folder of checkpoints, of which it is the newest that is whole.

    Raises:
        UserError: If it is none of them, or no checkpoint is whole.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    if is_checkpoint(path) or is_adapter(path):
        return path, []
    adapter = path / ADAPTER_FOLDER
    checkpoints = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    newest = next(iter(newest_first(checkpoints)), None)
    if is_adapter(adapter) and (newest is None or not _is_older(adapter, newest)):
        return adapter, []
    if newest is None:
        raise UserError(
            f"{path} is neither a checkpoint nor a folder with {CONFIG_FILE}, {ADAPTER_FOLDER}/ or "
            f"{CHECKPOINTS}/ in it."
        )
    state, damaged = newest_whole(checkpoints)
    return state, [f"{each}: taking {state.name}." for each in damaged]


def is_adapter(path: Path) -> bool:
    """Return whether `path` is an adapter folder."""
    return (path / CONFIG_FILE).is_file()


def _is_older(adapter: Path, checkpoint: Path) -> bool:
    """Tell whether a run has gone on since it wrote its adapter.

    Its step alone does not say: a run can go back to an earlier one. Nor do times, which a copy may
    not keep.
    """
    step, match = step_of(adapter), STEP_NAME.fullmatch(checkpoint.name)
    if step is not None and match is not None and step < int(match[1]):
        return True
    return (adapter / CONFIG_FILE).stat().st_mtime_ns < checkpoint.stat().st_mtime_ns


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is a file, or a folder that a strategy wrote as a checkpoint."""
    folders = is_parts_folder, is_deepspeed_folder, is_distributed_folder
    return path.is_file() or any(is_such(path) for is_such in folders)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a Lightning checkpoint, opened without running any code from it.

    Of a checkpoint folder, `state_dict` holds the adapter matrices alone, whole and in float32.

    Raises:
        UserError: If it is none, is damaged or incomplete, or holds objects that only a pickle
            could restore.
    """
    endings = tuple(f".{matrix}" for matrix in MATRICES)
    if is_parts_folder(path):
        return read_parts_folder(path)
    if is_deepspeed_folder(path):
        return read_deepspeed_folder(path, endings)
    if is_distributed_folder(path):
        return read_distributed_folder(path, endings)
    if path.is_dir():
        raise UserError(f"{path} is a folder, but no checkpoint of DeepSpeed or of FSDP2.")
    content = load_plain(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} holds no state_dict: it is no Lightning checkpoint.")
    return content


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
    if set(pair) - {"lora_e"} != set(MATRICES):
        raise UserError(f"{name} has {', '.join(sorted(pair))} in place of lora_a and lora_b.")
    lora_a, lora_b = pair["lora_a"], pair["lora_b"]
    ranks = (*lora_a.shape[:1], *lora_b.shape[1:])
    if ranks != (numbers.rank, numbers.rank):
        raise UserError(
            f"{name} has matrices of shape {list(lora_a.shape)} and {list(lora_b.shape)}, which "
            f"are not of the rank {numbers.rank} in its hyperparameters."
        )
    return plain_adapter(pair, numbers, transposed)
