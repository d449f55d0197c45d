"""When the fit ends: leave `adapter/` for PEFT, `merged/` for everybody, and say what it cost."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import final

from rslightning.callbacks.back_on_device import back_on_device
from rslightning.callbacks.base_weights import refuse_other_weights
from rslightning.checkpoint_folder import ADAPTER_FOLDER, MERGED_FOLDER
from rslightning.errors import UserError
from rslightning.memory import available_memory
from rslightning.model_folder import (
    CONFIG_FILE,
    ModelFolder,
    find_model_folder,
    is_hub_name,
    read_json,
)
from rslightning.rslora import write_adapter
from rslightning.rslora.adapters import Adapter
from rslightning.rslora.kept_dtypes import float32_parts, kept_names
from rslightning.rslora.linear import plain_path
from rslightning.rslora.merge import dtype_name
from rslightning.rslora.merge_folder import (
    MergeReport,
    cast_weight,
    copy_description,
    match_weights,
    merge_folder,
)
from rslightning.rslora.peft_modules import refuse_switched_off
from rslightning.rslora.trained import trained_adapter
from rslightning.rslora.whole import is_shared_out, whole_tensor
from rslightning.storage import new_folder

DESCRIBED: Final = ("architectures", "vocab_size", "id2label")
"""What another head or resized embeddings change in a model's configuration."""

LOGIT_SHARE_WARNING: Final = 0.2
"""Above this share of the largest logit, a logit's difference is warned about.

Rounding stays far below, bfloat16's too; other weights under the adapter do not.
"""


