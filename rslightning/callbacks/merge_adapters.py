"""When the fit ends: leave `adapter/` for PEFT, `merged/` for everybody, and say what it cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import final

from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder, find_model_folder, is_hub_name
from rslightning.rslora import collect_adapter, write_adapter
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.merge_folder import MergeReport, copy_description, merge_folder
from rslightning.storage import new_folder

ADAPTER_FOLDER: Final = "adapter"
MERGED_FOLDER: Final = "merged"


@final
class MergeAdapters(Callback):
    """Write the adapter in PEFT's layout and the merged model in Hugging Face's.

    In the run folder (the logger's, else `default_root_dir`) appear `adapter/` (safetensors and
    `adapter_config.json`) and `merged/` (weights, configuration, tokenizer, and
    `merge_report.json`: per layer what the rounding lost of the update, and the largest logit
    difference between adapter model and merged model on a real batch). The base is read from disk
    shard by shard, so that the model in training stays as it is. Without adapters (full
    fine-tuning) only `merged/` is written.

    Args:
        dtype: Dtype of the merged weights; null keeps the base's. bfloat16 can lose most of a
            small update: the report says how much, and above 20 % a warning does.
        base_model: Folder or Hub name of the base; null takes the one that the model was loaded
            from.

    Raises:
        UserError: At the start of the fit, if the module holds no Hugging Face model, or the folder
            to write to is taken by something else.
        RunError: If a folder cannot be written; it is then absent, not half there.
    """

    def __init__(
        self,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        base_model: str | None = None,
    ) -> None:
        self.dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self.base_model = base_model
        self._sample: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out now, not after days of training, whether the results can be written."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        for name, mark in ((ADAPTER_FOLDER, "adapter_config.json"), (MERGED_FOLDER, "config.json")):
            folder = run_folder(trainer) / name
            if folder.exists() and not (folder / mark).exists():
                raise UserError(f"{folder} holds something else; MergeAdapters writes there.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out now whether there is a model to merge into; before `setup` it is not built."""
        language_model(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep one row of a real batch, to compare the logits on."""
        if self._sample is None:
            self._sample = _first_row(batch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both folders on the first process; the others wait."""
        if trainer.fast_dev_run:
            return
        folder = run_folder(trainer)  # asks all processes
        if trainer.is_global_zero:
            self._write(trainer, language_model(pl_module), folder)
        trainer.strategy.barrier("rslightning.merge_adapters")

    def _write(self, trainer: Trainer, model: Any, folder: Path) -> None:
        if next(adapter_layers(model), None) is None:
            _write_full(model, folder / MERGED_FOLDER, self.dtype)
            rank_zero_info(f"merged: {folder / MERGED_FOLDER} (full fine-tuning, nothing to merge)")
            return
        name = self.base_model or model.config.name_or_path
        base = find_model_folder(name)
        adapter = collect_adapter(model, name if is_hub_name(name) else str(base))
        write_adapter(adapter, folder / ADAPTER_FOLDER, replace=True)
        with new_folder(folder / MERGED_FOLDER, replace=True) as aside:
            report = merge_folder(ModelFolder(base), adapter, aside, self.dtype)
            report.largest_logit_difference = self._logit_difference(trainer, model, aside)
            report.write(aside)
        _announce(report, folder)

    @torch.no_grad()
    def _logit_difference(self, trainer: Trainer, model: Any, merged: Path) -> float | None:
        """Compare the model in training with the folder, loaded as anybody would load it."""
        if self._sample is None:
            return None
        ids = self._sample.to(model.device)
        was_training = model.training
        model.eval()
        with trainer.precision_plugin.forward_context():
            before = model(input_ids=ids, use_cache=False).logits.float()
            reloaded = (
                type(model)
                .from_pretrained(
                    merged, dtype="auto", attn_implementation=model.config._attn_implementation
                )
                .to(model.device)
            )
            after = reloaded(input_ids=ids, use_cache=False).logits.float()
        model.train(was_training)
        return float((before - after).abs().max())


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run: the first logger's, else the trainer's root."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def language_model(module: nn.Module) -> Any:
    """Return the Hugging Face model inside `module`, known by what it offers.

    Raises:
        UserError: If there is none.
    """
    for child in module.modules():
        if hasattr(child, "save_pretrained") and hasattr(child, "config"):
            return child
    raise UserError(f"{type(module).__name__} holds no Hugging Face model to merge adapters into.")


def _write_full(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """Save a fully fine-tuned model with the description that lay beside its base."""
    state = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    base = ModelFolder(find_model_folder(model.config.name_or_path))
    with new_folder(folder, replace=True) as aside:
        model.save_pretrained(aside, state_dict=state)
        copy_description(base, aside, dtype or model.dtype)


def _announce(report: MergeReport, folder: Path) -> None:
    difference = report.largest_logit_difference
    logits = "" if difference is None else f"; largest logit difference {difference:.2g}"
    rank_zero_info(
        f"merged {len(report.layers)} layers in {report.dtype}: rounding lost at most "
        f"{report.worst} of a layer's update{logits}"
    )
    if report.warning:
        rank_zero_warn(report.warning)


def _first_row(batch: Any) -> Tensor | None:
    """Return the ids [1, T] of a batch's first row without its padding, where it has such ids."""
    get = batch.get if isinstance(batch, Mapping) else lambda name: getattr(batch, name, None)
    ids, mask = get("input_ids"), get("attention_mask")
    if not isinstance(ids, Tensor):
        return None
    row = ids[0] if mask is None else ids[0][mask[0].bool()]
    return row[None].detach().clone()
