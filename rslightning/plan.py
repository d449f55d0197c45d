"""What a recipe costs at each rank, and the highest rank that fits: without building anything.

The rsLoRA paper advises "the maximum rank possible given an available memory budget"
(arXiv:2312.03732, section 5). A plan reads a configuration as `fit` does and the model's
`config.json`, so that the plan for eight GPUs is made on a laptop.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from rslightning.cost import GIB
from rslightning.errors import UserError
from rslightning.memory import MemoryEstimate, available_memory, estimate_memory, total_memory
from rslightning.model_folder import read_model_config
from rslightning.model_shape import LinearShape, ModelShape, read_shape
from rslightning.rslora.inject import refuse_unmatched, select_targets
from rslightning.rslora.spec import TARGET_GROUPS, AdapterSpec
from rslightning.training_step import (
    Sharding,
    TrainingStep,
    quantized_bytes,
    read_optimizer,
    read_sharding,
)

RANKS: Final = tuple(2**power for power in range(2, 12))
"""4 to 2048, those of the paper and between."""

MARGIN: Final = 0.1
"""Share of the memory that is left free: for CUDA's context, fragments, what is not counted."""

UNITS: Final = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A recipe's model and training step, with the rank left open.

    Attributes:
        base_model: Its name.
        shape: Sizes of the model.
        adapted: The maps that have adapters; none is full fine-tuning.
        rank: The recipe's rank; None where that is `auto`, or without adapters.
        rank_pattern: Ranks of maps that differ.
        step: One process's part of the step; its ranks are those of no plan yet.
        accumulation: Micro-batches of an optimizer step.
    """

    base_model: str
    shape: ModelShape
    adapted: tuple[LinearShape, ...]
    rank: int | None
    rank_pattern: Mapping[str, int]
    step: TrainingStep
    accumulation: int

    @property
    def candidates(self) -> tuple[int, ...]:
        """Ranks to choose from: none beyond the smaller side of the largest map."""
        widest = max((min(m.in_features, m.out_features) for m in self.adapted), default=0)
        return tuple(rank for rank in RANKS if rank <= max(widest, RANKS[0]))

    def at(self, rank: int) -> TrainingStep:
        """Return the step at a rank."""
        spec = AdapterSpec(rank=rank, rank_pattern=dict(self.rank_pattern))
        ranks = {linear.path: spec.resolve(linear.path).rank for linear in self.adapted}
        return replace(self.step, ranks=ranks)

    def memory(self, rank: int) -> MemoryEstimate:
        """Return the memory of one process at a rank."""
        return estimate_memory(self.shape, self.at(rank))

    def highest_rank(self, budget: float) -> int | None:
        """Return the highest rank whose memory is within a budget of bytes; None if none is."""
        fitting = [rank for rank in self.candidates if self.memory(rank).total <= budget]
        return max(fitting, default=None)


def read_plan(config: Config, devices: int | None = None) -> Plan:
    """Return the plan of a configuration.

    Args:
        config: The keys of `fit`, parsed, in plain values.
        devices: Number of processes; None takes the configuration's.

    Raises:
        UserError: If the base model or its family is unknown, a target or pattern matches nothing,
            the data says neither `batch_size` nor `max_length`, or ranks are to be allocated.
    """
    model, trainer = config["model"], config["trainer"]
    if model["adapter"] is not None and model["adapter"].get("allocation") is not None:
        raise UserError(
            "A plan is for ranks that stay, and model.adapter.allocation takes some away: leave it "
            "out, and give rank a number."
        )
    shape = read_shape(read_model_config(model["base_model"]))
    adapter = model["adapter"]
    rank = None if adapter is None else adapter["rank"]
    adapted = () if adapter is None else _adapted(shape, adapter["targets"])
    if adapter is not None:
        patterns = {name: adapter.get(name, {}) for name in ("rank_pattern", "alpha_pattern")}
        refuse_unmatched(AdapterSpec(**patterns), [linear.path for linear in adapted])
    return Plan(
        base_model=model["base_model"],
        shape=shape,
        adapted=adapted,
        rank=rank if isinstance(rank, int) else None,
        rank_pattern={} if adapter is None else adapter["rank_pattern"],
        step=_read_step(config, devices),
        accumulation=trainer["accumulate_grad_batches"],
    )


def _read_step(config: Config, devices: int | None) -> TrainingStep:
    model, trainer, optimizer = config["model"], config["trainer"], config["model"]["optimizer"]
    data = (config.get("data") or {}).get("init_args") or {}
    for name in ("batch_size", "max_length"):
        if not isinstance(data.get(name), int):
            raise UserError(f"A plan needs data.{name}, which this configuration does not have.")
    base_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[model["dtype"]]
    precision = str(trainer["precision"] or "32-true")
    in_16_bit = precision.endswith("16-true")
    if in_16_bit:
        base_bytes = 2
    compute_bytes = 2 if "16" in precision else base_bytes
    return TrainingStep(
        rows=data["batch_size"],
        length=data["max_length"],
        ranks=None,
        base_bytes=base_bytes,
        map_bytes=quantized_bytes(model.get("quantization")),
        adapter_bytes=2 if in_16_bit else 4,
        compute_bytes=compute_bytes,
        optimizer=read_optimizer(optimizer["class_path"], optimizer.get("init_args") or {}),
        activation_checkpointing=model["activation_checkpointing"],
        keeps_gradients=trainer["accumulate_grad_batches"] > 1,
        dropout=bool(model["adapter"] and model["adapter"]["dropout"]),
        eager_attention=model["attention"] == "eager",
        sharding=_read_strategy(trainer, devices or _devices(config)),
        on_cpu=uses_cpu(config),
    )


def uses_cpu(config: Config) -> bool:
    """Tell whether a configuration asks for the CPU; a plan is made for GPUs that are elsewhere."""
    return config["trainer"]["accelerator"] == "cpu"


def _adapted(shape: ModelShape, targets: str | list[str]) -> tuple[LinearShape, ...]:
    """Return the maps that `targets` names, by the rules of `rslora.inject`."""
    if isinstance(targets, str) and targets in TARGET_GROUPS:
        groups = ("attention", "mlp") if targets == "all_linear" else (targets,)
        if adapted := tuple(linear for linear in shape.maps if linear.group in groups):
            return adapted
        raise UserError(f"targets {targets!r} matches no linear module of a {shape.model_type}.")
    paths = select_targets(torch.nn.Module(), [linear.path for linear in shape.maps], targets)
    return tuple(linear for linear in shape.maps if linear.path in paths)


def _devices(config: Config) -> int:
    """Return the number of processes that a configuration asks for; of `auto`, those here."""
    trainer = config["trainer"]
    devices = trainer["devices"]
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices).isdigit():
        count = int(devices)
    else:
        count = 1 if uses_cpu(config) else max(torch.cuda.device_count(), 1)
    return count * trainer["num_nodes"]


def _read_strategy(trainer: Config, processes: int) -> Sharding:
    strategy, nodes = trainer["strategy"], trainer["num_nodes"]
    if isinstance(strategy, str):
        return read_sharding(strategy, {}, processes, nodes)
    options = strategy.get("init_args") or {}
    return read_sharding(strategy["class_path"], options, processes, nodes)


def parse_memory(text: str) -> int:
    """Return the bytes in `80GiB`, `80GB`, `81920MiB`.

    Raises:
        UserError: If it is no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)\s*", text)
    if found is None or float(found[1]) == 0:
        raise UserError(f"--memory {text} is no size of memory; write 80GiB, 80GB or 81920MiB.")
    return round(float(found[1]) * UNITS[found[2]])


