"""What Llama-2-7B and 70B need on 1, 8 and 64 GPUs, counted: memory, bytes sent, time of a step.

    python benchmarks/scaling.py

Prints the tables of `docs/scaling.md`. Nothing is measured here: all is the arithmetic of
`rslightning/memory.py`, `training_step.py` and `communication.py` with the assumptions below.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rslightning.communication import step_communication
from rslightning.cost import GIB
from rslightning.memory import MemoryEstimate
from rslightning.model_shape import read_shape
from rslightning.plan import MARGIN, Plan, parse_memory
from rslightning.training_step import TrainingStep, read_sharding, step_operations

MODELS: Final[dict[str, dict[str, Any]]] = {
    "Llama-2-7B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "Llama-2-70B": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
}

STRATEGIES: Final[dict[str, tuple[str, Mapping[str, Any]]]] = {
    "ddp": ("ddp", {}),
    "deepspeed_zero1": ("rslightning.strategies.ZeroStrategy", {"stage": 1}),
    "deepspeed_zero2": ("rslightning.strategies.ZeroStrategy", {"stage": 2}),
    "fsdp2": ("rslightning.strategies.FSDP2Strategy", {}),
    "deepspeed_zero3": ("rslightning.strategies.ZeroStrategy", {"stage": 3}),
    "deepspeed_zero3_offload": (
        "rslightning.strategies.ZeroStrategy",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
    "single": ("auto", {}),
}
"""Fragment of `configs/strategy` -> its strategy."""

ALONE: Final = ("single", "deepspeed_zero3_offload")
"""What one GPU can take."""

SEVERAL: Final = tuple(name for name in STRATEGIES if name != "single")
GPUS: Final = {1: ALONE, 8: SEVERAL, 64: SEVERAL}
RANKS: Final = (16, 256, 2048)
MEMORIES: Final = ("80GB", "141GB")

ROWS, LENGTH = 8, 512

PEAK: Final = 989e12
"""Operations per second of an H100 or H200 in bfloat16, dense, by its data sheet."""

SHARE: Final = 0.4
"""Of the peak, what a step is assumed to reach."""

NODE: Final = 8
"""GPUs of a node."""

NVLINK: Final = 450e9
"""Bytes per second that a GPU sends to the others of its node."""

NETWORK: Final = 50e9
"""Bytes per second that a GPU's network card sends to other nodes: 400 Gbit/s."""


def make_plan(model: str, strategy: str, gpus: int) -> Plan:
    """Return the plan of a model with adapters on all maps of its layers, bfloat16 base."""
    shape = read_shape(MODELS[model])
    step = TrainingStep(
        ROWS,
        LENGTH,
        ranks=None,
        activation_checkpointing=True,
        sharding=read_sharding(*STRATEGIES[strategy], gpus),
    )
    adapted = tuple(linear for block in shape.blocks for linear in block.maps)
    return Plan(model, shape, adapted, None, {}, step, accumulation=1)


def link_bandwidth(gpus: int) -> float:
    """Return the bytes per second with which a process sends.

    A ring leaves a node once in `NODE` links. With as many rings as cards, which NCCL makes, each
    card sends the part of one ring, so that a node's cards work for its GPUs together.
    """
    return NVLINK if gpus <= NODE else min(NVLINK, NODE * NETWORK)


def compute_seconds(plan: Plan, rank: int) -> float:
    """Return the time of a micro-batch's operations."""
    return step_operations(plan.shape, plan.at(rank)) / (PEAK * SHARE)


def communication_seconds(plan: Plan, rank: int) -> float:
    """Return the time of what a process sends for a step of one micro-batch."""
    sent = step_communication(plan.shape, plan.at(rank)).total
    return sent / link_bandwidth(plan.step.sharding.processes)


def budgets() -> list[float]:
    """Return the bytes of each GPU that a plan fills."""
    return [parse_memory(memory) * (1 - MARGIN) for memory in MEMORIES]


