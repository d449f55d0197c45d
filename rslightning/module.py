"""The LightningModule: a Hugging Face causal language model with rsLoRA adapters."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Final, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric

from rslightning import hf
from rslightning.batch import IGNORED, Batch
from rslightning.checkpoint import load_adapter
from rslightning.errors import UserError
from rslightning.hyperparameters import keep_changes, plain_settings, refuse_other_structure
from rslightning.losses import token_nats
from rslightning.model_folder import absolute_name, find_model_folder
from rslightning.optimizer import (
    build_optimizer,
    build_schedule,
    prefer_fused,
    refuse_parts,
    told_as,
)
from rslightning.output_head import logits_are_of_head, nats_for_logits
from rslightning.packed_rows import keeps_examples_apart, packed_logits
from rslightning.random_streams import begin_stream
from rslightning.rslora import AdapterSpec, InjectionReport, inject_adapters
from rslightning.rslora.adalora import RankAllocator
from rslightning.rslora.adapters import check_same_tensors, copy_adapter
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.quantized import describe_quantization, is_stored_transposed
from rslightning.rslora.rounding import allow_merged_orders
from rslightning.strategies.sharing import refuse_shared_gradients, weight_sharing

AUTOCAST_DTYPES: Final = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The dtype of products under a precision of the Trainer; under the others it is the model's."""


