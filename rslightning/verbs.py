"""The verbs that need no Trainer: `merge`, `export` and `convert`."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from rslightning.assets import resolve_asset
from rslightning.checkpoint import load_adapter
from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder, find_model_folder
from rslightning.pickles import convert_pickles
from rslightning.rslora.adapters import Adapter
from rslightning.rslora.kept_dtypes import float32_parts
from rslightning.rslora.merge_folder import merge_folder
from rslightning.rslora.peft_format import write_adapter
from rslightning.storage import new_folder


def merge(arguments: argparse.Namespace) -> None:
    """Write base plus adapter as a plain Hugging Face folder, tensor by tensor."""
    adapter = load_adapter(arguments.checkpoint)
    base = _base_folder(adapter, arguments.base_model)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    with new_folder(arguments.output) as aside:
        with tqdm(total=len(base.shards), desc="merging", unit="shard") as bar:

            def progress(file: str) -> None:
                bar.set_postfix_str(file)
                bar.update()

            parts = _float32_parts(base, dtype)
            report = merge_folder(base, adapter, aside, dtype, progress, parts)
        report.write(aside)
    print(
        f"Merged {len(report.layers)} layers of {adapter.base_model} into {arguments.output} "
        f"({report.where}); rounding lost at most {report.worst} of a layer's "
        "update."
    )
    if report.warning:
        print(f"Warning: {report.warning}")


def export(arguments: argparse.Namespace) -> None:
    """Write the adapter as a folder that PEFT reads."""
    adapter = load_adapter(arguments.checkpoint)
    base_model = arguments.base_model or adapter.base_model
    if base_model is not None:  # a reader elsewhere does not know what asset:NAME means
        adapter = replace(adapter, base_model=resolve_asset(base_model))
    write_adapter(adapter, arguments.output, arguments.fold_scaling)
    how = "gamma folded into B" if arguments.fold_scaling else "PEFT layout"
    print(f"Exported the adapters of {len(adapter.layers)} layers to {arguments.output} ({how}).")


def convert(arguments: argparse.Namespace) -> None:
    """Write a folder that holds its weights as pickles as one that holds safetensors."""
    folder = Path(arguments.pickle)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    with new_folder(arguments.output) as aside:
        names = convert_pickles(folder, aside)
    print(f"Wrote {', '.join(names)} to {arguments.output}.")


def _float32_parts(base: ModelFolder, dtype: torch.dtype | None) -> list[str]:
    """Return what transformers keeps in float32 of a base, by the class that it names."""
    if dtype not in (torch.float16, torch.bfloat16):
        return []
    import transformers

    architectures = base.config.get("architectures") or ["none"]
    return float32_parts(getattr(transformers, str(architectures[0]), None), dtype)


def _base_folder(adapter: Adapter, override: str | None) -> ModelFolder:
    name = override or adapter.base_model
    if name is None:
        raise UserError("The adapter does not name its base model; pass --base-model.")
    try:
        return ModelFolder(Path(find_model_folder(name)))
    except UserError as error:
        if override is not None:
            raise
        raise UserError(f"{error} Where it moved since training, pass --base-model.") from None
