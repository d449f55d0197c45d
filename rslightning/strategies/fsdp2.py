"""FSDP2 as Lightning runs it, with checkpoints of the trainable state like those of one process."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from rslightning.errors import UserError
from rslightning.parts_checkpoint import (
    META_FILE,
    STATE,
    Parts,
    is_parts_folder,
    open_parts,
    read_meta,
    write_part,
)
from rslightning.storage import reason_of, remove
from rslightning.strategies.materialize import broadcast_buffers, materialize


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all processes in one data-parallel group.

    - The model is built on the first process alone; its parameters are sent to the others unit by
      unit and kept in parts (`torch.distributed.fsdp.fully_shard`). No process holds more than one
      whole unit on its device, and the host holds one copy, for as long as the model is built.
    - A checkpoint is one file with the trainable state and the optimizer's, as a single process or
      DDP write it: either goes on from the other's, with any number of processes. The first process
      gathers it in the host's memory.

    Args:
        save_distributed_checkpoint: Let each process write its own part into a folder instead, for
            adapters that the first one's host has no room for. Any number of processes goes on.
        replicate_nodes: Let each node hold all parts, where there are several: weights are gathered
            within nodes, and only what the adapters' gradients sum up to crosses between them.
        timeout: How long a process waits for the others.
    """

    shares_weights: Final = True

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        replicate_nodes: bool = False,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timeout,
        )
        self.replicate_nodes = replicate_nodes

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
        mesh = self._sharding_mesh()
        for unit in (*units, model):
            for parameter in materialize(unit, self.root_device, _is_sharded):
                distributed.broadcast(parameter.data, 0)
            fully_shard(unit, mesh=mesh)
        broadcast_buffers(model, self.root_device)

    def _sharding_mesh(self) -> DeviceMesh:
        if not self.replicate_nodes or self.num_nodes == 1:
            return self.device_mesh["data_parallel"]
        shape, names = (self.num_nodes, self.num_processes), ("replicate", "shard")
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return name -> tensor of what is trained: whole on the first process, or in parts."""
        assert self.lightning_module is not None
        parameters = self.lightning_module.named_parameters()
        return self._collect({name: p.detach() for name, p in parameters if p.requires_grad})

    @override
    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """Return the optimizer's state, its tensors whole on the first process, or in parts."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = inner.state_dict()
        entries = {index: self._collect(values) for index, values in state["state"].items()}
        return {**state, "state": entries}

    def _collect(self, values: dict[str, Any]) -> dict[str, Any]:
        """Gather the tensors of `values` in the first process's memory, one after another."""
        if self._save_distributed_checkpoint:
            return dict(values)
        whole = {}
        for name, value in values.items():
            gathered = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_global_zero:
                whole[name] = gathered.cpu() if isinstance(gathered, Tensor) else gathered
        return whole

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one file, or each process its part and the first one the rest, last of all."""
        if not self._save_distributed_checkpoint:
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        problem = self._make_folder(path) if self.is_global_zero else None
        self.barrier()
        parts = {f"{STATE}{name}": part for name, part in checkpoint.pop("state_dict").items()}
        for number, saved in enumerate(checkpoint.get("optimizer_states", ())):
            for index, values in saved["state"].items():
                for name in [name for name, value in values.items() if _is_cut(value)]:
                    parts[f"optimizer.{number}.{index}.{name}"] = values.pop(name)
        local = {name: part.to_local() for name, part in parts.items()}
        rank, processes = _place(next(iter(parts.values())))
        try:
            if self.global_rank == rank:  # other nodes may have the same
                write_part(path, rank, processes, local)
        except (OSError, SafetensorError) as error:
            problem = problem or reason_of(error)
        self._refuse_together(problem)
        Strategy.save_checkpoint(self, checkpoint, path / META_FILE, storage_options)

    @staticmethod
    def _make_folder(path: Path) -> str | None:
        """Make an empty folder; return what came between."""
        try:
            remove(path)  # no part of an older one may be taken for one of this
            path.mkdir(parents=True)
        except OSError as error:
            return reason_of(error)
        return None

    def _refuse_together(self, problem: str | None) -> None:
        """Raise `OSError` on all processes if one of them could not write; else all would wait."""
        problems: list[str | None] = [None] * self.world_size
        distributed.all_gather_object(problems, problem)
        if found := next(filter(None, problems), None):
            raise OSError(found)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file, or of a folder the part that this process needs.

        Raises:
            UserError: If the folder is another strategy's, or not complete.
        """
        path = Path(checkpoint_path)
        if not path.is_dir():
            return Strategy.load_checkpoint(self, path, weights_only)
        if not is_parts_folder(path):
            raise UserError(
                f"{path} was not written by {type(self).__name__}: take the strategy that wrote "
                f"it, or begin anew from its adapters with --model.start_from {path}."
            )
        content = read_meta(path)
        with open_parts(path) as parts:
            return {**content, **self._share(content, parts)}

    def _share(self, content: dict[str, Any], parts: Parts) -> dict[str, Any]:
        """Return this process's part of each tensor, in the place that a file has for it."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        state = {
            name.removeprefix(STATE): _own_part(parts, name, parameters[name.removeprefix(STATE)])
            for name in parts.names
            if name.startswith(STATE)
        }
        optimizer_states = content.get("optimizer_states", [])
        for name in [name for name in parts.names if not name.startswith(STATE)]:
            _, number, index, entry = name.split(".")
            if int(number) < len(self.optimizers):
                groups = self.optimizers[int(number)].param_groups
                parameter = [p for group in groups for p in group["params"]][int(index)]
                values = optimizer_states[int(number)]["state"].setdefault(int(index), {})
                values[entry] = _own_part(parts, name, parameter)
        return {"state_dict": state, "optimizer_states": optimizer_states}

    @override
    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put this process's part of each tensor into its parameter."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        for name, value in checkpoint["state_dict"].items():
            parameters[name].copy_(_like(parameters[name], value))

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


def _is_cut(value: Any) -> bool:
    """Tell whether each process has some rows of `value`."""
    return isinstance(value, DTensor) and value.placements[-1].is_shard(0)


def _place(tensor: DTensor) -> tuple[int, int]:
    """Return which of the processes that share out a tensor this is, and how many there are."""
    mesh = tensor.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


def _own_part(parts: Parts, name: str, parameter: nn.Parameter) -> DTensor:
    """Read the rows that this process has of `parameter`."""
    assert isinstance(parameter, DTensor)
    rank, processes = _place(parameter)
    start = rank * -(-len(parameter) // processes)  # as `fully_shard` cuts: the last may be short
    local = parts.rows(name, start, start + len(parameter.to_local())).to(parameter.device)
    where = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(local, *where, run_check=False, shape=shape, stride=stride)


def _is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _like(parameter: nn.Parameter, value: Any) -> Any:
    """Return this process's part of `value`, distributed as `parameter` is.

    Numbers, such as a step count, stay as they are; a tensor of another shape, such as the factors
    of Adafactor's second moment, is kept whole.
    """
    is_number = not isinstance(value, Tensor) or value.dim() == 0
    if is_number or isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    mesh = parameter.device_mesh
    same = value.shape == parameter.shape
    placements = parameter.placements if same else [Replicate()] * mesh.ndim
    return distribute_tensor(value.to(parameter.device), mesh, placements)
