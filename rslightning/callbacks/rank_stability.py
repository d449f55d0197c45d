"""Measure at the start of a fit which scaling is stable in the rank, for this very optimizer."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from typing_extensions import final

from rslightning.callbacks.merge_adapters import run_folder
from rslightning.callbacks.scalars import optimizer_step, write_scalars
from rslightning.errors import UserError
from rslightning.rslora.inject import set_module
from rslightning.rslora.linear import LoRALinear, adapter_layers
from rslightning.rslora.scaling import RANK_EXPONENT, Scaling, check_rank, check_scaling
from rslightning.rslora.spec import Init, ResolvedAdapter
from rslightning.stats.gradients import gradient_sources, squared_norms, summarize
from rslightning.stats.stability import (
    Float32Compute,
    RankPoint,
    Slopes,
    Step,
    describe_stability,
    fit_slopes,
    root_mean_square,
)

REPORT_FILE: Final = "rank_stability.txt"

LOSS_SCALE: Final = 2.0**10
"""A power of two changes no bit of a gradient, and keeps small ones of float16 from vanishing."""


@final
class RankStabilityReport(Callback):
    """Measure over several ranks and scalings what the run's first step would do.

    For each scaling and rank the run's adapters are replaced by fresh ones (same places, alpha and
    initialization; no dropout), one real batch gives the gradient norm at step 0, and one step of
    the run's own optimizer the change of the output, both with their slopes over the rank beside
    the theory's (`rslightning.stats.stability`, after Definition 3.1 of arXiv:2312.03732). The
    report is printed and written to `rank_stability.txt` in the run folder.

    "Stable" names an optimizer and a learning rate: under SGD `rslora` keeps the output's change
    constant over the rank, under Adam, whose first step does not depend on the gradient's size,
    `lora` does, and `rslora` lets it grow with the square root of the rank.

    The run is not disturbed: afterwards adapters, modes and random states are the same objects and
    bits, and no batch is used up. It acts before the first step, also after a resume.

    - Batch: the first of the training data, from a loader made for this.
    - Gradient: in the run's precision. Norms are read before clipping, as `grad_norm/mean`.
    - Step: the module's `make_optimizer` over the fresh adapters, after the trainer's clipping. Its
      learning rate is the optimizer's own: a schedule is left out, since warm-up starts at 0.
    - Output: logits in float32 without autocast, also of a 16-bit base, whose rounding is larger
      than the change; a weight is widened while it is used, the model is never copied.
    - Several processes each measure their own rows, without communication; the first one reports.

    Works with a `CausalLMModule` that has adapters and a DataModule, on one device or under DDP.
    `rank_pattern` is left out: every layer has the rank of the table.

    Attributes:
        points: What was measured, once the fit has begun.
        slopes: The slopes of it.

    Args:
        ranks: Two or more ranks; they may exceed a layer's sizes.
        scalings: Names of scalings, see `rslightning.rslora.scaling`.
        max_rows: Rows of the batch that are used.

    Raises:
        UserError: If `ranks` holds fewer than two distinct ranks, a rank or `max_rows` is not
            positive, there is no scaling or an unknown one; if the strategy is another (FSDP2,
            DeepSpeed, ...), the module has no adapters or is no `CausalLMModule`, the trainer has
            no DataModule, or the attention cannot compute in float32 (`flash_attention_2`).

    Logs:
        rank_stability/<scaling>/gradient_norm_slope: slope of log(gradient norm) over log(rank).
        rank_stability/<scaling>/output_change_slope: slope of log(root mean square change of the
            logits) over log(rank); both once, at the first step, from the first process's rows.
        rank_stability/report: the report as text, where the logger is TensorBoard's.
        rank_stability/slopes: the measurements as a figure, there too, if matplotlib is installed.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (4, 32, 256),
        scalings: Sequence[Scaling] = ("lora", "rslora"),
        max_rows: int = 4,
    ) -> None:
        for rank in ranks:
            check_rank(rank, "rank_stability.ranks")
        for scaling in scalings:
            check_scaling(scaling)
        if len(set(ranks)) < 2 or not scalings or max_rows < 1:
            raise UserError(
                "rank_stability needs two different ranks, one scaling and max_rows of 1 or more; "
                f"got ranks {list(ranks)}, scalings {list(scalings)}, max_rows {max_rows}."
            )
        self.ranks, self.scalings, self.max_rows = sorted(set(ranks)), tuple(scalings), max_rows
        self.points: list[RankPoint] = []
        self.slopes: list[Slopes] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured."""
        if stage == "fit":
            _check_strategy(trainer)
            _check_module(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and report."""
        started, module = time.perf_counter(), cast(Any, pl_module)
        with isolate_rng(), _evaluated(module):
            batch = _first_rows(trainer, module, self.max_rows)
            self.points, size = self._measure(trainer, module, batch)
            step = _describe_step(trainer, module)
        init = module.adapter.init
        exponents: dict[str, float] = {name: _rank_exponent(name, init) for name in self.scalings}
        self.slopes = fit_slopes(self.points, exponents)
        rows, tokens = batch.input_ids.shape
        text = (
            f"{describe_stability(self.points, self.slopes, step)}\n\n"
            f"Measured on {rows} rows of {tokens} tokens in {time.perf_counter() - started:.1f} s; "
            f"the largest adapters took {size / 2**30:.3f} GiB with gradients and optimizer state."
        )
        path = run_folder(trainer) / REPORT_FILE  # a broadcast: all processes ask
        if trainer.is_global_zero:
            _publish(trainer, path, text, self.points, self.slopes)

    def _measure(self, trainer: Trainer, module: Any, batch: Any) -> tuple[list[RankPoint], int]:
        """Return the points, and the bytes that the largest adapters took."""
        grid = [(scaling, rank) for scaling in self.scalings for rank in self.ranks]
        silent = not trainer.is_global_zero or trainer.progress_bar_callback is None
        points, size, before = [], 0, None
        for scaling, rank in tqdm(grid, "rank stability", disable=silent):
            with fresh_adapters(module.model, rank, scaling, module.adapter.init) as parameters:
                if before is None:  # B = 0: the same for all
                    before = _logits(module, batch)
                optimizer = module.make_optimizer(parameters)
                norm = _gradient_norm(trainer, module, batch)
                _clip(trainer, optimizer)
                optimizer.step()
                change = root_mean_square(_logits(module, batch) - before)
                size = max(size, _bytes(optimizer))
            points.append(RankPoint(scaling, rank, norm, change))
        return points, size


