"""A fit under any strategy, in processes of its own, that leaves what it did in a folder."""

import csv
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from rslightning import CausalLMModule
from rslightning.callbacks import (
    ActivationMomentMonitor,
    GradientNormMonitor,
    MergeAdapters,
    TrainableCheckpoint,
)
from rslightning.checkpoint import MATRICES, load_adapter
from rslightning.data import OpenOrca
from rslightning.rslora import AdapterSpec
from rslightning.strategies import FSDP2Strategy

ROWS = 38  # of a pass: 7 batches, the last of 2 rows, all of them the first process's
BATCH = 6
CLIP = 0.1  # below every norm of the gradients
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SHARING = ("fsdp2", "zero3")  # those that keep a part of the weights in each process


@dataclass(frozen=True)
class Fit:
    """What is run.

    Attributes:
        strategy: `single`, one of `STRATEGIES`, `fsdp2_parts`, whose checkpoints are in parts,
            `upstream2`, Lightning's own ZeRO-2, or `zero1_twice` and `zero2_twice`, whose
            checkpoints hold trained weights beside their masters.
        processes: How many share the rows of a batch.
        nodes: On how many nodes they believe to be.
        base: Folder of the base model, absolute or among the `bases`.
        rank: The adapters'; None is full fine-tuning.
        clip: `gradient_clip_val`.
        batch: Rows of all processes together.
        precision: Of the Trainer.
        save_every: Steps between two checkpoints; 0 for none.
        resume: A checkpoint to go on from.
        options: Further arguments of the module.
        merge: Arguments of `MergeAdapters`; None is without.
    """

    strategy: str = "single"
    processes: int = 1
    nodes: int = 1
    steps: int = 10
    base: str = "llama"
    rank: int | None = 3
    optimizer: str = "AdamW"
    clip: float | None = CLIP
    batch: int = BATCH
    packing: bool = False
    precision: str = "32-true"
    save_every: int = 0
    resume: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    merge: tuple[tuple[str, Any], ...] | None = ()

    def under(self, strategy: str, processes: int | None = None) -> "Fit":
        """Return the same fit under another strategy."""
        processes = processes or (1 if strategy == "single" else 2)
        return replace(self, strategy=strategy, processes=processes)

    @property
    def is_of_deepspeed(self) -> bool:
        """Whether DeepSpeed runs it."""
        return self.strategy.startswith(("zero", "upstream"))


OPTIMIZERS = {
    # An eps above the rounding of gradients: a tiny one shall not become a whole step.
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, eps=1e-5),
    "SGD": partial(torch.optim.SGD, lr=0.3, momentum=0.8),
}


class Places(NamedTuple):
    """Folders that every fit reads."""

    bases: Path
    data: Path


class Facts(Callback):
    """Keeps what no logger and no file says."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        states = [values for o in trainer.optimizers for values in o.state.values()]
        entries = [entry for values in states for entry in values.values()]
        sizes = [_local(entry).numel() for entry in entries if torch.is_tensor(entry)]
        self.values = {
            "global_step": trainer.global_step,
            "state_numbers": sum(sizes),
        }
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None:
            self.values["engine_clip"] = engine.gradient_clipping()
            self.values["engine_steps"] = engine.global_steps


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_strategy(fit: Fit) -> Any:
    """Return the strategy of a fit; skip the test where DeepSpeed is not installed."""
    if fit.is_of_deepspeed:
        cpu = pytest.importorskip("deepspeed_cpu")
        kind = cpu.CPUZeroStrategy if fit.strategy.startswith("zero") else cpu.CPUDeepSpeedStrategy
        kind = cpu.CPUTwiceStrategy if fit.strategy.endswith("_twice") else kind
        offload = dict.fromkeys(("offload_optimizer", "offload_parameters"), True)
        stage = int(fit.strategy.partition("_")[0][-1])
        return kind(stage=stage, **(offload if "offload" in fit.strategy else {}))
    makers: dict[str, Callable[[], Any]] = {
        "single": lambda: "auto",
        "ddp": DDPStrategy,
        "fsdp2": FSDP2Strategy,
        "fsdp2_parts": lambda: FSDP2Strategy(save_distributed_checkpoint=True),
        "fsdp2_nodes": lambda: FSDP2Strategy(replicate_nodes=True),
        "fsdp2_nodes_parts": lambda: FSDP2Strategy(
            save_distributed_checkpoint=True, replicate_nodes=True
        ),
    }
    return makers[fit.strategy]()


def make_fit_module(fit: Fit, places: Places, kind: Any = CausalLMModule) -> Any:
    """Return the module of a fit, with a schedule and float32 weights."""
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7)
    defaults = {"dtype": "float32", "lr_scheduler": schedule, "max_new_tokens": 7}
    return kind(
        str(places.bases / fit.base),
        None if fit.rank is None else AdapterSpec(rank=fit.rank, alpha=5.0),
        OPTIMIZERS[fit.optimizer],
        **(defaults | dict(fit.options)),
    )


def make_fit_data(fit: Fit, places: Places) -> OpenOrca:
    """Return the data of a fit: each process's share of a batch."""
    return OpenOrca(
        str(places.data),
        str(places.bases / "llama"),
        batch_size=fit.batch // fit.processes,
        max_length=80,
        held_out_examples=None,
        packing=fit.packing,
    )