class CausalLMModule(LightningModule):
    """Builds a causal language model, injects adapters, trains and evaluates it.

    The loss is the mean cross-entropy in nats per target token.

    Args:
        base_model: Hub name, local folder or `asset:NAME` of the frozen base.
        adapter: Rank, scaling and place of the adapters; null is full fine-tuning.
        optimizer: Class path and arguments of a torch optimizer. It gets the trainable parameters.
        lr_scheduler: Class path and arguments of a schedule that steps with the optimizer; null
            keeps the learning rate constant.
        dtype: Dtype of the frozen base. Adapters and their optimizer state are float32 always.
        attention: Attention implementation of transformers (`sdpa`, `eager`, `flash_attention_2`,
            ...); null takes the best that the architecture has in torch alone.
        activation_checkpointing: Recompute each decoder layer in the backward pass: less memory,
            about a third more time.
        compile: Let `torch.compile` fuse the operations of each decoder layer in training; the
            first steps take a minute or more.
        pretrained: Load the base's weights; false draws new ones, for training from scratch.
        max_new_tokens: Length limit of an answer in `predict`.
        trust_remote_code: Run model code that the base's folder brings along.
        quantization: Arguments of transformers' `BitsAndBytesConfig`, as `load_in_4bit`: the frozen
            linear maps are kept in 4 or 8 bit and dequantized where they are used (QLoRA); null
            keeps them in `dtype`.
        start_from: Where the adapters' first values come from: an adapter folder, a run folder, or
            a checkpoint of any strategy and number of processes; null draws A and sets B to zero.
            Step count, optimizer state and data order begin anew: to go on with a run, give its
            checkpoint as `ckpt_path`.

    Logs:
        train/loss: nats per target token, over the micro-batches of each optimizer step.
        train/perplexity: its exponential.
        val/loss, val/perplexity, test/loss, test/perplexity: the same over the whole pass.
        allocation/budget: ranks that all modules may have together, with `adapter.allocation`.
        allocation/kept_ranks: ranks whose singular value is not zero after the step.

    Raises:
        UserError: If the base cannot be loaded or quantized, a target matches nothing, a checkpoint
            or `start_from` is of another structure, a token id is outside of the base's vocabulary,
            a quantized base shall be trained without adapters, examples are packed for a base that
            would let them see each other, the strategy shares out weights in a way that is not
            supported, or ranks shall be allocated in a run without end or in one
            whose strategy shares out gradients.
    """

    drops_gradients: Final = True
    """Whether a step's gradients are gone before the next forward pass; `memory` counts on it."""

    model: Any  # a transformers.PreTrainedModel, once configure_model has run

    def __init__(
        self,
        base_model: str,
        adapter: AdapterSpec | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        attention: str | None = None,
        activation_checkpointing: bool = False,
        pretrained: bool = True,
        max_new_tokens: int = 64,
        trust_remote_code: bool = False,
        quantization: dict[str, Any] | None = None,
        compile: bool = False,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(adapter, Mapping):  # as checkpoints keep it
            adapter = AdapterSpec(**adapter)
        base_model = absolute_name(base_model)  # for whoever reads a checkpoint elsewhere
        self.base_model, self.adapter = base_model, adapter
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.dtype_name, self.attention, self.pretrained = dtype, attention, pretrained
        self.activation_checkpointing = activation_checkpointing
        self.max_new_tokens, self.trust_remote_code = max_new_tokens, trust_remote_code
        self.quantization, self.compiles = quantization, compile
        self.start_from = start_from
        if quantization is not None:  # refused now, and not after the data was prepared
            hf.quantization_config(quantization, getattr(torch, dtype))
        # Plain values only, so that every checkpoint opens with weights_only=True.
        self.save_hyperparameters(
            {
                "base_model": base_model,
                "adapter": asdict(adapter) if adapter else None,
                "dtype": dtype,
                "attention": attention,
                "pretrained": pretrained,
                "quantization": quantization,
            }
        )
        self.strict_loading = False  # checkpoints hold the trainable state only
        self.model = None
        self.injection: InjectionReport | None = None
        self.logits_are_of_head = False
        self._shares_weights = False  # whether this process has a part of them only
        self._seed: int | None = None  # of what is drawn in training, the same for all processes
        self._settings: dict[str, Any] = {}  # of optimizer and schedule, before the first step
        self._begun: dict[str, Any] = {}  # those of the run that is gone on with
        self._measured_step: int | None = None  # when the rounding of W' was measured last
        self._allocator: RankAllocator | None = None
        self._allocator_state: dict[str, Any] | None = None  # of the checkpoint to go on from
        self.mean_nats = MeanMetric()
        self._window: list[tuple[Tensor, Tensor]] = []  # micro-batches of the open step

    def setup(self, stage: str) -> None:
        """Agree on a seed; a checkpoint that is gone on from brings its own."""
        if self._seed is None:
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def configure_model(self) -> None:
        """Load the base, inject the adapters; a second call does nothing."""
        if self.model is not None:
            return
        strategy = None  # used without a Trainer
        if self._trainer is not None:
            if self.adapter is not None and self.adapter.allocation is not None:
                refuse_shared_gradients(self.trainer.strategy)
            quantized = self.quantization is not None
            strategy = weight_sharing(self.trainer.strategy, quantized, self.compiles)
        model = hf.load_causal_lm(
            find_model_folder(self.base_model),
            getattr(torch, self.dtype_name),
            self.attention,
            self.pretrained,
            self.activation_checkpointing,
            self.trust_remote_code,
            self.quantization,
            on_meta=strategy is not None and not strategy.is_global_zero,
        )
        model.config.name_or_path = self.base_model  # not the place in a cache that it came from
        if self.adapter is not None:
            self.injection = inject_adapters(model, self.adapter)
            if self.injection.warning:
                rank_zero_warn(self.injection.warning)
        if self.start_from is not None:
            self._take_adapter(model, self.start_from)
        self.logits_are_of_head = logits_are_of_head(model)
        if self.compiles:
            hf.compile_decoder_layers(model)
        if strategy is not None:
            self.logits_are_of_head = strategy.broadcast(self.logits_are_of_head)
            strategy.distribute(model, hf.sharding_units(model))
            self._shares_weights = True
        self.model = model

    def _take_adapter(self, model: nn.Module, path: str) -> None:
        if self.adapter is None:
            raise UserError("start_from needs adapters: give model.adapter a rank.")
        if not next(model.parameters()).is_meta:  # else another process does
            copy_adapter(model, load_adapter(path))

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits [B, T, V] of a batch."""
        ids = batch.input_ids
        with self._compiled_in_training_only():
            if batch.position_ids is not None:
                return packed_logits(self.model, ids, batch.position_ids)
            mask = batch.attention_mask
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits

    def _compiled_in_training_only(self) -> AbstractContextManager[object]:
        """Return a context in which the compiler leaves evaluation alone.

        It would translate each layer anew for lengths that vary, and for each cache of a
        generation, until it gave up, and then take lengths for unknown in training, too.
        """
        if self.compiles and not torch.is_grad_enabled():
            return torch.compiler.set_stance("force_eager")
        return nullcontext()

    def nats(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed nats of a batch's targets and their number.

        They are taken inside the head's call, without the logits of the whole batch; where logits
        are more than the head's product (see `logits_are_of_head`), from the logits.
        """
        if not self.logits_are_of_head:
            return token_nats(self(batch), batch.labels)
        with nats_for_logits(self.model, batch.labels):
            nats = self(batch).squeeze()
        return nats, (batch.labels[:, 1:] != IGNORED).sum()

    def on_fit_start(self) -> None:
        """Refuse what cannot be trained before the first step."""
        self._window.clear()  # a fit that failed may have left some
        self._check_vocabulary()
        self._check_packing()
        if self.quantization is not None and self.adapter is None:
            raise UserError(
                "A quantized base is frozen: give model.adapter a rank, or leave quantization out."
            )
        if self.adapter is not None and self.adapter.allocation is not None:
            steps = _total_steps(self.trainer)
            self._allocator = RankAllocator(self.model, self.adapter.allocation, steps)
            if self._allocator_state is not None:
                self._allocator.load_state_dict(self._allocator_state)
                self._allocator_state = None

    def on_train_start(self) -> None:
        """Let changed options of optimizer and schedule win over those of the checkpoint."""
        if not self._begun:
            return
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        optimizer = self.trainer.optimizers[0]
        said = keep_changes(self._begun, self._settings, optimizer, next(iter(schedules), None))
        if said:
            rank_zero_info(f"going on with other options than before: {'; '.join(said)}.")

    def on_validation_start(self) -> None:
        """Refuse data of another vocabulary; begin the pass's mean."""
        self._check_vocabulary()
        self._begin_mean()

    def on_test_start(self) -> None:
        """Refuse data of another vocabulary; begin the pass's mean."""
        self._check_vocabulary()
        self._begin_mean()

    def on_predict_start(self) -> None:
        """Refuse data of another vocabulary."""
        self._check_vocabulary()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Measure, at steps 1, 2, 4, ..., 64, 128, 192, ..., which layers may merge in 16 bit.

        And set the step at which the loss is logged to that of the optimizer, and begin the random
        numbers of the batch: a run that goes on draws those of the run that was interrupted.
        """
        step = self.trainer.global_step
        assert self._seed is not None
        begin_stream(self._seed, step, len(self._window), self.global_rank)
        # Where it writes what is logged; going on from a pass's end Lightning counts one too many.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = step
        due = step & (step - 1) == 0 or step % 64 == 0
        if not due or step == self._measured_step:
            return
        self._measured_step = step
        dtype = AUTOCAST_DTYPES.get(str(self.trainer.precision), self.model.dtype)
        if dtype.itemsize == 2:
            allow_merged_orders(self.model, dtype, together=self.compiles)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the micro-batch's part of the mean nats per target token of the step."""
        nats, targets = self.nats(batch)
        loss = nats / (targets.clamp(min=1) if batch.step_targets is None else batch.step_targets)
        if self._allocator is not None and not self._window:
            # Once in a step, of a loss that Lightning divides by the number of micro-batches.
            loss = loss + self.trainer.accumulate_grad_batches * self._allocator.penalty()
        self._window.append((nats.detach(), targets))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the loss over all micro-batches and processes of the step."""
        sums = torch.stack([torch.stack([nats, targets.float()]) for nats, targets in self._window])
        self._window.clear()
        nats, targets = self.trainer.strategy.reduce(sums.sum(0), reduce_op="sum")
        loss = nats / targets.clamp(min=1)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/perplexity", loss.exp())

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make the step, and allocate ranks by the gradients that it used: unscaled, clipped.

        Then drop them: Lightning would do so only after the next forward pass, whose activations
        would need room beside them. DeepSpeed drops its own.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._allocator is not None and not self._was_skipped():
            budget = self._allocator.update(self.trainer.global_step + 1)
            self.log("allocation/budget", float(budget))
            self.log("allocation/kept_ranks", self._allocator.kept_ranks().float())
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            optimizer.zero_grad()

    def _was_skipped(self) -> bool:
        """Tell whether float16's scaler has left out the step that was just due."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            return False
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        return not bool(torch.stack(torch._foreach_norm(gradients, math.inf)).isfinite().all())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the pass's mean."""
        self._add_to_mean(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the pass."""
        self._log_mean("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the pass's mean."""
        self._add_to_mean(batch)

    def on_test_epoch_end(self) -> None:
        """Log the mean over the pass."""
        self._log_mean("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the ids [B, max_new_tokens] that greedy decoding writes after each prompt."""
        if len(batch.input_ids):
            return self.generate(batch)
        if self._shares_weights:  # of several processes, the last may have no row left: it helps
            some = batch.input_ids.new_zeros(1, 1)
            self.generate(Batch(some, some, some + 1))
        return batch.input_ids

    @torch.no_grad()
    def generate(self, batch: Batch) -> Tensor:
        """Continue each prompt of a left-padded batch greedily, up to `max_new_tokens`."""
        with self._compiled_in_training_only():
            ids: Tensor = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                use_cache=True,
                synced_gpus=self._shares_weights,  # each process goes on until all have finished
            )
        return ids[:, batch.input_ids.shape[1] :]

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule over the trainable parameters."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(self.make_optimizer, trained)
        if self._trainer is not None:
            refuse_parts(optimizer, self.trainer.strategy)
        prefer_fused(optimizer)
        make = self.make_lr_scheduler
        scheduler = build_schedule(make, optimizer) if make else None
        self._settings = plain_settings(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        schedule = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule; one that has an end may refuse to."""
        with told_as("model.lr_scheduler"):
            super().lr_scheduler_step(scheduler, metric)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return name -> tensor of every trainable parameter."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trainable state only: the base is on disk already."""
        trainable = self.trainable_state()
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name in trainable
        }
        checkpoint["seed"] = self._seed
        checkpoint["settings"] = self._settings
        # Which weights are kept as [in, out] cannot be told from the matrices where W is square.
        layers = adapter_layers(self.model)
        checkpoint["transposed"] = [
            path for path, layer in layers if is_stored_transposed(layer.base)
        ]
        # Measured now and then: a run that goes on computes as the one that was interrupted.
        checkpoint["merges_in_16_bit"] = [
            path for path, layer in adapter_layers(self.model) if layer.merges_in_16_bit
        ]
        if self._allocator is not None:
            checkpoint["allocation"] = self._allocator.state_dict()
        if (quantized := describe_quantization(self.model)) is not None:
            checkpoint["quantized"] = asdict(quantized)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another structure; say what else differs."""
        self.refuse_other_structure(checkpoint.get("hyper_parameters", {}))
        if "state_dict" in checkpoint:  # DeepSpeed has loaded its own by now
            check_same_tensors(self.trainable_state(), checkpoint["state_dict"])
        self._seed = checkpoint.get("seed", self._seed)
        self._begun = checkpoint.get("settings") or {}
        self._allocator_state = checkpoint.get("allocation")
        merging = set(checkpoint.get("merges_in_16_bit", ()))
        for path, layer in adapter_layers(self.model):
            layer.merges_in_16_bit = path in merging

    def refuse_other_structure(self, hparams: Mapping[str, Any]) -> None:
        """Raise `UserError` if a checkpoint with these hyperparameters is of another structure."""
        refuse_other_structure(hparams, self.hparams)

    def _check_vocabulary(self) -> None:
        """Raise `UserError` if the data (one of ours) has token ids that the base cannot embed."""
        data = getattr(self.trainer, "datamodule", None)
        largest = getattr(data, "largest_token_id", 0)
        vocabulary = self.model.config.get_text_config().vocab_size
        if largest >= vocabulary:
            raise UserError(
                f"The data has token id {largest}, but {self.base_model} has a vocabulary of "
                f"{vocabulary}: tokenizer and model do not belong together."
            )

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Raise `UserError` if the data (of ours) is packed and the base cannot tell examples."""
        if getattr(getattr(self.trainer, "datamodule", None), "packing", False) is not True:
            return
        with self.trainer.precision_plugin.forward_context(), self._compiled_in_training_only():
            apart = keeps_examples_apart(self.model)
        if not apart:
            raise UserError(
                f"In {type(self.model).__name__} an example reads those before it in a packed row "
                "(it has no attention that ends with the example): set data.packing to false."
            )

    def _begin_mean(self) -> None:
        # A pass of `validate` makes tensors that the validation within a fit may not change.
        with torch.inference_mode(False):
            self.mean_nats.reset()

    def _add_to_mean(self, batch: Batch) -> None:
        nats, targets = self.nats(batch)
        self.mean_nats.update(nats / targets.clamp(min=1), weight=targets)

    def _log_mean(self, stage: str) -> None:
        loss = self.mean_nats.compute()
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True)  # the same everywhere
        self.log(f"{stage}/perplexity", loss.exp(), sync_dist=True)


def _total_steps(trainer: Trainer) -> int:
    """Return how many optimizer steps the run has, by which a schedule of ranks goes."""
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise UserError(
            f"model.adapter.allocation needs the number of steps, and this run has no end (its "
            f"trainer says {steps}): set trainer.max_steps."
        )
    return int(steps)
