"""Predicted against measured peak memory of training steps on the CPU, by part.

    python benchmarks/plan.py [--width 256] [--layers 5]

Each case is a Llama with random weights in a Lightning Trainer, which makes two steps. The peak is
the largest sum of bytes in tensors after training began, as torch's profiler saw them allocated and
freed. Weights, gradients and the optimizer's state are counted from the tensors; what is left of
the peak is the activations and what loss and layers work on.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, record_function

from rslightning import CausalLMModule
from rslightning.batch import IGNORED, Batch
from rslightning.memory import MemoryEstimate, estimate_memory
from rslightning.plan import read_plan
from rslightning.rslora import AdapterSpec

MIB = 2**20
COUNTED = ("frozen", "trained", "gradients", "optimizer")


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
                "devices": 1,
                "num_nodes": 1,
                "strategy": "auto",
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


class Count(Callback):
    """Mark training in the profile, and count the bytes that it holds when it is over."""

    def __init__(self) -> None:
        self.mark = record_function("training")
        self.found: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self.mark.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End, and count."""
        self.mark.__exit__(None, None, None)
        parameters = list(pl_module.parameters())
        states = [value for x in trainer.optimizers[0].state.values() for value in x.values()]
        tensors = {
            "frozen": [p for p in parameters if not p.requires_grad],
            "trained": [p for p in parameters if p.requires_grad],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [value for value in states if value.numel() > 1],  # no step counters
        }
        self.found = {name: sum(x.nbytes for x in tensors[name]) for name in COUNTED}


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Return the measured bytes by part; `rest` is what is left of the peak."""
    (folder / "config.json").write_text(json.dumps(case.config()), encoding="utf-8")
    torch.manual_seed(0)
    module = CausalLMModule(
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
        devices=1,
        max_steps=2,
        precision=case.precision,
        callbacks=[count],
        limit_val_batches=0,
        default_root_dir=folder,
        **quiet,
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.fit(module, Twice(case.batch()))
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    peak = peak_bytes(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])
    return {**count.found, "rest": peak - sum(count.found.values())}


def peak_bytes(events: list[dict[str, Any]]) -> int:
    """Return the largest sum of allocated bytes within the mark `training`."""
    mark = next(event for event in events if event["name"] == "training" and "dur" in event)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"MiB, predicted / measured; torch {torch.__version__}")
    print("".join(f"{name:>18}" for name in (*COUNTED, "rest", "peak")))
    for case in cases(options.width, options.layers):
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(case, Path(folder))
            predicted = predict(case, Path(folder))
        peaks = sum(predicted.values()), sum(measured.values())
        pairs = [*((predicted[name], measured[name]) for name in measured), peaks]
        print(f"{case.name}: peak {peaks[0] / peaks[1]:.3f} of the measured one")
        print("".join(f"{f'{a / MIB:.2f} / {b / MIB:.2f}':>18}" for a, b in pairs), flush=True)


if __name__ == "__main__":
    main()
