"""Stop a run whose loss or gradient is not finite, before its weights are spoiled."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import final

from rslightning.errors import RunError


class NonFiniteError(RunError):
    """A loss or gradient is not finite: all processes of a run raise it at the same step."""


@final
class NonFiniteGuard(Callback):
    """Stop the run at the first optimizer step whose loss or gradient is not finite.

    The optimizer does not take that step on any process: the weights are those of the step before,
    and a checkpoint callback that saves on exceptions (as `TrainableCheckpoint` does) keeps them as
    `last`. The message names the step and the module whose output is the first that is not finite,
    which a second forward pass over the step's batches finds; where all outputs are finite, or
    optimization is manual, it names the parameter whose gradient is the first that is not. The
    second pass logs nothing and leaves buffers as they were; whatever else `training_step` keeps
    has seen those batches twice.

    Works with any LightningModule. The host waits for the device once per optimizer step. Under
    float16's scaler, which skips steps on purpose, and under DeepSpeed, which keeps the gradients
    to itself, only the loss is looked at: a gradient then shows one step later, as a loss.

    Raises:
        NonFiniteError: If the loss or a gradient is not finite.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Any, int]] = []  # micro-batches of the open step
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the open step of a fit that failed."""
        self._batches, self._losses = [], []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch, in case it is to blame."""
        self._batches.append((batch, batch_idx))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Remember the loss; the host does not wait."""
        wide = torch.promote_types(loss.dtype, torch.float32)
        self._losses.append(loss.detach().to(wide).sum())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at losses and gradients before they reach the weights."""
        batches, losses = self._batches, self._losses
        if _is_boundary(trainer):
            self._batches, self._losses = batches[-1:] if len(trainer.optimizers) > 1 else [], []
        numbers = [*losses, *_largest_gradients(trainer, pl_module)]
        if not numbers:
            return
        device = trainer.strategy.root_device
        finite = torch.stack([number.to(device).isfinite() for number in numbers]).float()
        found = finite.amin() if trainer.world_size == 1 else _everywhere(trainer, finite.amin())
        if not bool(found):
            step = trainer.global_step + 1
            raise NonFiniteError(_explain(trainer, pl_module, step, batches, losses))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Under manual optimization the batch is over when it ends, stepped or not."""
        if not pl_module.automatic_optimization:
            self._batches, self._losses = [], []


def _is_boundary(trainer: Trainer) -> bool:
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):  # where the hook runs for every micro-batch
        return bool(strategy.deepspeed_engine.is_gradient_accumulation_boundary())
    return True


def _largest_gradients(trainer: Trainer, module: nn.Module) -> list[Tensor]:
    """Return the largest entries of this process's gradients, NaN where there is one.

    Nothing where the gradients may or must not be read.
    """
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scaled or isinstance(trainer.strategy, DeepSpeedStrategy):
        return []
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in module.parameters():
        gradient = None if parameter.grad is None else _local(parameter.grad)
        if gradient is not None and gradient.numel():  # of a small matrix a process may have none
            groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return [torch.stack(torch._foreach_norm(group, math.inf)).amax() for group in groups.values()]


def _local(gradient: Any) -> Tensor:
    """Return what this process holds of a gradient: FSDP2 gives it a shard."""
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.coalesce().values() if local.is_sparse else local


def _everywhere(trainer: Trainer, finite: Tensor) -> Tensor:
    """Return 1 if `finite` is 1 on all processes, else 0: they must stop together."""
    reduced = trainer.strategy.reduce(finite, reduce_op="sum")
    return torch.as_tensor(reduced) == trainer.world_size


def _explain(
    trainer: Trainer,
    module: LightningModule,
    step: int,
    batches: Sequence[tuple[Any, int]],
    losses: Sequence[Tensor],
) -> str:
    bad = [f"{loss.item():g}" for loss in losses if not loss.isfinite()]
    what = f"the loss is {bad[0]}" if bad else "a gradient is not finite"
    checkpoint = getattr(trainer.checkpoint_callback, "dirpath", None)
    kept = f" The weights of step {step - 1} are kept in {checkpoint}." if checkpoint else ""
    return (
        f"Step {step} was not taken: {what}{_where(trainer, module, batches)}.{kept} A lower "
        "learning rate, warm-up or trainer.gradient_clip_val may help."
    )


def _where(trainer: Trainer, module: LightningModule, batches: Sequence[tuple[Any, int]]) -> str:
    """Say where the first value is that is not finite, if that can be found."""
    source = None
    if module.automatic_optimization:  # a step that is taken by hand is not repeated
        try:
            source = _first_output(trainer, module, batches)
        except Exception as error:  # of a step that takes its batch apart, or keeps count
            reason = f"training_step could not be repeated ({type(error).__name__})"
            return f"; where it began is unknown, since {reason}"
    source = source or _first_gradient(module)
    return f"; the first such value is {source}" if source else ""


@torch.no_grad()
def _first_output(
    trainer: Trainer, module: LightningModule, batches: Sequence[tuple[Any, int]]
) -> str | None:
    """Run the batches again; return the first module whose output is not finite.

    Of several processes all run all of them: where one stopped at its first such output, another
    would wait for it in the next forward pass that gathers weights.
    """
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    found: list[str] = []
    with (
        _listening(module, found.append),
        _same_buffers(module),
        trainer.precision_plugin.train_step_context(),
    ):
        for batch, index in batches:
            if found and trainer.world_size == 1:
                break
            module.training_step(*((batch, index) if takes_index else (batch,)))
    return f"an output of {found[0]}" if found else None


@contextmanager
def _same_buffers(module: nn.Module) -> Iterator[None]:
    """Give the module its buffers back, and what they held."""
    kept = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for owner, name, buffer, values in kept:
            if not buffer.is_inference():  # made in a validation: nothing can change it here
                buffer.copy_(values)
            setattr(owner, name, buffer)


@contextmanager
def _listening(module: LightningModule, found: Callable[[str], None]) -> Iterator[None]:
    """Call `found` with the path of each module whose output is not finite; log nothing."""
    silent: dict[str, Any] = dict.fromkeys(("log", "log_dict"), lambda *_, **__: None)
    handles = [
        child.register_forward_hook(partial(_inspect, path=path, found=found))
        for path, child in module.named_modules()
        if path
    ]
    vars(module).update(silent)
    try:
        yield
    finally:
        for name in silent:
            del vars(module)[name]
        for handle in handles:
            handle.remove()


def _inspect(
    module: nn.Module, inputs: Any, output: Any, path: str, found: Callable[[str], None]
) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
        found(path)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of floating point in a module's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _first_gradient(module: nn.Module) -> str | None:
    """Return the parameter whose gradient is the first that is not finite in a backward pass."""
    for name, parameter in reversed(list(module.named_parameters())):
        gradient = None if parameter.grad is None else _local(parameter.grad)  # asks nobody else
        if gradient is not None and not bool(gradient.isfinite().all()):
            return f"in the gradient of {name}"
    return None
