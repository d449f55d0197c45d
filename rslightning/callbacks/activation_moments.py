"""Moments of the adapters' outputs and input gradients: is the run rank-stabilized?"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import final

from rslightning.callbacks.scalars import optimizer_step, write_scalars
from rslightning.errors import UserError
from rslightning.rslora.linear import LoRALinear, is_linear
from rslightning.stats.moments import (
    QUANTITIES,
    AdaptedLayer,
    LowRank,
    MomentRecorder,
    Moments,
    mean_over_layers,
)


@final
class ActivationMomentMonitor(Callback):
    """Log first and second moments of the adapted layers: both halves of Definition 3.1.

    Definition 3.1 of arXiv:2312.03732 (see `stats.moments`) asks whether the moments of an
    adapter's output and of the loss gradient into its input stay in size as the rank grows.

    Entries of the micro-batches of a step and of all processes count alike; positions where the
    batch's `attention_mask` (attribute or key; [B, T]) is 0 are left out. Where a layer's output is
    neither [B, T, out] nor [B * T, out] (the tokens that went to one expert), all of it counts.
    An adapter's dropout is left out of its output and of its input gradient.

    Gradients are those of the loss that the optimizer steps on: the mean over micro-batches and
    processes of what `training_step` returns; those that it computes for itself are left out. So
    their moments depend neither on the number of processes nor on that of micro-batches, nor on the
    loss scale of 16-bit floats. A loss that is a mean over tokens makes each token's gradient as
    small as there are many of them.

    The adapters are those of `LoRALinear` and of PEFT's LoRA layers around linear maps; a module
    without any is trained unobserved, and a line says so. Hooks are attached on steps that log,
    only. On those steps a compiled model runs eagerly, since compiled code has no hooks: the step
    is the same up to rounding (and another draw of dropout) and costs an eager step's time and
    memory. Eager training is the same with and without the monitor, bit for bit.

    Args:
        every_n_steps: Optimizer steps from one logged step to the next; step 0 is logged.
        per_layer: Log each layer, too.

    Logs:
        activation/first_moment, activation/second_moment: mean over the adapted layers of E[y] and
            E[y^2] of the post-adapter output y, in its own unit and that squared; every
            `every_n_steps`, like all of them.
        adapter_output/first_moment, adapter_output/second_moment: of z = gamma_r B A x alone.
        input_grad/first_moment, input_grad/second_moment: of gamma_r A^T B^T (dloss/dy), in nats
            per unit of the layer's input where the loss is in nats.
        <each of them>/<layer>: if `per_layer`, of one layer.

    Raises:
        UserError: If `every_n_steps` is not positive, or PEFT computes an adapter otherwise than as
            gamma_r B A x (DoRA and other variants, a bias), or ZeRO-3 has not gathered a matrix.
    """

    def __init__(self, every_n_steps: int = 50, per_layer: bool = False) -> None:
        if every_n_steps < 1:
            raise UserError(f"activation_moments.every_n_steps is {every_n_steps}; at least 1.")
        self.every_n_steps, self.per_layer = every_n_steps, per_layer
        self._layers: dict[str, AdaptedLayer] = {}
        self._step = 0
        self._recorder: MomentRecorder | None = None  # of the open step, if it logs
        self._attached = ExitStack()  # during a micro-batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapters; forget the open step of a fit that failed."""
        self._recorder = None
        self._layers = dict(adapted_layers(pl_module))
        if not self._layers:
            rank_zero_info("activation_moments: there are no adapters, nothing is measured.")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Attach the hooks, if the step that this micro-batch belongs to logs."""
        self._attached.close()
        step = optimizer_step(trainer)
        if not self._layers or step % self.every_n_steps:
            self._recorder = None
            return
        if self._recorder is None or step != self._step:
            self._recorder = MomentRecorder(self._layers, pl_module.device)
        self._step = step
        self._attached = self._recorder.attach(attention_mask(batch), _loss_scale(trainer))
        if runs_compiled(pl_module, self._layers):
            self._attached.enter_context(torch.compiler.set_stance("force_eager"))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Learn by what an engine scales the loss, and that its gradients are to come."""
        if self._recorder is not None:
            self._recorder.see_loss(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take no gradients that `training_step` computes for itself."""
        if self._recorder is not None:
            self._recorder.leave_loss()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove the hooks; after a step's last micro-batch, write what they saw."""
        self._attached.close()
        if self._recorder is None:
            return
        if pl_module.automatic_optimization and trainer.global_step == self._step:
            return  # more micro-batches to come
        self._write(trainer, self._recorder)
        self._recorder = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks of a batch that was not trained on."""
        self._attached.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks of a batch that failed."""
        self._attached.close()

    def _write(self, trainer: Trainer, recorder: MomentRecorder) -> None:
        sums = trainer.strategy.reduce(recorder.sums, reduce_op="sum").cpu()  # waits, once
        if not sums[0, :, 2].any():
            rank_zero_warn(
                "activation_moments saw no adapter run: is a function compiled instead of a "
                "module? Nothing is logged."
            )
            return
        values: dict[str, float] = {}
        for quantity, sums_of_layers in zip(QUANTITIES, sums, strict=True):
            moments = Moments(*sums_of_layers.unbind(-1))
            if quantity == "input_grad":  # a process has its share of the step's loss
                moments = moments.times(1 / trainer.world_size)
            values |= self._tags(quantity, moments)
        write_scalars(trainer, values, self._step)

    def _tags(self, quantity: str, moments: Moments) -> dict[str, float]:
        values: dict[str, float] = {}
        orders = ("first_moment", "second_moment")
        of_layers = (moments.first().tolist(), moments.second().tolist())
        ran = moments.entries.tolist()  # an expert may have got no token
        if not any(ran):
            return values
        for order, mean, each in zip(orders, mean_over_layers(moments), of_layers, strict=True):
            tag = f"{quantity}/{order}"
            values[tag] = float(mean)
            if self.per_layer:
                layers = zip(self._layers, each, ran, strict=True)
                values |= {f"{tag}/{name}": value for name, value, entries in layers if entries}
        return values


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield (path, layer) for the adapted linear layers of `model`, in module order.

    The wrapper of `torch.compile` does not show in a path.

    Raises:
        UserError: If PEFT computes an adapter otherwise than as gamma_r B A x.
    """
    for path, module in model.named_modules():
        name = path.replace("_orig_mod.", "")
        if isinstance(module, LoRALinear):
            yield name, AdaptedLayer(module, partial(_own, module))
        elif _is_peft_linear(module):
            if getattr(module, "lora_variant", None) or _has_bias(module):
                raise UserError(
                    f"{name} has a PEFT adapter that is not gamma_r B A x (such as DoRA, or one "
                    "with a bias); turn activation_moments off."
                )
            yield name, AdaptedLayer(module, partial(_peft, module))


def attention_mask(batch: Any) -> Tensor | None:
    """Return the `attention_mask` [B, T] of a batch, an attribute or a key; None if it has none."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
    else:
        mask = getattr(batch, "attention_mask", None)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def runs_compiled(module: nn.Module, layers: Mapping[str, AdaptedLayer]) -> bool:
    """Tell whether `torch.compile` has been applied to `module` or a part of it with adapters."""
    # What Lightning notes on a LightningModule that was given to the Trainer compiled.
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    adapted = {id(layer.module) for layer in layers.values()}
    return any(
        _is_compiled(part) and any(id(child) in adapted for child in part.modules())
        for part in module.modules()
    )


def _is_compiled(module: nn.Module) -> bool:
    # `torch.compile(module)` has the first, `module.compile()` the second; torch has no question.
    return hasattr(module, "dynamo_ctx") or getattr(module, "_compiled_call_impl", None) is not None


def _loss_scale(trainer: Trainer) -> Tensor | None:
    """Return what the 16-bit precision multiplies the loss by, on the device; None: nothing."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=trainer.strategy.root_device))
    return scale


def _own(layer: LoRALinear) -> list[LowRank]:
    return [LowRank(_whole(layer.lora_a), _whole(layer.scaled_b), layer.gamma)]


def _is_peft_linear(module: nn.Module) -> bool:
    """Tell whether `module` is PEFT's LoRA layer around a linear map, by what it offers."""
    return (
        isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
        and isinstance(getattr(module, "lora_B", None), nn.ModuleDict)
        and isinstance(getattr(module, "scaling", None), dict)
        and hasattr(module, "active_adapters")
        and is_linear(getattr(module, "base_layer", module))
        and not hasattr(module, "parameter_name")  # adapts a parameter, not the map
    )


def _has_bias(layer: Any) -> bool:
    """Tell whether an adapter of PEFT adds a bias of its own (`lora_bias`)."""
    return any(getattr(b, "bias", None) is not None for b in layer.lora_B.values())


def _peft(layer: Any) -> list[LowRank]:
    if layer.disable_adapters:
        return []
    return [
        LowRank(
            _whole(layer.lora_A[name].weight),
            _whole(layer.lora_B[name].weight),
            layer.scaling[name],
        )
        for name in layer.active_adapters
        if name in layer.lora_A
    ]


def _whole(matrix: Tensor) -> Tensor:
    """Return an adapter's matrix where a strategy may have split it over the processes."""
    if matrix.numel() != getattr(matrix, "ds_numel", matrix.numel()):
        raise UserError(
            "DeepSpeed ZeRO-3 has an adapter's matrix partitioned where its moments are measured; "
            "turn activation_moments off, or train with ZeRO-2 or FSDP2."
        )
    # FSDP2 with a unit of its own for the layer: backward comes here before the unit is gathered.
    return matrix.full_tensor() if hasattr(matrix, "full_tensor") else matrix
