"""What the monitors cost: runs with and without them, alternating in one process.

    python benchmarks/monitors.py [--model FOLDER] [--rounds 5] [--length 512] [--device cuda]

Trains adapters of rank 16 on all linear maps of a Llama, TensorBoard on, and times ten steps of
each variant in turn. A step's place in the ten is timed by its median over the rounds, since a
monitor logs in some places only; their mean is what is compared. CPU time is that of the process.
On a shared machine two runs differ by more than a cheap monitor costs; `within` is the CPU time
spent in the callbacks and their hooks as a share of the same run's, which other load moves little.
What `log_dict` costs later, when Lightning writes, is not in it.

Without --model the Llama has random weights and the sizes of a 5-million-parameter story model (on
CUDA those of a 1-billion-parameter one).
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import grad_norm
from torch.utils.data import DataLoader

from rslightning import CausalLMModule
from rslightning.batch import Batch
from rslightning.callbacks import (
    ActivationMomentMonitor,
    GradientNormMonitor,
    TokenThroughputMonitor,
)
from rslightning.rslora import AdapterSpec
from rslightning.stats.moments import MomentRecorder

TIMED = range(1, 11)  # step 0 warms up; step 10 is one that logs every 10 steps
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
SIZES = {
    "cpu": SMALL | {"num_attention_heads": 8, "vocab_size": 2048, "tie_word_embeddings": True},
    "cuda": LARGE | {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
}


class NormPerParameter(Callback):
    """The norm of each gradient, read one by one, as Composer's OptimizerMonitor does it."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Log the norms."""
        named = [(n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None]
        norms = {f"l2_norm/grad/{name}": gradient.norm().item() for name, gradient in named}
        norms["l2_norm/grad/global"] = sum(norm**2 for norm in norms.values()) ** 0.5
        pl_module.log_dict(norms)


class LightningGradNorm(Callback):
    """The recipe of Lightning's documentation."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Log the norms."""
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class Meter:
    """CPU time within functions, those that they call counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                self.seconds += 0 if self._depth else time.process_time() - start

        return timed

    def watch(self, monitors: list[Callback]) -> None:
        """Time the hooks of callbacks, and those that the moments' monitor puts on layers."""
        for monitor in monitors:
            for name in vars(type(monitor)):
                if name.startswith("on_"):
                    setattr(monitor, name, self.wrap(getattr(monitor, name)))


METER = Meter()
for name in ("_see_output", "_see_gradient"):
    setattr(MomentRecorder, name, METER.wrap(getattr(MomentRecorder, name)))


class Stopwatch(Callback):
    """Wall, CPU and metered time at the start of each timed step, and of the one after them."""

    def __init__(self) -> None:
        self.stamps: list[tuple[float, float, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time, if it is due."""
        ends = (TIMED.start, TIMED.stop)
        if pl_module.device.type == "cuda":  # between the ends the host may run ahead
            if batch_idx not in ends:
                return
            torch.cuda.synchronize()
        if batch_idx >= TIMED.start:
            self.stamps.append((time.perf_counter(), time.process_time(), METER.seconds))


def ours() -> list[Callback]:
    return [GradientNormMonitor(every_n_steps=1), ActivationMomentMonitor(every_n_steps=10)]


VARIANTS: dict[str, Callable[[], list[Callback]]] = {
    "no monitor": list,
    "gradient norms": lambda: [GradientNormMonitor(every_n_steps=1)],
    "gradient norms, moments": ours,
    "gradient norms, moments, throughput": lambda: [*ours(), TokenThroughputMonitor(1)],
    "Composer's way": lambda: [NormPerParameter()],
    "Lightning's grad_norm": lambda: [LightningGradNorm()],
}


def build(options: argparse.Namespace, folder: str) -> CausalLMModule:
    from transformers import LlamaConfig

    if options.model is None:
        LlamaConfig(architectures=["LlamaForCausalLM"], **SIZES[options.device]).save_pretrained(
            folder
        )
    module = CausalLMModule(
        str(options.model or folder),
        AdapterSpec(rank=16),
        partial(torch.optim.AdamW, lr=1e-4),
        dtype="float32" if options.device == "cpu" else "bfloat16",
        pretrained=options.model is not None,
    )
    module.configure_model()
    return module


def batches(options: argparse.Namespace, vocabulary: int) -> list[Batch]:
    torch.manual_seed(0)
    shape = (options.batch_size, options.length)
    ids = [torch.randint(vocabulary, shape) for _ in range(TIMED.stop + 1)]
    positions = torch.arange(options.length).expand(shape)
    return [Batch(each, each, torch.ones_like(each), positions) for each in ids]


def run(module: CausalLMModule, data: list[Batch], monitors: list[Callback], device: str) -> Any:
    """Return what each timed step took: [steps, (wall, CPU, within monitors)]."""
    stopwatch = Stopwatch()
    METER.watch(monitors)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=device,
            devices=1,
            precision="32-true" if device == "cpu" else "bf16-mixed",
            max_steps=len(data),
            callbacks=[stopwatch, *monitors],
            logger=TensorBoardLogger(folder),
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=None))
    stamps = torch.tensor(stopwatch.stamps, dtype=torch.float64)
    return stamps.diff(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: dict[str, list[torch.Tensor]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        module = build(options, folder)
        data = batches(options, module.model.config.vocab_size)
        for number in range(options.rounds):
            names = list(VARIANTS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                times[name].append(run(module, data, VARIANTS[name](), options.device))
    report(times)


def report(times: dict[str, list[torch.Tensor]]) -> None:
    """Print milliseconds per step, and what each variant adds to the first."""
    print(f"{'per step, and what is added':<36}{'wall':>19}{'CPU':>19}{'within':>9}")
    base: list[float] = []
    for variant, rounds in times.items():
        steps = torch.stack(rounds)  # [rounds, steps, (wall, CPU, within monitors)]
        wall, cpu, _ = (steps.quantile(0.5, dim=0).sum(0) / len(TIMED)).tolist()
        within = (steps[..., 2].sum(1) / steps[..., 1].sum(1)).quantile(0.5).item()
        base = base or [wall, cpu]
        print(
            f"{variant:<36}{1e3 * wall:8.1f} ms {wall / base[0] - 1:+7.1%}"
            f"{1e3 * cpu:8.1f} ms {cpu / base[1] - 1:+7.1%} {within:8.2%}"
        )


if __name__ == "__main__":
    main()