@contextmanager
def fresh_adapters(
    model: nn.Module, rank: int, scaling: Scaling, init: Init = "kaiming_uniform"
) -> Iterator[list[nn.Parameter]]:
    """Put untrained adapters in the place of a model's own, and yield their parameters.

    They wrap the same bases with the same alpha and dtype, without dropout; A is what
    `inject_adapters` would draw now. The model's own layers are set aside, not changed.
    """
    own = dict(adapter_layers(model))
    fresh = {path: _untrained(layer, rank, scaling) for path, layer in own.items()}
    try:
        for path, layer in fresh.items():
            layer.reset_adapter(path, init)
            set_module(model, path, layer)
        yield [p for layer in fresh.values() for p in (layer.lora_a, layer.lora_b)]
    finally:
        for path, layer in own.items():
            set_module(model, path, layer)


def _untrained(layer: LoRALinear, rank: int, scaling: Scaling) -> LoRALinear:
    numbers = ResolvedAdapter(rank, layer.adapter.alpha, scaling)
    return LoRALinear(layer.base, numbers, dtype=layer.lora_a.dtype).eval()


def _check_strategy(trainer: Trainer) -> None:
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise UserError(
            f"rank_stability measures on whole parameters, which {type(trainer.strategy).__name__} "
            "does not keep on each process: run it on one device or under DDP, or set it to null."
        )


