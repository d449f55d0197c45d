"""Log the norm of the gradients that the optimizer is about to use."""

from collections import Counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import final

from rslightning.callbacks.scalars import optimizer_step, write_scalars
from rslightning.errors import UserError
from rslightning.stats.distributed import is_sharded, read_deepspeed_squares, read_squares
from rslightning.stats.gradients import GradientSource, gradient_sources, summarize


@final
class GradientNormMonitor(Callback):
    r"""Log the paper's average parameter gradient norm, for any LightningModule.

    mean = 1/n \sum_i |G_i|_2, total = sqrt(\sum_i |G_i|_2^2) over the gradients G_i of the n
    adapter tensors (ours or PEFT's) that the optimizer trains; where it trains none, over all the
    parameters that it trains. A tensor that got no gradient counts as zero. AdaLoRA's E are
    tensors, too, and its regularizer is part of the gradients; E is neither in `a` nor in `b`.

    The gradients are those that the optimizer is about to use: accumulated over micro-batches,
    averaged over processes, without the loss scale of float16, before clipping. In a step that
    float16's scaler will skip they are infinite or NaN, and so are the norms. Of an optimizer that
    asks for several gradients in one step (LBFGS) the first is read; under manual optimization each
    counts as a step.

    Reading waits for the device once per logged step, and not at all on the others. Sharded
    gradients (FSDP2, ZeRO-3) take one small all-reduce; under the other stages of DeepSpeed a
    reading costs about as much as one more reduction of the adapters' gradients.

    Args:
        every_n_steps: Optimizer steps between two readings; the first step is read. Under manual
            optimization the steps of each optimizer are counted on their own.
        per_layer: Log the norm of each layer, too.

    Logs:
        grad_norm/mean: mean over the tensors of the L2 norm, every n optimizer steps.
        grad_norm/total: L2 norm over all tensors together.
        grad_norm/a, grad_norm/b: over all A's, over all B's; of modules with adapters.
        grad_norm/<layer>: over the tensors of one adapted layer (`per_layer`).

        The unit is nats per entry of a parameter, if the loss is in nats. With several optimizers
        each has tags of its own, over its own parameters: grad_norm/optimizer_0/mean and so on, in
        the order of `configure_optimizers`.

    Raises:
        UserError: If `every_n_steps` is not positive, or gradients cannot be read exactly: FSDP1,
            XLA, local SGD, MiCS and mixtures of experts in DeepSpeed, parameters beside the shards
            of FSDP2, strategies that are not known.
    """

    def __init__(self, every_n_steps: int = 10, per_layer: bool = False) -> None:
        if every_n_steps < 1:
            raise UserError(f"gradient_norm.every_n_steps is {every_n_steps}; it must be positive.")
        self.every_n_steps, self.per_layer = every_n_steps, per_layer
        self._last_seen: int | None = None  # step, under automatic optimization
        self._manual_steps: Counter[int] = Counter()  # of each optimizer
        self._found: dict[int, tuple[Any, list[GradientSource]]] = {}  # of each optimizer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy whose gradients cannot be read exactly."""
        if stage != "fit":
            return
        self._last_seen = None
        self._manual_steps.clear()
        self._found.clear()
        if reason := _unreadable(trainer.strategy):
            raise UserError(
                "GradientNormMonitor cannot read exact gradients under "
                f"{type(trainer.strategy).__name__}: {reason}; or leave it out, with "
                "gradient_norm: null."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what shows only once the model is distributed.

        A validation would leave the root's parameters gathered (FSDP2): look before it.
        """
        strategy = trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and strategy.deepspeed_engine.has_moe_layers:
            raise UserError(
                "GradientNormMonitor cannot read exact gradients of DeepSpeed's mixtures of "
                "experts: each process has experts of its own."
            )
        if isinstance(strategy, ModelParallelStrategy):
            _refuse_unsharded(strategy, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read and log, if this step is due."""
        if not _optimizer_steps_now(trainer.strategy) or not self._is_due(trainer, optimizer):
            return
        several = len(trainer.optimizers) > 1
        sources = self._sources(pl_module, _index(trainer, optimizer), optimizer)
        if not sources:
            return
        squares = _read(trainer, optimizer, sources).tolist()
        prefix = f"grad_norm/optimizer_{_index(trainer, optimizer)}" if several else "grad_norm"
        norms = summarize(sources, squares, self.per_layer)
        values = {f"{prefix}/{name}": norm for name, norm in norms.items()}
        write_scalars(trainer, values, optimizer_step(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the steps of each optimizer under manual optimization, else nothing."""
        return {"manual_steps": dict(self._manual_steps)} if self._manual_steps else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was."""
        self._manual_steps = Counter(state_dict["manual_steps"])

    def _sources(
        self, module: LightningModule, index: int, optimizer: Optimizer
    ) -> list[GradientSource]:
        """Return what to read; it is looked for again once the optimizer has other parameters.

        An optimizer that holds none of the module's parameters steps on copies of all of them, as
        DeepSpeed's do.
        """
        own = [p for group in optimizer.param_groups for p in group["params"]]
        state = [(id(p), p.requires_grad) for p in own]
        if self._found.get(index, (None,))[0] != state:
            named = {id(parameter) for parameter in module.parameters()}
            holds_copies = named.isdisjoint(id(parameter) for parameter in own)
            self._found[index] = state, gradient_sources(module, None if holds_copies else own)
        return self._found[index][1]

    def _is_due(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        if trainer.lightning_module.automatic_optimization:
            step, before = trainer.global_step, self._last_seen
            self._last_seen = step
            return step % self.every_n_steps == 0 and step != before
        index = _index(trainer, optimizer)
        self._manual_steps[index] += 1
        return (self._manual_steps[index] - 1) % self.every_n_steps == 0


@torch.no_grad()
def _read(trainer: Trainer, optimizer: Optimizer, sources: list[GradientSource]) -> Tensor:
    """Return the squared norm [n] of each source's gradient, by the route of the strategy."""
    strategy, device = trainer.strategy, trainer.strategy.root_device
    parameters = [source.parameter for source in sources]
    if isinstance(strategy, DeepSpeedStrategy):
        return read_deepspeed_squares(strategy.deepspeed_engine, parameters, device)
    squares = read_squares(parameters, device)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # Lightning takes the loss scale out before this hook, except for optimizers (fused ones) that
    # declare by this attribute, torch's own convention, that they do so themselves.
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scale: Tensor = scaler.scale(torch.ones_like(squares[0]))
        squares = squares / scale.square()
    return squares


def _optimizer_steps_now(strategy: Strategy) -> bool:
    """Tell whether a step follows: under DeepSpeed the hook runs for every micro-batch."""
    if isinstance(strategy, DeepSpeedStrategy):
        return bool(strategy.deepspeed_engine.is_gradient_accumulation_boundary())
    return True


def _index(trainer: Trainer, optimizer: Optimizer) -> int:
    return next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)


def _unreadable(strategy: Strategy) -> str | None:
    """Return why gradients cannot be read exactly under `strategy`; null if they can."""
    if isinstance(strategy, FSDPStrategy):
        return "FSDP1 flattens parameters; use FSDP2 (ModelParallelStrategy)"
    if isinstance(strategy, DeepSpeedStrategy):
        config = strategy.config if isinstance(strategy.config, dict) else {}
        mics = config.get("zero_optimization", {}).get("mics_shard_size", -1) > 0
        return "MiCS shards within groups of processes; use ZeRO-3 without it" if mics else None
    known = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
    if isinstance(strategy, (XLAStrategy, SingleDeviceXLAStrategy)) or not isinstance(
        strategy, known
    ):
        return "it is none of single device, DDP, FSDP2 (ModelParallelStrategy) and DeepSpeed"
    if getattr(strategy, "_model_averaging_period", None) is not None:
        return "with local SGD each process has gradients of its own"
    return None


def _refuse_unsharded(strategy: ModelParallelStrategy, module: LightningModule) -> None:
    """Raise `UserError` if a parameter's gradient differs between data-parallel processes."""
    if strategy.device_mesh["data_parallel"].size() == 1:
        return
    for source in gradient_sources(module):
        if not is_sharded(source.parameter):
            raise UserError(
                f"GradientNormMonitor cannot read exact gradients: a parameter of "
                f"{source.layer or type(module).__name__} is not sharded, so that each process has "
                "a gradient of its own; apply fully_shard to the whole model."
            )
