"""PEFT's adapter folder, written and read: `adapter_config.json` and `adapter_model.safetensors`.

PEFT stores A as `base_model.model.<path>.lora_A.weight` [rank, in], B as `...lora_B.weight`
[out, rank], and no scale: a reader computes `lora_alpha / r`, or `lora_alpha / sqrt(r)` under
`use_rslora`. The scalings that PEFT does not know are therefore written as the alpha for which
`lora_alpha / r` is gamma_r.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from rslightning.errors import UserError
from rslightning.manifest import WAY_OUT, find_damage
from rslightning.model_folder import read_json
from rslightning.rslora.adapters import Adapter, LayerAdapter
from rslightning.rslora.quantized import QuantizedBase
from rslightning.rslora.scaling import Scaling, check_alpha, check_rank, equivalent_alpha
from rslightning.rslora.spec import ResolvedAdapter, pattern_matches
from rslightning.storage import new_folder, open_tensors, save_tensors

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"

QUANTIZATION_FILE: Final = "quantization.json"
"""Ours alone: how the base was quantized in training, which PEFT's configuration does not say."""

TENSOR_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<matrix>lora_[AB])\.weight")

# Features of a PEFT adapter that change its function beyond W + gamma B A.
UNSUPPORTED: Final[Mapping[str, Any]] = {
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
}

# Initializations that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ, ... do not.
PLAIN_INITS: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

Value = TypeVar("Value", int, float)


