"""Runs whose curves are made up, written by an independent writer: torch's SummaryWriter."""

import json
import math
from pathlib import Path

import numpy as np
import yaml
from torch.utils.tensorboard import SummaryWriter

from rslightning.experiments.event_files import Curve, Events
from rslightning.experiments.groups import Study, cell_of
from rslightning.experiments.runs import Run

FIRST_LOSS = 4.0
STEPS = 24


def make_config(scaling, rank, rate, seed, **changes):
    """Return the part of a resolved configuration that a report reads."""
    adapter = None
    if scaling != "full":
        adapter = {
            "rank": rank,
            "alpha": 16.0,
            "scaling": scaling,
            "targets": "all_linear",
            "init": changes.get("init", "kaiming_uniform"),
            "allocation": changes.get("allocation"),
        }
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate}}
    data = {"batch_size": 8, "max_length": 256}
    config = {
        "seed_everything": seed,
        "model": {"base_model": "/a/b/tiny", "adapter": adapter, "optimizer": optimizer},
        "data": {"class_path": "rslightning.data.GSM8K", "init_args": data},
        "trainer": {"max_steps": changes.get("steps", STEPS), "accumulate_grad_batches": 1},
    }
    for key, value in changes.get("keys", {}).items():
        *path, last = key.split(".")
        section = config
        for name in path:
            section = section[name]
        section[last] = value
    return config


def falling(end, steps=STEPS, first=FIRST_LOSS):
    """Return losses that fall from `first` and stay at `end` for the last ten steps."""
    falls = np.linspace(first, end, steps - 10 + 1)[:-1]
    return [*falls.tolist(), *[end] * 10]


def write_run(
    folder,
    scaling="rslora",
    rank=4,
    rate=1e-3,
    seed=0,
    losses=None,
    held_out=None,
    norms=None,
    curves=None,
    state="finished",
    message="",
    **changes,
):
    """Write one cell: config.yaml, an event file and status.json (`state` None: none)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(scaling, rank, rate, seed, **changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    losses = falling(2.0) if losses is None else losses
    tags = {"train/loss": losses, "train/perplexity": [math.exp(min(x, 80.0)) for x in losses]}
    if norms is not None:
        tags["grad_norm/mean"] = norms
    tags |= curves or {}
    with SummaryWriter(folder) as writer:
        for tag, values in tags.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, step)
        if held_out is not None:
            writer.add_scalar("val/loss", held_out, len(losses))
    if state is not None:
        (folder / "status.json").write_text(json.dumps({"state": state, "message": message}))
    return folder


def write_sweep(folder, **content):
    """Write a sweep's file; return its folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"name": folder.name, **content}))
    return folder


def make_run(scaling="rslora", rank=4, rate=1e-3, seed=0, losses=None, held_out=None, **more):
    """Return a run that is in no folder, with the curves that `write_run` would write."""
    curves = {"train/loss": falling(2.0) if losses is None else losses, **more.pop("curves", {})}
    held_out_at = more.pop("held_out_at", len(curves["train/loss"]) - 1)
    state, message = more.pop("state", "finished"), more.pop("message", "")
    config = make_config(scaling, rank, rate, seed, **more)
    run = Run(Path("nowhere"), f"{scaling}_{rank}_{rate:g}_{seed}", config, state, message)
    points = {
        tag: Curve(np.arange(len(values)), np.array(values, float))
        for tag, values in curves.items()
    }
    if held_out is not None:
        points["val/loss"] = Curve(np.array([held_out_at]), np.array([held_out], float))
    run.__dict__["events"] = Events(points, {})  # as the cached property keeps what it read
    return run


def make_study(runs, **fields):
    """Return the study of runs of one setting."""
    runs = sorted(runs, key=lambda run: cell_of(run, set()).order)
    setting = next(run.setting for run in runs)
    return Study("study", "Study", setting, {}, (), tuple(runs), **fields)