def runs(model: str) -> Iterator[tuple[int, str, Plan]]:
    """Yield the number of GPUs, the fragment and the plan of each row."""
    for gpus, strategies in GPUS.items():
        for strategy in strategies:
            yield gpus, strategy, make_plan(model, strategy, gpus)


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, numbers on the right."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---:' if index != 1 else '---' for index in range(len(head)))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def memory_rows(model: str) -> Iterator[list[str]]:
    """Yield GPUs, strategy, memory at each rank, the host's, highest rank that fits each GPU."""
    for gpus, strategy, plan in runs(model):
        needed = {rank: plan.memory(rank) for rank in plan.candidates}
        host = needed[RANKS[-1]].host
        yield [
            str(gpus),
            f"`{strategy}`",
            *(memory_cell(needed[rank]) for rank in RANKS),
            f"{host / GIB:.1f}" if host else "",
            *(highest_rank(needed, budget) for budget in budgets()),
        ]


def highest_rank(needed: Mapping[int, MemoryEstimate], budget: float) -> str:
    """Return the highest rank that fits, as a plan finds it."""
    return str(max((rank for rank, x in needed.items() if x.total <= budget), default="none"))


def memory_cell(estimate: MemoryEstimate) -> str:
    """Return the GiB, with a mark for each GPU that they are too many for."""
    marks = "".join("*" for budget in budgets() if estimate.total > budget)
    return f"{estimate.total / GIB:.1f}{marks}".replace("*", r"\*")


def time_rows(model: str) -> Iterator[list[str]]:
    """Yield GPUs, strategy, and for each rank compute, communication, larger and sum in seconds."""
    largest = max(budgets())
    for gpus, strategy, plan in runs(model):
        if plan.step.sharding.weights_on_host:  # waits for the host, which is not counted
            continue
        cells = [
            time_cell(plan, rank) if plan.memory(rank).total <= largest else "does not fit"
            for rank in RANKS
        ]
        if {*cells} != {"does not fit"}:
            yield [str(gpus), f"`{strategy}`", *cells]


def time_cell(plan: Plan, rank: int) -> str:
    """Return the seconds of computing, of sending, and of both: at once, one after the other."""
    compute, communication = compute_seconds(plan, rank), communication_seconds(plan, rank)
    parts = (compute, communication, max(compute, communication), compute + communication)
    return " / ".join(f"{seconds:.2f}" for seconds in parts)


def sent_rows(model: str, gpus: int, rank: int) -> Iterator[list[str]]:
    """Yield strategy, and GiB that a process sends in steps of one and of four micro-batches."""
    for strategy in SEVERAL:
        plan = make_plan(model, strategy, gpus)
        sent = [step_communication(plan.shape, plan.at(rank), count) for count in (1, 4)]
        parts = [(each.gradients, each.weights) for each in sent]
        yield [
            str(gpus),
            f"`{strategy}`",
            *(f"{size / GIB:.2f}" for pair in parts for size in pair),
        ]


def lines() -> Iterator[str]:
    """Yield the lines of all tables."""
    ranks = [f"rank {rank}" for rank in RANKS]
    fits = [f"highest rank, {memory}" for memory in MEMORIES]
    host = f"of the host's, rank {RANKS[-1]}"
    for model in MODELS:
        yield from ("", f"### {model}: GiB on each GPU, and the highest rank that fits", "")
        yield from table(["GPUs", "fragment", *ranks, host, *fits], memory_rows(model))
    for model in MODELS:
        yield from ("", f"### {model}: seconds of a step of one micro-batch for each GPU", "")
        yield from table(["GPUs", "fragment", *ranks], time_rows(model))
    gpus, rank = 8, 256
    for model in MODELS:
        yield from ("", f"### {model}: GiB that each GPU sends in a step at rank {rank}", "")
        head = ["gradients", "weights", "gradients, 4 micro-batches", "weights, 4 micro-batches"]
        yield from table(["GPUs", "fragment", *head], sent_rows(model, gpus, rank))


def main() -> None:
    print("\n".join(lines()).strip())


if __name__ == "__main__":
    main()