def device_memory() -> int | None:
    """Return the bytes of the first CUDA device, None without one."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def choose_rank(config: Config) -> tuple[int, str]:
    """Return the rank that `auto` means in a configuration, and a sentence on why.

    Raises:
        UserError: If no rank fits, and what `read_plan` raises.
    """
    plan = read_plan(config)
    total = None if uses_cpu(config) else device_memory()
    if total is None:
        plan = replace(plan, step=replace(plan.step, on_cpu=True))
    where = "of the GPU's memory"
    if total is None and (processes := plan.step.sharding.processes) > 1:
        # Not the free memory: each process looks for itself, and all must find the same.
        where, total = "of this machine's memory, by all processes", total_memory() // processes
    elif total is None:
        where, total = "of this machine's free memory", available_memory()
    budget = total * (1 - MARGIN)
    rank = plan.highest_rank(budget)
    if rank is None:
        lowest = plan.memory(plan.candidates[0]).total
        raise UserError(
            f"rank: auto finds none that fits: rank {plan.candidates[0]} is estimated at "
            f"{lowest / GIB:.2f} GiB, and {budget / GIB:.2f} GiB are there ({1 - MARGIN:.0%} "
            f"{where}); `rslightning plan` says what needs less."
        )
    reason = (
        f"rank: auto is {rank}: the highest of {plan.candidates[0]}, {plan.candidates[1]}, ..., "
        f"{plan.candidates[-1]} that fits {budget / GIB:.2f} GiB, {1 - MARGIN:.0%} {where};\n"
        f"memory is estimated at {plan.memory(rank)}."
    )
    return rank, reason