def make_fit_trainer(
    fit: Fit, folder: Path, callbacks: Any, strategy: Any = None, **options: Any
) -> Trainer:
    """Return the Trainer of a fit."""
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        max_steps=fit.steps,
        precision=fit.precision,
        accumulate_grad_batches=2,
        gradient_clip_val=fit.clip,
        callbacks=callbacks,
        enable_checkpointing=fit.save_every > 0,
        strategy=strategy or make_strategy(fit),
        devices=fit.processes // fit.nodes,
        num_nodes=fit.nodes,
        use_distributed_sampler=False,
        **options,
    )


@contextmanager
def ignoring_deepspeed(fit: Fit) -> Iterator[None]:
    """Ignore warnings under DeepSpeed: what it deprecates is not ours to mend."""
    with warnings.catch_warnings():
        if fit.is_of_deepspeed:
            warnings.simplefilter("ignore")
        yield


def train(fit: Fit, folder: Path, places: Places, seed: int = 7) -> None:
    """Run a fit; this is what each process does."""
    torch.manual_seed(seed)
    facts = Facts()
    callbacks: list[Callback] = [
        GradientNormMonitor(every_n_steps=1),
        ActivationMomentMonitor(every_n_steps=5),
        facts,
    ]
    if fit.merge is not None:
        callbacks.append(MergeAdapters(**dict(fit.merge)))
    if fit.save_every:
        callbacks.append(TrainableCheckpoint(every_n_steps=fit.save_every))
    with ignoring_deepspeed(fit):
        trainer = make_fit_trainer(fit, folder, callbacks)
        trainer.fit(make_fit_module(fit, places), make_fit_data(fit, places), ckpt_path=fit.resume)
    path = folder / f"facts.{trainer.global_rank}.json"
    path.write_text(json.dumps(facts.values), encoding="utf-8")


class Left:
    """What a fit has left in its folder."""

    def __init__(self, fit: Fit, folder: Path) -> None:
        self.fit, self.folder = fit, folder

    @property
    def scalars(self) -> dict[str, dict[int, float]]:
        """Tag -> step -> value, of all that was logged."""
        found: dict[str, dict[int, float]] = {}
        with (self.folder / "metrics.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                for tag, value in row.items():
                    if value and tag != "epoch":
                        found.setdefault(tag, {})[step] = float(value)
        return found

    def facts(self, rank: int = 0) -> dict[str, Any]:
        """Return what a process said of itself."""
        return json.loads((self.folder / f"facts.{rank}.json").read_text(encoding="utf-8"))

    @property
    def merged(self) -> dict[str, torch.Tensor]:
        """The weights of the merged model."""
        return load_file(self.folder / "merged" / "model.safetensors")

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapter's matrices."""
        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    def checkpoint(self, name: str = "last") -> Path:
        """Return a checkpoint's path."""
        return self.folder / "checkpoints" / f"{name}.ckpt"


def matrices(path: Path) -> dict[str, torch.Tensor]:
    """Return the adapter matrices of whatever a run has left."""
    return {
        f"{name}.{matrix}": getattr(layer, matrix).detach()
        for name, layer in load_adapter(path).layers.items()
        for matrix in MATRICES
    }


def deviation(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest `||found - expected|| / ||expected||` of the tensors."""
    assert found.keys() == expected.keys()
    differences = [0.0]
    for name, truth in expected.items():
        if not torch.equal(found[name], truth):  # some biases are zero
            difference = (found[name].double() - truth.double()).norm() / truth.double().norm()
            differences.append(float(difference))
    return max(differences)


def scalar_deviation(found: Left, expected: Left, tag: str, steps: Any = None) -> float:
    """Return the largest relative difference of a tag's values; the steps must be the same.

    A first moment may be far smaller than the numbers that it is the mean of: its difference is
    relative to their root mean square.
    """
    ours, truth = found.scalars[tag], expected.scalars[tag]
    steps = list(truth) if steps is None else list(steps)
    assert [step for step in ours if step in steps] == steps
    scale = dict(truth)
    if tag.endswith("first_moment"):
        squares = expected.scalars[tag.replace("first", "second")]
        scale = {step: square**0.5 for step, square in squares.items()}
    differing = [step for step in steps if ours[step] != truth[step]]
    return max(
        (abs(ours[step] - truth[step]) / abs(scale[step]) for step in differing), default=0.0
    )
