"""Say at the start what will be trained, and at the end what was done and where everything is."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import final

from rslightning.callbacks.merge_adapters import (
    ADAPTER_FOLDER,
    MERGED_FOLDER,
    language_model,
    run_folder,
)
from rslightning.callbacks.scalars import optimizer_step, write_scalars
from rslightning.cost import estimate_memory
from rslightning.rslora.linear import LoRALinear, adapter_layers


@final
class RunSummary(Callback):
    """Print a few lines at the start and the end of a fit.

    At the start: parameters, scaling factor, tokens per optimizer step, optimizer, estimated memory
    and the run folder. At the end: steps, tokens per second (validation time left out) and the
    paths of what the run wrote.

    Logs:
        data/<part>/<count>: what became of the rows of a part of the data (see
            `rslightning.data.encode.Counts`): rows, rows cut, tokens lost, ...; once, at the first
            step (of a stream at the last one, as the first process saw it), for a `TextDataModule`.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._paused = 0.0
        self._pause_began = 0.0
        self._tokens: Tensor | int = 0
        self._targets: Tensor | int = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what will be trained."""
        model = language_model(pl_module)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        lines = {
            "base": f"{model.config.name_or_path}, {total - _adapter_size(model):,} parameters",
            "train": f"{trainable:,} parameters ({trainable / total:.2%} of {total:,})",
            "adapters": _describe_adapters(model),
            "step": _describe_step(trainer),
            "optimizer": ", ".join(_describe_optimizer(o) for o in trainer.optimizers),
            "memory": _describe_memory(trainer, pl_module, total - trainable, trainable),
            "folder": str(run_folder(trainer)),
        }
        rank_zero_info("\n".join(f"  {name:<10} {text}" for name, text in lines.items() if text))
        write_scalars(trainer, _data_counts(trainer), optimizer_step(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock while the model is validated."""
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        if self._started:
            self._paused += time.perf_counter() - self._pause_began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens on the device that holds them; nothing waits for it."""
        if isinstance(getattr(batch, "labels", None), Tensor):
            self._tokens = self._tokens + batch.attention_mask.sum()
            self._targets = self._targets + (batch.labels[:, 1:] >= 0).sum()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the throughput."""
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        if getattr(getattr(trainer, "datamodule", None), "streaming", False):
            write_scalars(trainer, _data_counts(trainer), trainer.global_step)
        tokens = int(self._tokens) * trainer.world_size
        targets = int(self._targets) * trainer.world_size
        rank_zero_info(
            f"trained {trainer.global_step} steps on {tokens:,} tokens in {seconds:.1f} s: "
            f"{tokens / seconds:,.0f} tokens/s, of which {targets / seconds:,.0f} targets/s"
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print where everything is."""
        folder = run_folder(trainer)
        checkpoint = getattr(trainer.checkpoint_callback, "dirpath", None)
        places = {
            "run folder": folder,
            "checkpoints": Path(checkpoint) if checkpoint else folder / "checkpoints",
            "adapter": folder / ADAPTER_FOLDER,
            "merged": folder / MERGED_FOLDER,
        }
        lines = [f"  {name:<12} {path}" for name, path in places.items() if path.exists()]
        if trainer.loggers:
            lines.append(f"  TensorBoard  tensorboard --logdir {folder.parent}")
        rank_zero_info("\n".join(lines))


def _data_counts(trainer: Trainer) -> dict[str, float]:
    """Return tag -> what became of the rows, but for those of a stream, which are yet to come."""
    counts = getattr(getattr(trainer, "datamodule", None), "counts", {})
    return {
        f"data/{part}/{name}": value
        for part, found in counts.items()
        for name, value in found.as_dict().items()
        if found.rows
    }


def _adapter_size(model: torch.nn.Module) -> int:
    return sum(layer.lora_a.numel() + layer.lora_b.numel() for _, layer in adapter_layers(model))


def _describe_adapters(model: torch.nn.Module) -> str:
    layers = [layer for _, layer in adapter_layers(model)]
    if not layers:
        return "none (full fine-tuning)"
    first = layers[0].adapter
    return (
        f"{first.scaling} on {len(layers)} linear modules: rank {_range(layers, 'rank')}, "
        f"gamma {_range(layers, 'gamma')}"
    )


def _range(layers: list[LoRALinear], name: str) -> str:
    values = sorted({getattr(layer, name) for layer in layers})
    return f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}"


def _micro_batch_tokens(trainer: Trainer) -> int:
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "batch_size", 0) * getattr(data, "max_length", 0)


def _describe_step(trainer: Trainer) -> str | None:
    tokens = _micro_batch_tokens(trainer)
    if not tokens:
        return None
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    micro, devices = trainer.accumulate_grad_batches, trainer.world_size
    return (
        f"{data.batch_size} examples x {data.max_length} tokens x {micro} micro-batches x "
        f"{devices} devices = at most {tokens * micro * devices:,} tokens"
    )


def _describe_optimizer(optimizer: Any) -> str:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return f"{type(optimizer).__name__}, lr {optimizer.param_groups[0]['lr']:g}"


def _describe_memory(
    trainer: Trainer, module: LightningModule, frozen: int, trainable: int
) -> str | None:
    tokens = _micro_batch_tokens(trainer)
    if not tokens:
        return None
    model = language_model(module)
    wide = str(trainer.precision).startswith("32")
    dtype: torch.dtype = model.dtype
    estimate = estimate_memory(
        model.config.to_dict(),
        frozen,
        trainable,
        tokens,
        adapter_ranks=sum(layer.rank for _, layer in adapter_layers(model)),
        frozen_bytes=dtype.itemsize,
        activation_bytes=dtype.itemsize if wide else 2,
        activation_checkpointing=getattr(module, "activation_checkpointing", False),
    )
    return f"about {estimate}"
