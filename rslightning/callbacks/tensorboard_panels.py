"""Arrange TensorBoard: the paper's panels first, and the settings by which runs are compared."""

from typing import Any, Final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams
from typing_extensions import final

from rslightning.callbacks.activation_moments import ActivationMomentMonitor
from rslightning.callbacks.gradient_norm import GradientNormMonitor
from rslightning.callbacks.throughput import TokenThroughputMonitor
from rslightning.rslora import scaling_factor
from rslightning.rslora.linear import adapter_layers

LOSS: Final[dict[str, tuple[str, ...]]] = {
    "loss": ("train/loss", "val/loss"),
    "perplexity": ("train/perplexity",),
}
GRADIENTS: Final[dict[str, tuple[str, ...]]] = {
    "average parameter gradient norm": ("grad_norm/mean",),
    "total": ("grad_norm/total",),
    "over A's": ("grad_norm/a",),
    "over B's": ("grad_norm/b",),
}
MOMENTS: Final[dict[str, tuple[str, ...]]] = {
    f"{title}, {order} moment": (f"{group}/{order}_moment",)
    for group, title in (
        ("activation", "post-adapter output"),
        ("adapter_output", "adapter's output"),
        ("input_grad", "gradient into the adapter's input"),
    )
    for order in ("first", "second")
}
THROUGHPUT: Final[dict[str, tuple[str, ...]]] = {
    "tokens per second": ("perf/tokens_per_second", "perf/target_tokens_per_second"),
    "memory, GiB": ("perf/memory_gib",),
    "share of time waiting for data": ("perf/data_wait_share",),
}
COMPARED: Final = ("val/loss", "train/loss", "grad_norm/mean")
"""Metrics beside which TensorBoard lists the settings of each run."""


@final
class TensorBoardPanels(Callback):
    """Write a layout for the Custom Scalars tab, and the run's settings for the HParams tab.

    The layout opens with loss and perplexity, then gradient norms, activation moments and
    throughput where their monitors run. The settings are those of the paper's sweeps: rank,
    scaling, alpha, gamma_r, learning rate, optimizer, base model and number of trainable
    parameters; runs of one sweep can be filtered, sorted and drawn by them, beside `val/loss`,
    `train/loss` and `grad_norm/mean`.

    Without a TensorBoard logger nothing happens. Works with any LightningModule; settings that it
    does not have are left out.

    Logs:
        custom_scalars__config__, and three summaries of the HParams plugin: once, at the start.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both on the first process."""
        if not trainer.is_global_zero:
            return
        panels = _layout(trainer)
        settings = run_settings(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(panels)
                for summary in hparams(settings, dict.fromkeys(COMPARED, 0.0)):
                    logger.experiment.file_writer.add_summary(summary)


def run_settings(trainer: Trainer, module: LightningModule) -> dict[str, str | float]:
    """Return what distinguishes this run from others of a sweep.

    TensorBoard sorts by name and shows the first five without being asked: by these names they are
    alpha, gamma_r, rank, scaling and the learning rate.
    """
    settings: dict[str, str | float] = {}
    layers = [layer for _, layer in adapter_layers(module)]
    if layers:
        adapter: Any = getattr(module, "adapter", None) or layers[0].adapter
        gamma = scaling_factor(adapter.rank, adapter.alpha, adapter.scaling)
        settings |= {"adapter.alpha": adapter.alpha, "adapter.gamma_r": gamma}
        settings |= {"adapter.rank": adapter.rank, "adapter.scaling": adapter.scaling}
    if trainer.optimizers:
        optimizer: Any = trainer.optimizers[0]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        settings["learning_rate"] = float(optimizer.param_groups[0]["lr"])
        settings["optimizer"] = type(optimizer).__name__
    if hasattr(module, "base_model"):
        settings["model.base_model"] = str(module.base_model)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return settings | {"model.trainable_parameters": trained}


def _layout(trainer: Trainer) -> dict[str, dict[str, list[Any]]]:
    """Return category -> chart -> kind and tags, as TensorBoard wants it: tags are patterns."""
    kinds = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    categories = {"loss and perplexity": LOSS}
    if GradientNormMonitor in kinds:
        categories["gradient norms"] = GRADIENTS
    if ActivationMomentMonitor in kinds:
        categories["moments"] = MOMENTS
    if TokenThroughputMonitor in kinds:
        categories["throughput"] = THROUGHPUT
    return {
        category: {
            title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items()
        }
        for category, charts in categories.items()
    }