def write_adapter(
    adapter: Adapter,
    folder: str | Path,
    fold_scaling: bool = False,
    replace: bool = False,
    step: int | None = None,
) -> None:
    """Write `adapter` as a folder that PEFT reads and computes the same function from.

    Args:
        adapter: What to write.
        folder: Where; it appears complete or not at all.
        fold_scaling: Multiply gamma_r into B and write `use_rslora: false`, `lora_alpha: r`, for
            servers that ignore `use_rslora` and always compute `lora_alpha / r`. A B in 16 bit is
            then written in float32.
        replace: Whether a folder that is there gives way.
        step: Optimizer step of the run that trained it, for the folder's manifest.

    Raises:
        UserError: If the folder is not empty and `replace` is false.
        RunError: If the file system refuses.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        lora_b = layer.lora_b
        if fold_scaling:  # in 16 bit the product would be rounded, and small entries lost
            lora_b = lora_b.to(torch.promote_types(lora_b.dtype, torch.float32))
            lora_b = lora_b * layer.numbers.gamma
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_a
        tensors[f"base_model.model.{path}.lora_B.weight"] = lora_b
    config = adapter_config(adapter, fold_scaling)
    with new_folder(folder, replace, step) as aside:
        save_tensors(tensors, aside / WEIGHTS_FILE)
        text = json.dumps(config, indent=2, sort_keys=True)
        (aside / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        if adapter.quantized:
            text = json.dumps(asdict(adapter.quantized), indent=2)
            (aside / QUANTIZATION_FILE).write_text(text + "\n", encoding="utf-8")


def adapter_config(adapter: Adapter, fold_scaling: bool = False) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    numbers = {path: layer.numbers for path, layer in adapter.layers.items()}
    scaling: Scaling = "lora"
    if not fold_scaling and {n.scaling for n in numbers.values()} == {"rslora"}:
        scaling = "rslora"
    ranks = {path: n.rank for path, n in numbers.items()}
    alphas = {path: _peft_alpha(n, scaling, fold_scaling) for path, n in numbers.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": scaling == "rslora",
        "lora_dropout": adapter.dropout,
        "target_modules": list(numbers),
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
        "fan_in_fan_out": any(layer.transposed for layer in adapter.layers.values()),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def read_adapter(folder: str | Path) -> Adapter:
    """Read a LoRA or rsLoRA adapter folder, ours or PEFT's.

    Raises:
        UserError: If a file is missing or damaged, the adapter is not plain LoRA (DoRA, trained
            biases, full modules, AdaLoRA, an initialization that changed the base weights, ...), or
            its tensors contradict its configuration.
    """
    folder = Path(folder)
    config = _read_config(folder)
    matrices: dict[str, dict[str, Tensor]] = {}
    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder} holds adapter_model.bin, a pickle that could run code when opened; if you "
            "trust it, write it as safetensors with rslightning convert --pickle "
            f"{folder} --output DIR."
        )
    if damage := find_damage(folder, ".safetensors"):
        raise UserError(f"{folder} is damaged: {damage}; {WAY_OUT}.")
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        for key in tensors.keys():  # noqa: SIM118 (the handle is no mapping)
            match = TENSOR_KEY.fullmatch(key)
            if match is None:
                raise UserError(f"{folder / WEIGHTS_FILE} holds {key}, {_why_not_plain(key)}")
            matrices.setdefault(match["path"], {})[match["matrix"]] = tensors.get_tensor(key)
    if not matrices:
        raise UserError(f"{folder / WEIGHTS_FILE} holds no adapter.")
    return Adapter(
        {path: _layer(folder, path, pair, config) for path, pair in sorted(matrices.items())},
        config.get("base_model_name_or_path"),
        config.get("lora_dropout", 0.0),
        _read_quantization(folder / QUANTIZATION_FILE),
    )


def check_plain_lora(config: Mapping[str, Any], source: str) -> None:
    """Check the settings of a PEFT configuration, read from a file or from a live model.

    Args:
        config: PEFT's keys and their values.
        source: What the settings are of, for the message.

    Raises:
        UserError: If one of them says that the adapter is not plain LoRA.
    """
    if (kind := config.get("peft_type")) != "LORA":
        kind = getattr(kind, "value", kind)
        raise UserError(f"{source} has peft_type {kind!r}; only LORA can be read.")
    for key, plain in UNSUPPORTED.items():
        value = config.get(key)
        if value != plain and value:
            raise UserError(f"{source} sets {key} to {value!r}, which plain LoRA does not have.")
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise UserError(
            f"{source} sets init_lora_weights to {init!r}, which may change the base weights, too; "
            "convert the adapter to plain LoRA with PEFT first."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {folder} is not an adapter folder.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(config, dict):
        config = {}
    check_plain_lora(config, str(path))
    return config


def _why_not_plain(key: str) -> str:
    if "lora_" in key or not key.endswith(".weight"):
        return "which is not plain LoRA."
    return (
        "a whole weight of the base, which PEFT adds where the head or embeddings are among the "
        "targets: if it was not trained, save the adapter with save_embedding_layers=False."
    )


def _read_quantization(path: Path) -> QuantizedBase | None:
    if not path.exists():
        return None
    try:
        return QuantizedBase(**read_json(path))
    except TypeError:
        raise UserError(f"{path} does not say how a base was quantized: it is damaged.") from None


def _layer(
    folder: Path, path: str, pair: dict[str, Tensor], config: Mapping[str, Any]
) -> LayerAdapter:
    if set(pair) != {"lora_A", "lora_B"}:
        raise UserError(f"{folder} has only {next(iter(pair))} of {path}; its other half is lost.")
    lora_a, lora_b = pair["lora_A"], pair["lora_B"]
    ranks = _matches(config.get("rank_pattern") or {}, path, config.get("r", 8))
    alpha = _matches(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))[0]
    for rank in ranks:
        check_rank(rank, f"{folder / CONFIG_FILE}: r of {path}")
    check_alpha(alpha, f"{folder / CONFIG_FILE}: lora_alpha of {path}")
    if lora_a.dim() != 2 or lora_b.dim() != 2 or 0 in (*lora_a.shape, *lora_b.shape):
        raise UserError(
            f"{path} has matrices of shape {list(lora_a.shape)} and {list(lora_b.shape)} in "
            f"{folder}: it was saved without gathering its shards."
        )
    # PEFT sorts the keys, so which of several came first in training, the matrices say alone.
    rank = lora_a.shape[0] if lora_a.shape[0] in ranks else ranks[0]
    if lora_a.shape[0] != rank or lora_b.shape[1] != rank:
        raise UserError(
            f"{path} has rank {lora_a.shape[0]} in {WEIGHTS_FILE} and {rank} in {CONFIG_FILE}; "
            "the two files do not belong together."
        )
    scaling: Scaling = "rslora" if config.get("use_rslora") else "lora"
    transposed = bool(config.get("fan_in_fan_out", False))
    return LayerAdapter(lora_a, lora_b, ResolvedAdapter(rank, alpha, scaling), transposed)


def _peft_alpha(numbers: ResolvedAdapter, scaling: Scaling, fold_scaling: bool) -> float:
    if fold_scaling:
        return numbers.rank
    if numbers.scaling == scaling:
        return numbers.alpha
    return equivalent_alpha(numbers.gamma, numbers.rank, scaling)


def _exceptions(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Return one key per module that differs from `default`, each matching that module only."""
    return {
        _unique_pattern(path, values): value for path, value in values.items() if value != default
    }


def _unique_pattern(path: str, paths: Iterable[str]) -> str:
    if sum(pattern_matches(path, other) for other in paths) == 1:
        return path
    return f"^{re.escape(path)}"


def _matches(patterns: Mapping[str, Value], path: str, default: Value) -> list[Value]:
    """Return the values of the keys that match, in the file's order; PEFT takes the first."""
    found = [value for pattern, value in patterns.items() if pattern_matches(pattern, path)]
    return found or [default]


def _most_common(values: Iterable[Value]) -> Value:
    return Counter(values).most_common(1)[0][0]
