"""Tokens, operations and seconds per step: how fast a run trains, and what it waits for."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from lightning.fabric.utilities.throughput import Throughput, get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import final

from rslightning.callbacks.scalars import optimizer_step, write_scalars
from rslightning.callbacks.training_clock import TrainingClock
from rslightning.cost import GIB, LayerShape, LinearMap, attention_width, training_flops
from rslightning.errors import UserError
from rslightning.rslora.linear import LoRALinear, is_linear, linear_features

TERA: Final = 10**12

H200: Final = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}
"""Operations per second of an H200 (NVIDIA's data sheet, dense), as torch names it.

Lightning 2.6 has numbers with sparsity, and finds them only where the name says SXM or NVL.
"""


UNSHIFTED_LOSSES: Final = ("ForMaskedLM", "ForTokenClassification")
"""Names of transformers' losses that take each position's own label."""


@final
class TokenThroughputMonitor(Callback):
    """Log how fast a run trains, for any LightningModule whose batches hold token ids.

    A batch has `input_ids` [B, T] and, where it can, `labels` (-100 where there is no target; the
    loss of a causal model shifts them), `attention_mask` and `position_ids` (from 0 again where
    another example of the row begins), as keys or as attributes. Padding is no token. Of batches
    without token ids only times and memory are logged, and a line says so.

    Every number is of the optimizer steps since the reading before. The clock starts when the first
    step of a fit is over: compilation, allocation and the start of workers are in that. It stands
    still from where a validation begins or a checkpoint is saved to the next micro-batch.

    Operations are those of `rslightning.cost.training_flops` for the model as it was built: what is
    recomputed, or spent on padding, is no progress and not counted. Gradients into a map's input
    count from the first map that is trained on, except for that map: where separate queries, keys
    and values read the same embeddings, this is too much by the keys and values of one layer. The
    full square of an example's length counts where layers attend to a window. Where maps are no
    modules (fused experts, convolutions) there is no count, and a line says why.

    On a step that logs, the host waits for the device once, and several processes exchange five
    numbers; no other step waits. Training is the same with and without the monitor, bit for bit.

    Args:
        every_n_steps: Optimizer steps between two readings; the steps 0, n, 2n, ... are read, but
            for the fit's first one.
        peak_tflops: What one device could do at best in this precision, in TFLOP/s; null asks
            Lightning's table, which knows NVIDIA's chips and TPUs, and a number of our own.

    Logs:
        perf/tokens_per_second: tokens of all processes, padding left out, every `every_n_steps`,
            like all of them.
        perf/target_tokens_per_second: those that the loss is taken at; of batches whose `labels`
            are of tokens.
        perf/tflops_per_second: 10^12 operations of the model per second, per device.
        perf/mfu: that as a share of the device's peak; where the peak is known.
        perf/step_seconds: mean time of a step.
        perf/data_wait_share: share of the time that passes between two micro-batches, in which the
            next one is fetched and moved. On CUDA it is the time that the device has no work, on
            the CPU that of the host, loggers included; of the process that waits longest.
        perf/memory_gib: peak since the start: on CUDA of what the allocator has given out on a
            device, else of the resident set of a process; of the process with the most.

    Raises:
        UserError: If `every_n_steps` or `peak_tflops` is not positive.
    """

    def __init__(self, every_n_steps: int = 10, peak_tflops: float | None = None) -> None:
        if every_n_steps < 1:
            raise UserError(f"throughput.every_n_steps is {every_n_steps}; at least 1.")
        if peak_tflops is not None and peak_tflops <= 0:
            raise UserError(f"throughput.peak_tflops is {peak_tflops:g}; positive, or null.")
        self.every_n_steps, self.peak_tflops = every_n_steps, peak_tflops
        self._clock = TrainingClock(torch.device("cpu"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model; forget the fit before."""
        device = trainer.strategy.root_device
        self._clock = TrainingClock(device)
        self._maps: list[LinearMap | LayerShape] = []
        if reason := uncountable(pl_module):
            rank_zero_info(f"throughput: no TFLOP/s are logged, since {reason}.")
        else:
            self._maps = list(linear_maps(pl_module))
        self._attention_width = attention_width(_config(pl_module))
        self._window = Throughput(_peak_flops(trainer, self.peak_tflops), window_size=2)
        self._has_tokens: bool | None = None  # until the first batch
        self._has_targets = False
        self._is_shifted = shifts_labels(pl_module)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # see `count_tokens`
        self._readings = self._tokens = self._steps = self._micro_batches = 0
        self._seconds = self._waited = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which step this micro-batch belongs to, and that waiting for it is over."""
        self._step = optimizer_step(trainer)
        self._clock.begin_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens on their device; after the last micro-batch of a step that is due, read."""
        self._count(batch)
        if not pl_module.automatic_optimization or trainer.global_step != self._step:
            self._end_step(trainer)
        self._clock.end_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop the clock."""
        self._pause()

    def _pause(self) -> None:
        if self._clock.is_between_batches:
            self._counts.tolist()  # what the device has yet to do is training
            self._clock.pause()

    def _count(self, batch: Any) -> None:
        counts = count_tokens(batch, self._is_shifted)
        if self._has_tokens is None:
            self._has_tokens = counts is not None
            self._has_targets = count_targets(batch, self._is_shifted) is not None
            if counts is None:
                rank_zero_info(
                    "throughput: batches have no `input_ids`; only times and memory are logged."
                )
        if counts is not None:
            self._micro_batches += 1
            self._counts += counts.to(self._counts.device)

    def _end_step(self, trainer: Trainer) -> None:
        if not self._clock.is_started:
            self._counts.tolist()  # waits for the device
            self._clock.start()
            self._begin_interval(seconds=0.0, waited=0.0, tokens=0, flops=0)
            return
        self._steps += 1
        if self._step % self.every_n_steps == 0:
            self._read(trainer)

    def _read(self, trainer: Trainer) -> None:
        counts = self._counts.tolist()  # waits for the device
        seconds, waited = self._clock.read()
        waited_microseconds = round((waited - self._waited) * 1e6)
        memory_bytes = peak_memory_bytes(trainer.strategy.root_device)
        processes = _gather(trainer, [*counts, waited_microseconds, memory_bytes])
        tokens, targets, squares, waits, memories = zip(*processes, strict=True)
        elapsed, share = seconds - self._seconds, _share(trainer)
        total = round(sum(tokens) * share)
        if elapsed <= 0 or (self._has_tokens and not total):
            return  # nothing to divide (by): the interval goes on
        flops = training_flops(
            self._maps,
            total,
            round(sum(squares) * share),
            self._attention_width,
            round(self._micro_batches * trainer.world_size * share),
        )
        values = {
            "step_seconds": elapsed / self._steps,
            "data_wait_share": max(waits) / 1e6 / elapsed,
            "memory_gib": max(memories) / GIB,
        }
        if self._has_targets:
            values["target_tokens_per_second"] = sum(targets) * share / elapsed
        self._begin_interval(seconds, waited, total, flops // trainer.world_size)
        values |= self._rates()
        values = {f"perf/{name}": value for name, value in values.items()}
        write_scalars(trainer, values, self._step)

    def _rates(self) -> dict[str, float]:
        """Return what Lightning makes of the last interval; its "device" is all of them here."""
        found = self._window.compute()
        names = {
            "tokens_per_second": ("device/items_per_sec", 1.0),
            "tflops_per_second": ("device/flops_per_sec", TERA),
            "mfu": ("device/mfu", 1.0),
        }
        return {
            name: found[key] / unit for name, (key, unit) in names.items() if found.get(key, None)
        }

    def _begin_interval(self, seconds: float, waited: float, tokens: int, flops: int) -> None:
        """Tell Lightning what the last interval brought."""
        self._tokens += tokens
        self._window.update(
            time=seconds,
            batches=self._readings,
            samples=self._readings,
            lengths=self._tokens if self._has_tokens else None,
            flops=flops if self._has_tokens and self._maps else None,
        )
        self._readings += 1
        self._seconds, self._waited, self._steps = seconds, waited, 0
        self._micro_batches = 0
        self._counts.zero_()


def count_tokens(batch: Any, is_shifted: bool = True) -> Tensor | None:
    """Return tokens, targets and the sum of the examples' squared lengths; None without token ids.

    A position p of an example counts 2 p + 1 of the last, which adds up to n^2 over n positions.

    Args:
        batch: What holds `input_ids`.
        is_shifted: As for `count_targets`; where targets cannot be told, they are 0.

    Shape:
        [3] int64, on the batch's device.
    """
    ids = _tensor(batch, "input_ids")
    if ids is None or ids.ndim == 0:
        return None
    mask, positions = _tensor(batch, "attention_mask"), _tensor(batch, "position_ids")
    is_token = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None and mask.shape == ids.shape:
        is_token = mask != 0
    if positions is not None and positions.shape == ids.shape:
        squares = ((2 * positions + 1) * is_token).sum()
    else:
        squares = is_token.sum(-1).square().sum()
    targets = count_targets(batch, is_shifted)
    if targets is None:
        targets = squares.new_zeros(())
    return torch.stack([is_token.sum(), targets, squares]).long()


def count_targets(batch: Any, is_shifted: bool = True) -> Tensor | None:
    """Return how many labels the loss is taken at; None where labels are not those of tokens.

    Args:
        batch: What holds `input_ids` and `labels`.
        is_shifted: Whether a position predicts the next one's label, so that a row's first has
            none to predict it; else each label is a target.
    """
    ids, labels = _tensor(batch, "input_ids"), _tensor(batch, "labels")
    if ids is None or labels is None or labels.is_floating_point():
        return None
    if is_shifted:
        return (labels[..., 1:] >= 0).sum() if labels.shape == ids.shape else None
    return (labels >= 0).sum() if labels.ndim == ids.ndim else None


def shifts_labels(model: nn.Module) -> bool:
    """Tell whether the loss shifts the labels, as those of causal language models do.

    transformers' other models are known by configuration and kind of loss; of a model that is not
    theirs nothing is known, and it is taken for a causal one.
    """
    if _config(model).get("is_encoder_decoder"):
        return False
    losses = (getattr(module, "loss_type", None) for module in model.modules())
    return next((loss for loss in losses if isinstance(loss, str)), None) not in UNSHIFTED_LOSSES


def linear_maps(model: nn.Module) -> Iterator[LinearMap | LayerShape]:
    """Yield what multiplies each token in `model`: linear maps, and adapted layers as a whole.

    Modules are taken to run in their order: a map has a gradient into its input if one before it is
    trained. PEFT multiplies its A and B as maps of their own, in the usual order.
    """
    is_trained, seen = False, set[nn.Module]()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            yield _adapted_map(module, is_trained)
            seen.add(module.base)
        elif is_linear(module) and module not in seen:
            yield _linear_map(module, is_trained)
        is_trained = is_trained or any(p.requires_grad for p in module.parameters(recurse=False))


def _adapted_map(layer: LoRALinear, input_gradient: bool) -> LinearMap | LayerShape:
    if layer.merged:
        return _linear_map(layer.base, input_gradient)
    trained = layer.lora_a.requires_grad or layer.lora_b.requires_grad
    sizes = layer.in_features, layer.out_features, layer.rank
    return LayerShape(*sizes, 0, input_gradient, adapter_gradient=trained)


def _linear_map(module: Any, input_gradient: bool) -> LinearMap:
    return LinearMap(*linear_features(module), module.weight.requires_grad, input_gradient)


def uncountable(model: nn.Module) -> str | None:
    """Return why `linear_maps` would not tell what a token costs in `model`; None if they do."""
    if _config(model).get("is_encoder_decoder"):
        return "encoder and decoder see different tokens"
    for path, module in model.named_modules():
        if isinstance(module, (LoRALinear, nn.Embedding)) or is_linear(module):
            continue
        for parameter in module.parameters(recurse=False):
            if len(getattr(parameter, "ds_shape", parameter.shape)) > 1:  # ZeRO-3 keeps it there
                return f"{path or type(module).__name__} multiplies by more than linear maps"
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: of a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _tensor(batch: Any, name: str) -> Tensor | None:
    """Return a batch's tensor, a key or an attribute."""
    value = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
    return value if isinstance(value, Tensor) else None


def _config(model: nn.Module) -> dict[str, Any]:
    """Return the configuration of the first of transformers' models in `model`; else nothing."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            return dict(config.to_dict())
    return {}


def _peak_flops(trainer: Trainer, peak_tflops: float | None) -> float | None:
    """Return what a device could do at best per second, where that is known."""
    if peak_tflops is not None:
        return peak_tflops * TERA
    device = trainer.strategy.root_device
    with trainer.precision_plugin.forward_context():
        if torch.is_autocast_enabled(device.type):
            return _available_flops(device, torch.get_autocast_dtype(device.type))
    matrices = (p for p in trainer.lightning_module.parameters() if p.ndim > 1)
    dtypes = (matrix.dtype for matrix in matrices if matrix.is_floating_point())
    return _available_flops(device, next(dtypes, torch.float32))


def _available_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    if device.type == "cuda" and torch.cuda.get_device_name(device) == "NVIDIA H200":
        return H200.get(dtype)
    return get_available_flops(device, dtype)


def _share(trainer: Trainer) -> float:
    """Return 1, or less where several processes see the same batch (tensor parallelism)."""
    sampling = trainer.distributed_sampler_kwargs or {}
    return float(sampling.get("num_replicas", trainer.world_size)) / trainer.world_size


def _gather(trainer: Trainer, own: list[int]) -> list[list[int]]:
    """Return the numbers of all processes."""
    if trainer.world_size == 1:
        return [own]
    table = torch.zeros(trainer.world_size, len(own), dtype=torch.int64)
    table[trainer.global_rank] = torch.tensor(own)
    table = table.to(trainer.strategy.root_device)
    gathered: list[list[int]] = trainer.strategy.reduce(table, reduce_op="sum").tolist()
    return gathered
