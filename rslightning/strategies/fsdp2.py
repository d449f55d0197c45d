"""FSDP2 as Lightning runs it, with checkpoints of the trainable state in the form of one process's."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from rslightning.strategies.materialize import broadcast_buffers, materialize


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all processes in one data-parallel group.

    - The model is built on the first process alone; its parameters are sent to the others unit by
      unit and kept in parts (`torch.distributed.fsdp.fully_shard`). No process holds more than one
      whole unit on its device, and the host holds one copy, for as long as the model is built.
    - A checkpoint is one file with the trainable state and the optimizer's, as a single process or
      DDP write it: either goes on from the other's, with any number of processes.

    Args:
        timeout: How long a process waits for the others.
    """

    shares_weights: Final = True

    def __init__(self, timeout: timedelta | None = default_pg_timeout) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    @override
    def setup_environment(self) -> None:
        """Join the processes, all in one group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def distribute(self, model: nn.Module, units: Sequence[nn.Module]) -> None:
        """Share out a model that the first process has, and the others on `meta`.

        Args:
            model: The whole model.
            units: Parts of it that are sent, and later gathered, one after another.
        """
        mesh = self.device_mesh["data_parallel"]
        for unit in (*units, model):
            for parameter in materialize(unit, self.root_device, _is_sharded):
                distributed.broadcast(parameter.data, 0)
            fully_shard(unit, mesh=mesh)
        broadcast_buffers(model, self.root_device)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return name -> whole tensor of what is trained, on the first process; else nothing."""
        assert self.lightning_module is not None
        trained = (
            (name, p) for name, p in self.lightning_module.named_parameters() if p.requires_grad
        )
        gathered = {name: self._gather(parameter.detach()) for name, parameter in trained}
        return gathered if self.is_global_zero else {}

    @override
    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """Return the optimizer's state of whole tensors, on the first process; else nothing."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = inner.state_dict()
        state["state"] = {
            index: {name: self._gather(value) for name, value in entries.items()}
            for index, entries in state["state"].items()
        }
        return state if self.is_global_zero else {}

    def _gather(self, value: Any) -> Any:
        """Return a DTensor whole, in the first process's memory; every process enters."""
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.is_global_zero else None

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file; what it holds is shared out by the methods below."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @override
    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put this process's part of each tensor into its parameter."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        for name, whole in checkpoint["state_dict"].items():
            parameters[name].copy_(_like(parameters[name], whole))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put this process's part of each tensor into the optimizer's state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {name: _like(parameters[index], value) for name, value in entries.items()}
                for index, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _like(parameter: nn.Parameter, value: Any) -> Any:
    """Return this process's part of `value`, distributed as `parameter` is.

    Numbers, such as a step count, stay as they are; a tensor of another shape, such as the factors
    of Adafactor's second moment, is kept whole.
    """
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    mesh = parameter.device_mesh
    same = value.shape == parameter.shape
    placements = parameter.placements if same else [Replicate()] * mesh.ndim
    return distribute_tensor(value.to(parameter.device), mesh, placements)
