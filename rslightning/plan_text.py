"""A plan as text: a table of ranks, the highest that fits, and what would raise it."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Final

from rslightning.cost import GIB
from rslightning.memory import MemoryEstimate, estimate_memory
from rslightning.plan import MARGIN, Plan
from rslightning.training_step import (
    Optimizer,
    Sharding,
    TrainingStep,
    quantized_bytes,
    read_sharding,
    step_operations,
)

NF4: Final = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}

STRATEGIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "deepspeed_zero1": ("ZeroStrategy", {"stage": 1}),
    "deepspeed_zero2": ("ZeroStrategy", {"stage": 2}),
    "fsdp2": ("FSDP2Strategy", {}),
    "deepspeed_zero3_offload": (
        "ZeroStrategy",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
}
"""Fragment of `configs/strategy` -> its class and arguments, for those that share something out.

ZeRO-3 is not among them: FSDP2 needs about as much memory, and no further package.
"""

WIDTHS: Final = {part.name: max(8, len(part.name) + 2) for part in fields(MemoryEstimate)}
"""Name of a part -> width of its column."""


def describe_plan(plan: Plan, memory: int) -> Iterator[str]:
    """Yield the lines of a plan.

    Args:
        plan: What is trained.
        memory: Bytes of one device.
    """
    budget = memory * (1 - MARGIN)
    yield from _describe_recipe(plan)
    yield "Estimated peak of one device in GiB, and operations of a step as multiples of rank 4's:"
    parts = [f"{name:>{WIDTHS[name]}}" for name in estimate_memory(plan.shape, plan.step).parts()]
    yield f"{'rank':>8}{''.join(parts)}{'peak':>8}{'ops':>12}"
    room = f"{_gib(budget)} ({_gib(memory)}, of which {MARGIN:.0%} are left free)"
    if not plan.adapted:
        estimate = estimate_memory(plan.shape, plan.step)
        yield _row("full", estimate, 1.0, budget)
        yield f"It {'fits' if estimate.total <= budget else 'does not fit'} {room}."
        return
    yield from _rank_rows(plan, budget)
    best = plan.highest_rank(budget)
    if best is None:
        yield f"No rank fits {room}."
    else:
        peak = _gib(plan.memory(best).total)
        yield f"Highest rank that fits {room}: {best} ({peak})."
    yield from _describe_switches(plan, budget, best or 0)


def _describe_recipe(plan: Plan) -> Iterator[str]:
    step = plan.step
    what = f"adapters on {len(plan.adapted)} linear maps" if plan.adapted else "full fine-tuning"
    yield f"{plan.base_model}: {plan.shape.parameters:,} parameters, {what}"
    yield (
        f"{step.rows} rows x {step.length} tokens x {plan.accumulation} micro-batches x "
        f"{step.sharding.processes} devices, {step.optimizer.name}, activation checkpointing "
        f"{'on' if step.activation_checkpointing else 'off'}"
    )
    if not step.optimizer.is_known:
        yield f"The state of {step.optimizer.name} is a guess: two numbers for each entry."


def _rank_rows(plan: Plan, budget: float) -> Iterator[str]:
    """Yield a line for each rank, the recipe's own marked, and the host's memory if it is used."""
    first = step_operations(plan.shape, plan.at(plan.candidates[0]))
    for rank in sorted({*plan.candidates, *([plan.rank] if plan.rank else [])}):
        mark = "> " if rank == plan.rank else ""
        cost = step_operations(plan.shape, plan.at(rank)) / first
        yield _row(f"{mark}{rank}", plan.memory(rank), cost, budget)
    if plan.rank:
        yield "> the rank of this configuration"
    if host := plan.memory(plan.rank or plan.candidates[-1]).host:
        yield f"At rank {plan.rank or plan.candidates[-1]}, {_gib(host)} are in the host's memory."


def _row(name: str, estimate: MemoryEstimate, cost: float, budget: float) -> str:
    cells = [f"{size / GIB:{WIDTHS[part]}.2f}" for part, size in estimate.parts().items()]
    fits = "fits" if estimate.total <= budget else "    "
    return f"{name:>8}{''.join(cells)}{estimate.total / GIB:8.2f}  {fits}{cost:6.2f}"


def _describe_switches(plan: Plan, budget: float, best: int) -> Iterator[str]:
    """Yield what gives a higher rank than `best`, each with that rank."""
    found = {
        option: rank
        for option, other in _switches(plan).items()
        if (rank := other.highest_rank(budget) or 0) > best
    }
    if best == plan.candidates[-1]:
        yield "That is the highest rank that is asked for here."
    elif not found:
        yield "No single switch gives a higher one."
    else:
        yield "What would raise it, each by itself:"
    for option, rank in sorted(found.items(), key=lambda item: -item[1]):
        yield f"{rank:>8}  {option}"


def describe_ways_out(plan: Plan, memory: int) -> str:
    """Return what to change where a run has found too little memory, each option by itself.

    Args:
        plan: What was trained.
        memory: Bytes of one device.
    """
    now = _peak(plan)
    # What was estimated to fit did not: less than that, then.
    budget = min(memory, now) * (1 - MARGIN)
    options = {**_smaller(plan, budget), **_switches(plan)}
    fitting = [option for option, other in options.items() if _peak(other) <= budget]
    said = f"the step was estimated at {_gib(now)}, and the device has {_gib(memory)}"
    if not fitting:
        return f"{said}; no single option would fit: try several of `rslightning plan`'s."
    return f"{said}. By estimate any of these would fit: {'; '.join(fitting)}."


def _peak(plan: Plan) -> int:
    ranked = plan.at(plan.rank) if plan.rank else plan.step
    return estimate_memory(plan.shape, ranked).total


def _smaller(plan: Plan, budget: float) -> dict[str, Plan]:
    """Return options for a lower rank, fewer rows and shorter ones -> the plan with them."""
    step, found = plan.step, {}
    lower = [rank for rank in plan.candidates if plan.rank and rank < plan.rank]
    if rank := max((r for r in lower if plan.memory(r).total <= budget), default=None):
        found[f"--model.adapter.rank {rank}"] = replace(plan, rank=rank)
    for rows in _halves(step.rows):
        other = replace(plan, step=replace(step, rows=rows, keeps_gradients=True))
        if step.rows % rows == 0 and _peak(other) <= budget:
            micro_batches = plan.accumulation * step.rows // rows
            option = f"--data.batch_size {rows} --trainer.accumulate_grad_batches {micro_batches}"
            found[option] = other
            break
    for length in _halves(step.length):
        other = replace(plan, step=replace(step, length=length))
        if _peak(other) <= budget:
            found[f"--data.max_length {length}"] = other
            break
    return found


def _halves(number: int) -> Iterator[int]:
    """Yield a half, a quarter, ... down to 1."""
    while number > 1:
        number //= 2
        yield number


def _switches(plan: Plan) -> dict[str, Plan]:
    """Return options of `fit` that need less memory -> the plan with them."""
    step = plan.step
    switches: dict[str, Any] = {}
    if not step.activation_checkpointing:
        switches["--model.activation_checkpointing true"] = {"activation_checkpointing": True}
    if step.rows > 1:
        batch = "--data.batch_size 1 --trainer.accumulate_grad_batches "
        switches[f"{batch}{plan.accumulation * step.rows}"] = {"rows": 1, "keeps_gradients": True}
    if step.base_bytes == 4:
        option = "--model.dtype bfloat16 --trainer.precision bf16-mixed"
        switches[option] = {"base_bytes": 2, "compute_bytes": 2}
    if step.map_bytes is None and not step.sharding.weights:
        switches["--config configs/quantization/nf4.yaml"] = {"map_bytes": quantized_bytes(NF4)}
    if step.optimizer == Optimizer("AdamW"):
        option = "--model.optimizer bitsandbytes.optim.AdamW8bit"
        switches[option] = {"optimizer": Optimizer("AdamW8bit")}
    for name, other in _shardings(step).items():
        switches[f"--config configs/strategy/{name}.yaml"] = {"sharding": other}
    return {
        option: replace(plan, step=replace(step, **changes)) for option, changes in switches.items()
    }


def _shardings(step: TrainingStep) -> dict[str, Sharding]:
    """Return names of fragments -> who keeps what; a quantized base is not shared out."""
    processes = step.sharding.processes
    found = {name: read_sharding(*strategy, processes) for name, strategy in STRATEGIES.items()}
    return {name: x for name, x in found.items() if not (x.weights and step.map_bytes)}


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