@final
class MergeAdapters(Callback):
    """Write the adapter in PEFT's layout and the merged model in Hugging Face's.

    In the run folder (the logger's, else `default_root_dir`) appear `adapter/` (safetensors and
    `adapter_config.json`) and `merged/` (weights, configuration, tokenizer, and
    `merge_report.json`: per layer what the rounding lost of the update, and the largest logit
    difference between adapter model and merged model on a real batch). The base is read from disk
    shard by shard, so that the model in training stays as it is. Without adapters (full
    fine-tuning) only `merged/` is written.

    It works in any Lightning project: on adapters of ours (`inject_adapters`) and on PEFT's LoRA
    (`get_peft_model`, `add_adapter`), wherever the LightningModule keeps the model.

    Args:
        dtype: Dtype of the merged weights, save those that the base, or transformers, keeps in
            float32 beside 16-bit ones; null keeps the base's. bfloat16 can lose most of a
            small update: the report says how much, and above 20 % a warning does.
        base_model: Folder or Hub name of the base; null takes the one that the model was loaded
            from.

    Raises:
        UserError: At the start of the fit, if the module holds no Hugging Face model, its base is
            not on disk or lacks its head or has weights of other sizes (resized embeddings), the
            folder to write to is taken by something else, or something is trained that a merge
            would lose: DoRA, biases, whole modules, several adapters at once, ...
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
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for name, mark in ((ADAPTER_FOLDER, "adapter_config.json"), (MERGED_FOLDER, "config.json")):
            folder = run_folder(trainer) / name
            if folder.exists() and not (folder / mark).exists():
                raise UserError(f"{folder} holds something else; MergeAdapters writes there.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out now whether what will be trained can be merged; before `setup` it is not built.

        The weights are read from the base at the end; now only their names and shapes are.
        """
        self._sample = None  # of the fit before, of which another model may know no such tokens
        model = language_model(pl_module)
        refuse_switched_off(model)
        name, base = self._find_base(model)
        if (adapter := trained_adapter(pl_module, model, name)) is not None:
            match_weights(base, adapter)
            refuse_other_weights(model, base)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep one row of a real batch, to compare the logits on."""
        if self._sample is None:
            self._sample = _first_row(batch)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both folders on the first process.

        Where a strategy has shared the weights out, the other processes help to gather them, one
        matrix after another, and to compute the logits.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with back_on_device(trainer, pl_module):
            self._write_folders(trainer, pl_module)
        trainer.strategy.barrier("rslightning.merge_adapters")

    def _write_folders(self, trainer: Trainer, module: LightningModule) -> None:
        folder = run_folder(trainer)  # asks all processes
        model = language_model(module)
        name, base = self._find_base(model)
        adapter = trained_adapter(module, model, name, whole_tensor)
        logits = None if adapter is None else self._sample_logits(trainer, model)
        state = _cast_state(model, self.dtype) if adapter is None else {}
        if trainer.is_global_zero:
            if adapter is None:
                _write_full(model, state, base, folder / MERGED_FOLDER, self.dtype)
            else:
                with trainer.precision_plugin.forward_context():
                    self._write(model, adapter, base, folder, logits, trainer.global_step)

    def _write(
        self,
        model: Any,
        adapter: Adapter,
        base: ModelFolder,
        folder: Path,
        logits: Tensor | None,
        step: int,
    ) -> None:
        write_adapter(adapter, folder / ADAPTER_FOLDER, replace=True, step=step)
        with new_folder(folder / MERGED_FOLDER, replace=True) as aside:
            parts = float32_parts(model, self.dtype)
            report = merge_folder(base, adapter, aside, self.dtype, float32=parts)
            if logits is not None:
                report.largest_logit_difference = self._logit_difference(model, logits, aside)
            report.write(aside)
        _announce(report, folder)
        if logits is not None:
            _warn_if_other(report.largest_logit_difference, logits, base, folder / MERGED_FOLDER)

    def _find_base(self, model: Any) -> tuple[str, ModelFolder]:
        """Return the base's name, as the adapter shall know it, and its folder."""
        name = self.base_model or model.config.name_or_path
        if not name:
            raise UserError(
                f"{type(model).__name__} was not loaded from a folder, so there is no base to "
                "merge into: save the model before it is adapted (save_pretrained), and give "
                "MergeAdapters that folder as base_model."
            )
        # The revision that was loaded: the Hub's newest one may have other weights.
        revision = None if self.base_model else getattr(model.config, "_commit_hash", None)
        folder = find_model_folder(name, revision)
        return name if is_hub_name(name) else str(folder), ModelFolder(folder)

    @torch.no_grad()
    def _sample_logits(self, trainer: Trainer, model: Any) -> Tensor | None:
        """Return the logits of the model in training; None if there is nothing to compute.

        Where its weights are shared out all processes compute them, of the first one's row.
        """
        if is_shared_out(model):
            self._sample = trainer.strategy.broadcast(self._sample)
        elif not trainer.is_global_zero:
            return None
        if self._sample is None or getattr(model.config, "is_encoder_decoder", False):
            return None
        in_training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with trainer.precision_plugin.forward_context():
                ids = self._sample.to(trainer.strategy.root_device)
                logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
        except Exception as error:  # the merge itself does not need them
            _warn_not_compared(error)
            return None
        finally:
            for module in in_training:
                module.training = True
        return logits

    @torch.no_grad()
    def _logit_difference(self, model: Any, logits: Tensor, merged: Path) -> float | None:
        """Compare with the logits of the folder, loaded as anybody would load it.

        A model whose weights are shared out may be too large for this process's device; it is
        loaded into the host's memory then, or not at all where half of that is too little. Nor is
        one that does not fit beside the model in training.
        """
        assert self._sample is not None
        device = logits.device
        if is_shared_out(model):
            device = torch.device("cpu")
            size = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
            if size > available_memory() / 2:
                return None
        options = {"dtype": "auto", "attn_implementation": model.config._attn_implementation}
        try:
            reloaded = type(model).from_pretrained(merged, **options).to(device)
            after = reloaded(input_ids=self._sample.to(device), use_cache=False).logits.float()
            return float((logits.to(device) - after).abs().max())
        except torch.OutOfMemoryError:
            return None
        except Exception as error:  # what was merged is there, compared or not
            _warn_not_compared(error)
            return None


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run: the first logger's, else the trainer's root."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def language_model(module: nn.Module) -> Any:
    """Return the Hugging Face model inside `module`, known by what it offers.

    A wrapper around it (PEFT's, `torch.compile`'s) is not taken for it. Of several, as a policy and
    its reference, the first one that is trained is returned, else the first.

    Raises:
        UserError: If there is none.
    """
    models = [child for child in module.modules() if _is_language_model(child)]
    trained = (child for child in models if any(p.requires_grad for p in child.parameters()))
    if not models:
        raise UserError(
            f"{type(module).__name__} holds no Hugging Face model to merge adapters into."
        )
    return next(trained, models[0])


