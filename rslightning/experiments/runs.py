"""What a report knows of a run: its configuration, how it ended, and its curves."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from rslightning.errors import UserError
from rslightning.experiments.endings import is_at_its_end
from rslightning.experiments.event_files import PATTERN, Curve, Events, read_events
from rslightning.plain_yaml import read_plain_yaml

LAST: Final = 10
"""Steps whose mean is the final training loss: one step's batch is a few percent off the others."""

NOT_FINITE: Final = re.compile(r"is not finite|loss is -?(nan|inf)\b", re.IGNORECASE)
"""What `NonFiniteGuard` says when it stops a run."""

NOTHING: Final = Curve(np.zeros(0, np.int64), np.zeros(0))
DEFAULT_INIT: Final = "kaiming_uniform"
METHODS: Final = ("lora", "rslora", "quarter_root", "inverse_square", "unit", "adalora", "full")
"""The order of methods in figures and tables; variants follow theirs, unknown ones come last."""


class Setting(NamedTuple):
    """What runs must have in common so that their losses can be compared.

    `others` says in words what else differs from the runs beside them, see `differences`.
    """

    base_model: str
    data: str
    optimizer: str
    targets: str
    batch: str
    steps: int | None
    others: str = ""

    def __str__(self) -> str:
        steps = f"{self.steps} steps" if self.steps else ""
        parts = (self.optimizer, self.batch, steps, self.others)
        training = ", ".join(part for part in parts if part)
        where = f"{self.base_model or 'a model'} on {self.data or 'its data'}"
        targets = f", adapters on {self.targets}" if self.targets not in ("", "all_linear") else ""
        return f"{where}: {training}{targets}" if training else f"{where}{targets}"


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: Where it is.
        name: Its path below the folder that was given, with slashes.
        config: `config.yaml`; empty where there is none.
        state: `finished`, `failed` or `unfinished`.
        message: Why it failed, in the words of whoever ran it.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    state: str
    message: str

    @cached_property
    def events(self) -> Events:
        """What its event files hold; read once."""
        return read_events(self.folder)

    def curve(self, tag: str) -> Curve:
        """Return a curve; without points if the run never wrote it."""
        return self.events.curves.get(tag, NOTHING)

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The adapter's configuration; null for full fine-tuning."""
        adapter: dict[str, Any] | None = _at(self.config, "model.adapter")
        return adapter

    @property
    def method(self) -> str:
        """Name of the scaling, with what else tells methods apart; `full`; `run` if unknown."""
        if "model" not in self.config:
            return "run"
        if self.adapter is None:
            return "full"
        scaling, init = self.adapter.get("scaling", "rslora"), self.adapter.get("init")
        if self.adapter.get("allocation"):
            scaling = "adalora" if scaling == "lora" else f"adalora-{scaling}"
        return scaling if init in (None, DEFAULT_INIT) else f"{scaling}/{init}"

    @property
    def rank(self) -> int | None:
        """The rank; null for full fine-tuning."""
        return None if self.adapter is None else _number(self.adapter.get("rank"), int)

    @property
    def alpha(self) -> float | None:
        """The numerator of the scaling factor."""
        return None if self.adapter is None else _number(self.adapter.get("alpha"), float)

    @property
    def gamma(self) -> float | None:
        """The scaling factor, as the run itself wrote it down."""
        return _number(self.events.settings.get("adapter.gamma_r"), float)

    @property
    def trained_parameters(self) -> int | None:
        """How many parameters were trained, as the run itself wrote it down."""
        return _number(self.events.settings.get("model.trainable_parameters"), int)

    @property
    def learning_rate(self) -> float | None:
        """The optimizer's learning rate (before a schedule)."""
        return _number(_at(self.config, "model.optimizer.init_args.lr"), float)

    @property
    def seed(self) -> int | None:
        """`seed_everything`."""
        return _number(self.config.get("seed_everything"), int)

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        steps = _number(_at(self.config, "trainer.max_steps"), int)
        return steps if steps and steps > 0 else None

    @property
    def setting(self) -> Setting:
        """What its losses depend on besides method, rank, rate and seed."""
        return Setting(
            base_model=_short(_at(self.config, "model.base_model")),
            data=str(_at(self.config, "data.class_path") or "").rpartition(".")[2],
            optimizer=str(_at(self.config, "model.optimizer.class_path") or "").rpartition(".")[2],
            targets=_text((self.adapter or {}).get("targets")),
            batch=_batch(self.config),
            steps=self.max_steps,
        )

    @property
    def final_training_loss(self) -> float:
        """Mean of `train/loss` over the last 10 steps, in nats per target token; NaN if none."""
        values = self.curve("train/loss").values[-LAST:]
        return float(values.mean()) if len(values) else math.nan

    @property
    def held_out_loss(self) -> float:
        """The last `val/loss`, in nats per target token; NaN if none."""
        values = self.curve("val/loss").values
        return float(values[-1]) if len(values) else math.nan

    @property
    def broke(self) -> bool:
        """Whether its loss became infinite or NaN: a result, where other failures are accidents."""
        losses = (self.curve("train/loss").values, self.curve("val/loss").values)
        if not all(np.isfinite(values).all() for values in losses):
            return True
        return self.state == "failed" and bool(NOT_FINITE.search(self.message))

    @property
    def counts(self) -> bool:
        """Whether its end says something about its method."""
        return self.state == "finished" or self.broke


