"""Say at the start what will be trained, and at the end what was done and where everything is."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import final

from rslightning.callbacks.merge_adapters import language_model, run_folder
from rslightning.callbacks.scalars import optimizer_step, write_scalars
from rslightning.callbacks.throughput import count_tokens, shifts_labels
from rslightning.checkpoint_folder import ADAPTER_FOLDER, MERGED_FOLDER
from rslightning.cost import GIB
from rslightning.errors import UserError
from rslightning.memory import MemoryEstimate, estimate_memory
from rslightning.model_shape import read_shape
from rslightning.rslora.adapters import adapter_parameters
from rslightning.rslora.linear import LoRALinear, adapter_layers
from rslightning.rslora.quantized import is_quantized
from rslightning.training_step import (
    Optimizer,
    Sharding,
    TrainingStep,
    quantized_bytes,
    read_optimizer,
    read_sharding,
)


@final
class RunSummary(Callback):
    """Print a few lines at the start and the end of a fit.

    At the start: parameters, scaling factor, tokens per optimizer step, optimizer, estimated memory
    and the run folder. On a GPU, after the second optimizer step, the first one with the
    optimizer's state: the first process's peak of allocated memory, beside the estimate. At the
    end: steps, tokens per second (validation time left out) and the paths of what the run wrote.

    Logs:
        data/<part>/<count>: what became of the rows of a part of the data (see
            `rslightning.data.encode.Counts`): rows, rows cut, tokens lost, ...; once, at the first
            step (of a stream at the last one, as the first process saw it), for a `TextDataModule`.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._paused = 0.0
        self._pause_began = 0.0
        self._counts: Tensor | int = 0  # of this process: tokens and targets
        self._is_shifted = True
        self._first_step = 0
        self._estimated: int | None = None
        self._compared = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what will be trained."""
        model = language_model(pl_module)
        memory = _estimate(trainer, pl_module)
        self._estimated = memory.total if isinstance(memory, MemoryEstimate) else None
        trainable = sum(_entries(p) for p in model.parameters() if p.requires_grad)
        total = sum(map(_entries, model.parameters())) + _packed_away(model)
        lines = {
            "base": f"{model.config.name_or_path}, {total - _adapter_size(model):,} parameters",
            "train": f"{trainable:,} parameters ({trainable / total:.2%} of {total:,})",
            "adapters": _describe_adapters(pl_module, model),
            "step": _describe_step(trainer),
            "optimizer": ", ".join(_describe_optimizer(o) for o in trainer.optimizers),
            "memory": f"about {memory}" if self._estimated is not None else memory,
            "folder": str(run_folder(trainer)),
        }
        rank_zero_info("\n".join(f"  {name:<10} {text}" for name, text in lines.items() if text))
        write_scalars(trainer, _data_counts(trainer), optimizer_step(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started, self._paused, self._counts = time.perf_counter(), 0.0, 0
        self._is_shifted = shifts_labels(pl_module)
        self._first_step, self._compared = trainer.global_step, False

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
        counts = count_tokens(batch, self._is_shifted)
        if counts is not None:
            self._counts = self._counts + counts[:2]
        if trainer.global_step - self._first_step == 2 and not self._compared:
            self._compared = True
            self._compare_memory(trainer.strategy.root_device)

    def _compare_memory(self, device: torch.device) -> None:
        peak = _peak_memory(device)
        if peak is None:
            return
        compared = f", {peak / self._estimated:.2f} of the estimate" if self._estimated else ""
        rank_zero_info(f"  memory     {peak / GIB:.2f} GiB at most so far{compared}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the throughput."""
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        if getattr(getattr(trainer, "datamodule", None), "streaming", False):
            write_scalars(trainer, _data_counts(trainer), trainer.global_step)
        own = torch.as_tensor(self._counts, device=trainer.strategy.root_device).expand(2)
        tokens, targets = trainer.strategy.reduce(own.contiguous(), reduce_op="sum").tolist()
        first = self._first_step
        rank_zero_info(
            f"trained {trainer.global_step - first} steps{f' after step {first}' if first else ''} "
            f"on {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s, of which "
            f"{targets / seconds:,.0f} targets/s"
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
    return sum(map(_entries, adapter_parameters(model).values()))


def _entries(parameter: torch.nn.Parameter) -> int:
    """Return how many entries all processes have together; ZeRO-3 leaves none in the tensor."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _packed_away(model: torch.nn.Module) -> int:
    """Return how many entries 4-bit weights have beyond those of the tensors that hold them."""
    layers: list[Any] = [layer for layer in model.modules() if is_quantized(layer)]
    return sum(x.in_features * x.out_features - x.weight.numel() for x in layers)


def _describe_adapters(module: LightningModule, model: torch.nn.Module) -> str:
    layers = [layer for _, layer in adapter_layers(model)]
    if not layers:
        return "none (full fine-tuning)"
    method, rank = str(layers[0].adapter.scaling), _range(layers, "rank")
    allocation = getattr(getattr(module, "adapter", None), "allocation", None)
    if allocation is not None:
        method, rank = f"adalora ({method})", f"{rank} -> {allocation.target_rank} on average"
    return f"{method} on {len(layers)} linear modules: rank {rank}, gamma {_range(layers, 'gamma')}"


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


def _estimate(trainer: Trainer, module: LightningModule) -> MemoryEstimate | str | None:
    """Return what `rslightning plan` says of what is trained here, or why that is not known."""
    if not _micro_batch_tokens(trainer):
        return None
    model = language_model(module)
    if any(layer.lora_e is not None for _, layer in adapter_layers(model)):
        return "not estimated: an allocation keeps scores of its own"
    try:
        shape = read_shape(model.config.to_dict())
        return estimate_memory(shape, _training_step(trainer, module, model))
    except UserError as error:
        return f"not estimated: {error}"


def _peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that a GPU had allocated at a time; None for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _training_step(trainer: Trainer, module: LightningModule, model: Any) -> TrainingStep:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    layers = dict(adapter_layers(model))
    dtype: torch.dtype = model.dtype
    mixed = "16" in str(trainer.precision)
    compute_bytes = 2 if mixed else dtype.itemsize
    device = trainer.strategy.root_device.type
    return TrainingStep(
        rows=data.batch_size,
        length=data.max_length,
        ranks={path: layer.rank for path, layer in layers.items()} or None,
        base_bytes=dtype.itemsize,
        map_bytes=quantized_bytes(getattr(module, "quantization", None)),
        adapter_bytes=next((x.lora_a.element_size() for x in layers.values()), 4),
        compute_bytes=compute_bytes,
        optimizer=_optimizer(trainer.optimizers[0]),
        activation_checkpointing=getattr(module, "activation_checkpointing", False),
        keeps_gradients=trainer.accumulate_grad_batches > 1
        or not getattr(module, "drops_gradients", False),
        dropout=any(isinstance(layer.dropout, torch.nn.Dropout) for layer in layers.values()),
        eager_attention=getattr(module, "attention", None) == "eager",
        sharding=_sharding(trainer),
        on_cpu=device == "cpu",
    )


def _optimizer(optimizer: Any) -> Optimizer:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    options = optimizer.param_groups[0]
    return read_optimizer(type(optimizer).__name__, options)


def _sharding(trainer: Trainer) -> Sharding:
    strategy: Any = trainer.strategy
    options = (getattr(strategy, "config", None) or {}).get("zero_optimization", vars(strategy))
    return read_sharding(type(strategy).__name__, options, trainer.world_size, trainer.num_nodes)
