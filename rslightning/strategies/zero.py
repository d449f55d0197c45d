"""DeepSpeed ZeRO as Lightning runs it, with what goes wrong there put right."""

from collections.abc import Container, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from typing_extensions import override

from rslightning.deepspeed_checkpoint import (
    DEEPSPEED_CLASSES,
    TAG,
    is_deepspeed_folder,
    read_deepspeed_folder,
)
from rslightning.errors import UserError
from rslightning.rslora.adapters import check_same_tensors
from rslightning.safe_load import load_plain
from rslightning.strategies.materialize import broadcast_buffers, materialize


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's `DeepSpeedStrategy`, for a frozen base with adapters.

    - Under gradient accumulation the loss is divided by the number of micro-batches once. Lightning
      2.6 divides it and DeepSpeed does again: gradients, their norms, clipping and every optimizer
      but Adam's family would see half of it with two micro-batches.
    - Lightning alone says when a step is due, so that `on_before_optimizer_step` runs once in a
      step, and the last step of a pass is made with the micro-batches that are left, as ever.
    - With stage 3 the model is built as ever, on the first process alone; its parameters are sent
      to the others unit by unit and kept in parts. No process holds more than one whole unit on its
      device, and the host holds one copy, for as long as the model is built.
    - The optimizer state is offloaded to the host with torch's own optimizers, too: no extension of
      DeepSpeed's has to be compiled.
    - A checkpoint of a model with a frozen base has trained weights once: the float32 masters. Of
      these 16-bit weights are made again, at every stage, when a run goes on and when it is
      evaluated; the latter with any number of processes, where Lightning fails under stage 3.

    Needs the package `deepspeed`.

    Args:
        stage: What the processes share out: 1 the optimizer's state, 2 gradients too, 3 weights,
            too.
        exclude_frozen_parameters: Whether checkpoints leave the frozen base out, and, where there
            is one, the 16-bit copies of what is trained.
        options: Further arguments of Lightning's `DeepSpeedStrategy`.

    Raises:
        UserError: If `round_robin_gradients` is on: DeepSpeed 0.19 then gives wrong masters out; or
            `load_from_fp32_weights` is off: masters alone have what is trained; or there is no
            CUDA GPU; or a run is to go on from a checkpoint that is not such a run's; or one is
            evaluated that has other weights than the model, or a frozen base in parts.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        exclude_frozen_parameters: bool = True,
        **options: Any,
    ) -> None:
        # Written out: jsonargparse reads from this call which options there are.
        super().__init__(
            stage=stage, exclude_frozen_parameters=exclude_frozen_parameters, **options
        )
        assert isinstance(self.config, dict)
        zero = self.config.get("zero_optimization", {})
        defaults = {"round_robin_gradients": False, "load_from_fp32_weights": True}
        for name, default in defaults.items():
            if zero.get(name, default) != default:
                raise UserError(f"{name} is not supported: leave it out of the config.")
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        # Of use to DeepSpeed's own log alone; Lightning would ask the training data for it.
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)

    @override
    def setup_environment(self) -> None:
        """Join the processes; Lightning runs DeepSpeed on CUDA alone."""
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise UserError(
                "DeepSpeed needs a CUDA GPU here, and this run has a "
                f"{type(self.accelerator).__name__}: take configs/strategy/fsdp2.yaml, which "
                "shares out as much as ZeRO-3 anywhere."
            )
        super().setup_environment()

    @property
    def shares_weights(self) -> bool:
        """Whether a process keeps a part of the weights only: stage 3."""
        return self.zero_stage_3

    @override
    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Build modules as ever: `distribute` shares them out afterwards."""
        yield

    def distribute(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        """Share out a model that the first process has, and the others on `meta`.

        Args:
            model: The whole model.
            units: Parts of it that are sent one after another.
        """
        import deepspeed

        self._init_config_if_needed()
        dtype = self._weight_dtype()
        for unit in (*units, model):
            materialize(unit, self.root_device, lambda p: hasattr(p, "ds_id"), dtype)
            # Sends the first process's parameters to all, and keeps a part of each.
            deepspeed.zero.Init(
                module=unit, remote_device=self.remote_device, config_dict_or_path=self.config
            )
        broadcast_buffers(model, self.root_device)

    def _weight_dtype(self) -> torch.dtype:
        """Return the one dtype that DeepSpeed gives all weights, at every stage."""
        assert isinstance(self.config, dict)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if self.config.get(name, {}).get("enabled"):
                return dtype
        return torch.float32

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        return False

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Do nothing: the engine knows that no step follows."""
        yield

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the engine whether a step follows, and compute the loss."""
        assert self.lightning_module is not None
        accumulates = self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)
        return super().training_step(*args, **kwargs)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Refuse what DeepSpeed cannot go on from, and what could run code, before it is read."""
        path = Path(checkpoint_path)
        assert self.lightning_module is not None
        _check_kind(path)
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return self._load_weights(path, self.lightning_module)
        _check_folder(path, self.world_size, self.zero_stage_3)
        content = super().load_checkpoint(path, weights_only)
        if not self.zero_stage_3:  # which makes its 16-bit weights of masters by itself
            self.deepspeed_engine.optimizer.update_lp_params()
        return content

    @torch.no_grad()
    def _load_weights(self, path: Path, module: nn.Module) -> dict[str, Any]:
        """Put what is inside into a model without an optimizer; return the rest."""
        import deepspeed

        content = read_deepspeed_folder(path, ("",))
        weights = _take_weights(path, content)
        places: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        places |= dict(module.named_buffers(remove_duplicate=False))
        _check_trained(module, weights, places)
        for name, weight in weights.items():
            # Under stage 3, each process then keeps its part; under the others this does nothing.
            with deepspeed.zero.GatheredParameters([places[name]], modifier_rank=0):
                places[name].copy_(weight)
        return content

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Leave out frozen weights, and copies of masters, under all of their names."""
        module = self.lightning_module
        assert module is not None
        if self.is_global_zero:
            _clear(Path(filepath))
        self.barrier()
        has_frozen = any(not parameter.requires_grad for parameter in module.parameters())
        with ExitStack() as stack:
            if self.exclude_frozen_parameters and has_frozen:
                handle = module.register_state_dict_post_hook(_drop_restorable)
                stack.callback(handle.remove)
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Leave the division by the number of micro-batches to Lightning, which has made it."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def _drop_restorable(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Drop parameters that are frozen, or have a float32 master in the optimizer."""
    for name, parameter in module.named_parameters(prefix[:-1], remove_duplicate=False):
        if not parameter.requires_grad or hasattr(parameter, "_hp_mapping"):
            state.pop(name, None)