def _is_language_model(module: nn.Module) -> bool:
    """Tell whether `module` itself, and not what it passes on to, can be saved by transformers."""
    kind = type(module)
    is_wrapper = hasattr(kind, "get_base_model")
    return hasattr(kind, "save_pretrained") and hasattr(module, "config") and not is_wrapper


def _write_full(
    model: Any,
    state: Mapping[str, Tensor],
    base: ModelFolder,
    folder: Path,
    dtype: torch.dtype | None,
) -> None:
    """Save a fully fine-tuned model with the description that lay beside its base."""
    with new_folder(folder, replace=True) as aside:
        model.save_pretrained(aside, state_dict=state)
        own = read_json(aside / CONFIG_FILE)
        copy_description(base, aside, dtype or model.dtype)
        if any(own.get(key) != base.config.get(key) for key in DESCRIBED):
            own["dtype"] = dtype_name(dtype or model.dtype)
            (aside / CONFIG_FILE).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    rank_zero_info(f"merged: {folder} (full fine-tuning, nothing to merge)")


def _cast_state(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the state of `model` in another dtype, a shared weight as one tensor under its names.

    Names are those of the model before `torch.compile` wrapped a part of it.

    Where a strategy has shared the weights out, only the first process has them in the end.
    transformers leaves a tied head out of the file only where it is the embedding's own tensor.
    """
    state = model.state_dict(keep_vars=True)  # without it, each name has a tensor of its own
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    sizes = {n: (t.dtype, getattr(t, "ds_numel", t.numel())) for n, t in floats.items()}
    kept = kept_names(sizes, float32_parts(model, dtype))
    cast: dict[int, Tensor] = {}
    for name, tensor in state.items():
        target = dtype if dtype and name in floats.keys() - kept else tensor.dtype
        if id(tensor) not in cast:
            whole = whole_tensor(tensor)
            cast[id(tensor)] = whole if whole.is_meta else cast_weight(name, whole, target)
    return {plain_path(name): cast[id(tensor)] for name, tensor in state.items()}


def _announce(report: MergeReport, folder: Path) -> None:
    difference = report.largest_logit_difference
    logits = "" if difference is None else f"; largest logit difference {difference:.2g}"
    rank_zero_info(
        f"merged {len(report.layers)} layers in {report.where}: rounding lost at most "
        f"{report.worst} of a layer's update{logits}"
    )
    if report.warning:
        rank_zero_warn(report.warning)


def _warn_if_other(
    difference: float | None, logits: Tensor, base: ModelFolder, merged: Path
) -> None:
    """Warn if the merged model is another one than that in training, not the same one rounded."""
    largest = float(logits.abs().max())
    if difference is not None and difference > LOGIT_SHARE_WARNING * largest:
        rank_zero_warn(
            f"{merged} is not the model that was trained: their logits differ by up to "
            f"{difference:.2g}, where the largest is {largest:.2g}. The adapters were trained on "
            f"other weights than those in {base.path}; give MergeAdapters the folder of those as "
            "base_model."
        )


def _warn_not_compared(error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    rank_zero_warn(f"The merged model was not compared with the one in training: {reason}")


def _first_row(batch: Any) -> Tensor | None:
    """Return the ids [1, T] of a batch's first row without its padding, where it has such ids."""
    get = batch.get if isinstance(batch, Mapping) else lambda name: getattr(batch, name, None)
    ids, mask = get("input_ids"), get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    row = ids[0]
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        row = row[mask[0].bool()]
    return row[None].detach().clone() if len(row) else None