def read_run(folder: Path, name: str, in_sweep: bool) -> Run:
    """Return the run in `folder`.

    Outside of a sweep nobody writes how a run ended; its folder tells, see `endings`.

    Args:
        folder: The run folder.
        name: How the report calls it.
        in_sweep: Whether an absent `status.json` means that it has not finished.

    Raises:
        UserError: If `config.yaml` or `status.json` cannot be read.
    """
    config = read_yaml(folder / "config.yaml")
    status = _read_status(folder / "status.json")
    state = str(status.get("state", "unfinished"))
    run = Run(folder, name, config, state, str(status.get("message") or ""))
    if status or in_sweep or not _is_at_its_end(run):
        return run
    return Run(folder, name, config, "finished", "")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping; an empty one if there is no such file.

    Raises:
        UserError: If it is not a mapping in YAML.
    """
    if not path.is_file():
        return {}
    content = read_plain_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping; write it anew or remove it.")
    return content


def is_run(folder: Path) -> bool:
    """Tell whether `folder` is a run folder: it holds event files or says how a run ended."""
    return (folder / "status.json").is_file() or any(folder.glob(PATTERN))


def method_order(method: str) -> tuple[int, str]:
    """Return the key by which methods are sorted."""
    family = method.partition("/")[0].partition("-")[0].partition(",")[0]
    return (METHODS.index(family) if family in METHODS else len(METHODS), method)


def _is_at_its_end(run: Run) -> bool:
    steps = run.curve("train/loss").steps
    epochs = _number(_at(run.config, "trainer.max_epochs"), int)
    return is_at_its_end(
        run.folder,
        logged=int(steps[-1]) + 1 if len(steps) else 0,
        max_steps=run.max_steps,
        max_epochs=epochs if epochs and epochs > 0 else None,
        adapts=run.adapter is not None,
    )


def _read_status(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON; remove it and run the cell again.") from None
    if not isinstance(status, dict):
        raise UserError(f"{path} holds no mapping; remove it and run the cell again.")
    return status


def _at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _number(value: Any, kind: Any) -> Any:
    """Return a number of the configuration (YAML reads 5e-5 as text); null if it is none."""
    if isinstance(value, bool):
        return None
    try:
        return kind(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def _short(name: Any) -> str:
    """Return the last part of a Hub name or folder: no path of this machine is drawn."""
    return str(name or "").replace("\\", "/").rstrip("/").rpartition("/")[2]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _batch(config: dict[str, Any]) -> str:
    """Return the tokens of an optimizer step in words, on one device."""
    blocks = _number(_at(config, "data.init_args.batch_size"), int)
    length = _number(_at(config, "data.init_args.max_length"), int)
    if blocks is None or length is None:
        return ""
    accumulated = _number(_at(config, "trainer.accumulate_grad_batches"), int) or 1
    return f"{blocks * accumulated} x {length} tokens"
