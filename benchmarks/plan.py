"""Predicted against measured peak memory of training steps on the CPU, by part.

    python benchmarks/plan.py [--width 256] [--layers 5] [--processes 1]

Each case is a Llama with random weights in a Lightning Trainer, which makes two steps. The peak is
the largest sum of bytes in tensors after training began, as torch's profiler saw them allocated and
freed. Weights, gradients and the optimizer's state are counted from the tensors; what is left of
the peak is the activations, what loss and layers work on, and what is exchanged.

With several processes (gloo) the cases are the strategies that share out what is kept. The first
and the last process are measured, while they train and while they build the model.
"""

import argparse
import importlib
import json
import logging
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from rslightning import CausalLMModule, memory
from rslightning.batch import IGNORED, Batch
from rslightning.memory import MemoryEstimate, estimate_memory
from rslightning.plan import read_plan
from rslightning.rslora import AdapterSpec
from rslightning.strategies import FSDP2Strategy, ZeroStrategy

MIB = 2**20
COUNTED = ("frozen", "trained", "gradients", "optimizer")
SCALE = 1000
"""What DeepSpeed takes of fixed size is divided by it: so much smaller are the models here."""


def _of_zero(stage: int) -> dict[str, Any]:
    return {"class_path": "rslightning.strategies.ZeroStrategy", "init_args": {"stage": stage}}


STRATEGIES: dict[str, Any] = {
    "single": "auto",
    "ddp": "ddp",
    "fsdp2": {"class_path": "rslightning.strategies.FSDP2Strategy"},
    "deepspeed_zero1": _of_zero(1),
    "deepspeed_zero2": _of_zero(2),
    "deepspeed_zero3": _of_zero(3),
}
"""Fragment of `configs/strategy` -> its strategy, as a recipe names it."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Attributes:
        name: What is special about it.
        rank: Of adapters on all linear maps; None is full fine-tuning.
        width: Width of the model.
        layers: Its layers.
        rows: Rows of the batch.
        length: Tokens of a row.
        words: Size of the vocabulary.
        mixed: Whether the base is in bfloat16 and autocast on, else all is float32.
        checkpointing: Whether layers are recomputed.
        packed: Whether a row holds two examples whose first halves are no targets.
        processes: How many train it.
        strategy: Which fragment of `configs/strategy` they follow.
    """

    name: str
    rank: int | None
    width: int = 256
    layers: int = 5
    rows: int = 4
    length: int = 160
    words: int = 1000
    mixed: bool = False
    checkpointing: bool = False
    packed: bool = False
    processes: int = 1
    strategy: str = "single"

    @property
    def dtype(self) -> str:
        """Dtype of the base."""
        return "bfloat16" if self.mixed else "float32"

    @property
    def precision(self) -> str:
        """Precision of the Trainer."""
        return "bf16-mixed" if self.mixed else "32-true"

    def config(self) -> dict[str, Any]:
        """Return the model's `config.json`."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.width,
            "intermediate_size": self.width * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": self.words,
        }

    def recipe(self, folder: Path) -> dict[str, Any]:
        """Return what a recipe says of the case."""
        adapter = {"rank": self.rank, "targets": "all_linear", "dropout": 0.0, "rank_pattern": {}}
        return {
            "model": {
                "base_model": str(folder),
                "adapter": adapter if self.rank else None,
                "optimizer": {"class_path": "torch.optim.AdamW"},
                "dtype": self.dtype,
                "attention": None,
                "activation_checkpointing": self.checkpointing,
                "quantization": None,
            },
            "trainer": {
                "accelerator": "cpu",
                "devices": self.processes,
                "num_nodes": 1,
                "strategy": STRATEGIES[self.strategy],
                "precision": self.precision,
                "accumulate_grad_batches": 1,
            },
            "data": {"init_args": {"batch_size": self.rows, "max_length": self.length}},
        }

    def batch(self) -> Batch:
        """Return random tokens."""
        ids = torch.randint(2, self.words, (self.rows, self.length))
        labels, mask = ids.clone(), torch.ones_like(ids)
        mask[0, -3:] = 0
        if not self.packed:
            return Batch(ids, labels, mask)
        half = self.length // 2
        positions = torch.arange(self.length).remainder(half).repeat(self.rows, 1)
        labels[positions < half // 2] = IGNORED
        return Batch(ids, labels, mask, positions)


def cases(width: int, layers: int) -> tuple[Case, ...]:
    """Return the five cases for models of a size."""
    size = {"width": width, "layers": layers}
    return (
        Case("rank 16, float32", 16, **size),
        Case("rank 128, bfloat16 base, float32 adapters", 128, mixed=True, **size),
        Case("wider, activation checkpointing", 32, 3 * width // 2, layers, 6, checkpointing=True),
        Case("packed, loss on half of the positions", 24, packed=True, **size),
        Case("full fine-tuning", None, **size),
    )


class Twice:
    """A loader that gives a batch two times."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        yield from (self.batch, self.batch)