def _check_module(trainer: Trainer, module: Any) -> None:
    if not all(hasattr(module, name) for name in ("nats", "make_optimizer", "adapter")):
        raise UserError("rank_stability needs a CausalLMModule, or null.")
    if module.adapter is None:
        raise UserError(
            "rank_stability compares adapters, and model.adapter is null (full fine-tuning): set "
            "rank_stability to null, too."
        )
    if module.adapter.allocation is not None:
        raise UserError(
            "rank_stability compares adapters of ranks that stay: leave model.adapter.allocation "
            "out, or set rank_stability to null."
        )
    if getattr(trainer, "datamodule", None) is None:
        raise UserError("rank_stability takes a batch of a DataModule; give one to the Trainer.")
    if "flash" in (module.attention or ""):
        raise UserError(
            f"rank_stability measures in float32, which attention {module.attention!r} does not "
            "compute: set model.attention to sdpa, or rank_stability to null."
        )


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Turn dropout off, but keep the recomputation of activations; restore all modes."""
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        for child in modes:
            if getattr(child, "gradient_checkpointing", False):
                child.training = modes[child]  # of this module alone, not of those inside
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def _first_rows(trainer: Trainer, module: LightningModule, max_rows: int) -> Any:
    """Return the first rows of the training data, from a loader of a copy of the DataModule.

    Making a loader may write to its DataModule, as the counts of a stream; the copy takes that.
    """
    data: Any = copy.copy(trainer.datamodule)  # type: ignore[attr-defined]
    data.counts, data.num_workers = dict(getattr(data, "counts", {})), 0
    batch = move_data_to_device(next(iter(data.train_dataloader())), module.device)
    rows = {
        name: None if tensor is None else tensor[:max_rows]
        for name, tensor in batch._asdict().items()
        if name != "step_targets"
    }
    return type(batch)(**rows)


@torch.enable_grad()
def _gradient_norm(trainer: Trainer, module: Any, batch: Any) -> float:
    """Fill the gradients of a module's adapters; return `grad_norm/mean` of them."""
    with trainer.precision_plugin.forward_context():
        nats, targets = module.nats(batch)
    (LOSS_SCALE * nats / targets.clamp(min=1)).backward()
    sources = gradient_sources(module.model)
    gradients = [source.parameter.grad for source in sources]
    for gradient in gradients:
        if gradient is not None:
            gradient /= LOSS_SCALE
    return summarize(sources, squared_norms(gradients, module.device).tolist())["mean"]


def _clip(trainer: Trainer, optimizer: Optimizer) -> None:
    if trainer.gradient_clip_val:
        algorithm = trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM
        trainer.precision_plugin.clip_gradients(
            optimizer, trainer.gradient_clip_val, GradClipAlgorithmType(algorithm)
        )


@torch.no_grad()
def _logits(module: Any, batch: Any) -> Tensor:
    """Return the logits [N, V] float32 at the N real positions of a batch."""
    with Float32Compute():
        logits: Tensor = module(batch)
    return logits[batch.attention_mask.bool()]


def _bytes(optimizer: Optimizer) -> int:
    """Return the memory of an optimizer's parameters, their gradients and its state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in parameters for t in (p, p.grad, *optimizer.state[p].values())]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _describe_step(trainer: Trainer, module: Any) -> Step:
    """Name the step, as the module's own factory would take it."""
    optimizer = module.make_optimizer([nn.Parameter(torch.zeros(1, 1, device=module.device))])
    remarks = []
    if trainer.gradient_clip_val:
        algorithm = trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM
        remarks.append(f"gradients clipped by {algorithm} at {trainer.gradient_clip_val:g}")
    if module.make_lr_scheduler is not None:
        remarks.append("its schedule left out")
    rate = float(optimizer.param_groups[0]["lr"])
    return Step(type(optimizer).__name__, rate, ", ".join(remarks))


def _rank_exponent(scaling: Scaling, init: Init) -> float:
    """Return p of gamma_r |A x| = r^(1/2 - p): B.3's A is smaller by r^(-1/2), as is rslora."""
    return RANK_EXPONENT[scaling] + (RANK_EXPONENT["rslora"] if init == "rank_corrected" else 0)


def _publish(
    trainer: Trainer, path: Path, text: str, points: Sequence[RankPoint], slopes: Sequence[Slopes]
) -> None:
    """Print, write and log the report, on the first process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")
    rank_zero_info(f"{text}\n{path}")
    tags = {
        f"rank_stability/{each.scaling}/{name}_slope": getattr(each, name)
        for each in slopes
        for name in ("gradient_norm", "output_change")
    }
    write_scalars(trainer, tags, optimizer_step(trainer))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            step, markdown = optimizer_step(trainer), text.replace("\n", "\n    ")
            logger.experiment.add_text("rank_stability/report", f"    {markdown}", step)
            if find_spec("matplotlib") is not None:
                logger.experiment.add_figure("rank_stability/slopes", draw_points(points), step)
            else:
                rank_zero_info("rank_stability draws no figure: matplotlib is not installed.")


def draw_points(points: Sequence[RankPoint]) -> Any:
    """Return a matplotlib figure of gradient norm and output change over the rank, in log-log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("gradient_norm", "output_change"), strict=True):
        for scaling in dict.fromkeys(point.scaling for point in points):
            own = [point for point in points if point.scaling == scaling]
            ranks = [point.rank for point in own]
            axes.loglog(ranks, [getattr(point, name) for point in own], "o-", label=scaling)
        axes.set(xlabel="rank", ylabel=name.replace("_", " "))
        axes.legend()
    return figure