def _clear(path: Path) -> None:
    """Remove the files that are written anew: no older one may be taken for one of them."""
    for file in (path / "latest", *(path / TAG).glob("*_states.pt")):
        file.unlink(missing_ok=True)


def _take_weights(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """Return all weights of a checkpoint's content and remove them there; masters come last.

    Raises:
        UserError: If the frozen base is inside in parts, each in the file of a process.
    """
    masters = content.pop("state_dict")
    weights = {name: weight for name, weight in content.pop("module").items() if weight.numel()}
    weights = {name: weights[name] for name in weights if name not in masters} | masters
    if any(name not in weights for name in content.get("frozen_param_shapes") or ()):
        raise UserError(
            f"{path} has the frozen base inside, in parts that only a fit puts together: evaluate "
            f"its adapters with start_from={path}."
        )
    return weights


def _check_trained(
    module: nn.Module, weights: Mapping[str, Tensor], places: Container[str]
) -> None:
    """Raise `UserError` unless all that the model trains is found, and all found has a place."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    # A parameter of stage 3 has the shape of the whole beside it.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in trained.items()}
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = {n: x for n, x in weights.items() if n in trained or n not in places}
    check_same_tensors(expected, found)


def _check_kind(path: Path) -> None:
    """Raise `UserError` if a checkpoint is not DeepSpeed's."""
    if not is_deepspeed_folder(path):
        raise UserError(
            f"{path} was not written by DeepSpeed: take the strategy that wrote it, or begin anew "
            f"from its adapters with --model.start_from {path}."
        )


def _check_folder(path: Path, processes: int, in_parts: bool) -> None:
    """Raise `UserError` if a checkpoint is not that of such a run."""
    advice = f"or begin anew from its adapters with --model.start_from {path}."
    written = len(list((path / TAG).glob("*_optim_states.pt")))
    if written != processes:
        raise UserError(
            f"{path} was written by {written} processes, and DeepSpeed goes on with as many, not "
            f"with {processes}: start {written}, {advice}"
        )
    if in_parts != any((path / TAG).glob("zero_pp_rank_*_model_states.pt")):
        wrote, now = ("1 or 2", "3") if in_parts else ("3", "1 or 2")
        raise UserError(
            f"{path} was written with ZeRO stage {wrote}, from which stage {now} cannot go on: "
            f"take that stage, {advice}"
        )
    for file in (path / TAG).glob("*.pt"):
        load_plain(file, DEEPSPEED_CLASSES)