class CPUZeroStrategy(ZeroStrategy):
    """Ours on gloo, where Lightning refuses it."""

    def __init__(self, stage: int) -> None:
        bucket = memory.DEEPSPEED_BUCKET // SCALE
        super().__init__(stage, reduce_bucket_size=bucket, allgather_bucket_size=bucket)
        self.config["zero_optimization"] |= {
            "stage3_max_reuse_distance": memory.DEEPSPEED_REUSE // SCALE,
            "stage3_max_live_parameters": memory.DEEPSPEED_REUSE // SCALE,
            "stage3_prefetch_bucket_size": memory.DEEPSPEED_PREFETCH // SCALE,
            "stage3_param_persistence_threshold": 100_000 // SCALE,
        }

    def setup_environment(self) -> None:
        """Do what Lightning does on any device."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Join the processes."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """Have an index, which DeepSpeed wants."""
        return torch.device("cpu", 0)


def make_strategy(case: Case) -> Any:
    """Return the strategy of a case, for CPU processes."""
    found = STRATEGIES[case.strategy]
    if isinstance(found, str):
        return found
    return CPUZeroStrategy(**found["init_args"]) if "init_args" in found else FSDP2Strategy()


def import_deepspeed() -> None:
    """Import what takes seconds in each process, and build no extension."""
    for name in ("muon.muon_optimizer", "stage_1_and_2", "stage3"):
        importlib.import_module(f"deepspeed.runtime.zero.{name}")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


class Marked(CausalLMModule):
    """Marks in the profile where the model is built."""

    def configure_model(self) -> None:
        """Build the model."""
        with record_function("construction"):
            super().configure_model()


class Count(Callback):
    """Mark training in the profile, and count the bytes that it holds when it is over."""

    def __init__(self) -> None:
        self.mark = record_function("training")
        self.found: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self.mark.__enter__()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Count the gradients, while all strategies have them."""
        trained = (p for p in pl_module.parameters() if p.requires_grad)
        self.found["gradients"] = held_bytes([*gradients(trained, optimizer)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End, and count."""
        self.mark.__exit__(None, None, None)
        parameters = list(pl_module.parameters())
        self.found |= {
            "frozen": held_bytes([p for p in parameters if not p.requires_grad]),
            "trained": held_bytes([p for p in parameters if p.requires_grad]),
            "optimizer": held_bytes([*optimizer_tensors(trainer.optimizers[0])]),
        }


def gradients(trained: Iterable[Tensor], optimizer: Any) -> Iterator[Tensor]:
    """Yield the gradients, those that DeepSpeed keeps elsewhere among them."""
    for parameter in trained:
        if parameter.grad is not None:
            yield parameter.grad
    for found in getattr(optimizer, "averaged_gradients", {}).values():
        yield from found if isinstance(found, list) else ()
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:
        yield flat


def optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Yield the state, without counters of steps, and the masters that DeepSpeed keeps."""
    inner = getattr(optimizer, "optimizer", optimizer)
    yield from (x for state in inner.state.values() for x in state.values() if x.numel() > 1)
    if inner is not optimizer:
        masters = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
        yield from (x for name in masters for x in getattr(optimizer, name, ()))


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of this process's parts, each of them once."""
    local = (getattr(tensor, "ds_tensor", tensor) for tensor in tensors)
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in local]
    storages = [x.untyped_storage() for x in parts]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Return the measured bytes by part; `rest` is what is left of the peak."""
    measured = measure_process(case, folder)
    return {name: measured[name] for name in (*COUNTED, "rest")}


def measure_process(case: Case, folder: Path) -> dict[str, int]:
    """Return the same, and the peak of this process while the model was built."""
    rank = os.environ.get("RANK", "0")
    (folder / "config.json").write_text(json.dumps(case.config()), encoding="utf-8")
    torch.manual_seed(0)
    module = Marked(
        str(folder),
        AdapterSpec(rank=case.rank) if case.rank else None,
        partial(torch.optim.AdamW, lr=1e-4),
        dtype=case.dtype,
        pretrained=False,
        activation_checkpointing=case.checkpointing,
    )
    count = Count()
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=case.processes,
        strategy=make_strategy(case),
        max_steps=2,
        precision=case.precision,
        callbacks=[count],
        limit_val_batches=0,
        default_root_dir=folder,
        **quiet,
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.fit(module, Twice(case.batch()))
    trace = folder / f"trace{rank}.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = {name: count.found[name] for name in COUNTED}
    rest = peak_bytes(events) - sum(found.values())
    return {**found, "rest": rest, "construction": peak_bytes(events, "construction")}


@contextmanager
def scaled() -> Iterator[None]:
    """Let DeepSpeed's fixed sizes be estimated as `CPUZeroStrategy` sets them."""
    names = "DEEPSPEED_BUCKET", "DEEPSPEED_REUSE", "DEEPSPEED_PREFETCH"
    before = {name: getattr(memory, name) for name in names}
    vars(memory).update({name: size // SCALE for name, size in before.items()})
    try:
        yield
    finally:
        vars(memory).update(before)


def measure_processes(case: Case, folder: Path) -> list[dict[str, int]]:
    """Measure each of several processes, forked as if torchrun had started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [fork_process(case, folder, rank, port) for rank in range(case.processes)]
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit(f"A process failed: {case}")
    files = [folder / f"rank{rank}.json" for rank in range(case.processes)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def fork_process(case: Case, folder: Path, rank: int, port: str) -> int:
    """Start one of them; it writes what it measured into a file. Return its id."""
    if child := os.fork():
        return child
    ranks, sizes = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict.fromkeys(ranks, str(rank)) | dict.fromkeys(sizes, str(case.processes))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"TORCHELASTIC_RUN_ID": "plan", "GROUP_RANK": "0"}
    try:
        found = measure_process(case, folder)
        (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def peak_bytes(events: list[dict[str, Any]], name: str = "training") -> int:
    """Return the largest sum of allocated bytes within a mark."""
    mark = next(event for event in events if event["name"] == name and "dur" in event)
    start, end = mark["ts"], mark["ts"] + mark["dur"]
    peak = total = 0
    sizes = dict[int, int]()  # of what is allocated in this profile
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        total -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            total += size
        if start <= event["ts"] <= end:
            peak = max(peak, total)
    return peak


def predict(case: Case, folder: Path) -> dict[str, int]:
    """Return what the plan of a case says, by the same parts."""
    plan = read_plan(case.recipe(folder))
    estimate: MemoryEstimate = (
        plan.memory(case.rank) if case.rank else estimate_memory(plan.shape, plan.step)
    )
    parts = estimate.parts()
    rest = sum(size for name, size in parts.items() if name not in COUNTED)
    return {**{name: parts[name] for name in COUNTED}, "rest": rest}


def processes_cases(width: int, layers: int, processes: int) -> Iterator[Case]:
    """Yield for each strategy: much to keep for the backward pass, less of it, next to nothing."""
    plain = Case("no checkpointing", 128, width, layers, mixed=True, processes=processes)
    checkpointing = replace(plain, name="checkpointing", checkpointing=True)
    few = replace(checkpointing, name="rank 512, 64 tokens", rank=512, rows=2, length=32)
    for strategy in [name for name in STRATEGIES if name != "single"]:
        for case in (plain, checkpointing, few):
            yield replace(case, name=f"{strategy}, {case.name}", strategy=strategy)


def report(name: str, predicted: dict[str, int], measured: dict[str, int]) -> None:
    """Print the peaks' ratio, and the parts."""
    pairs = [(predicted[part], measured[part]) for part in predicted]
    pairs.append((sum(predicted.values()), sum(x for _, x in pairs)))
    print(f"{name}: peak {pairs[-1][0] / pairs[-1][1]:.3f} of the measured one")
    print("".join(f"{f'{a / MIB:.2f} / {b / MIB:.2f}':>18}" for a, b in pairs), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"MiB, predicted / measured; torch {torch.__version__}")
    print("".join(f"{name:>18}" for name in (*COUNTED, "rest", "peak")))
    size = options.width, options.layers
    if options.processes == 1:
        for case in cases(*size):
            with tempfile.TemporaryDirectory() as folder:
                measured = measure(case, Path(folder))
                report(case.name, predict(case, Path(folder)), measured)
        return
    import_deepspeed()
    for case in processes_cases(*size, options.processes):
        with tempfile.TemporaryDirectory() as folder:
            found = measure_processes(case, Path(folder))
            with scaled():
                predicted = predict(case, Path(folder))
        for rank, measured in enumerate(found):
            report(f"{case.name}, process {rank}", predicted, measured)
            print(f"    building the model: {measured['construction'] / MIB:.2f}")


if __name__ == "__main__":
    main()
