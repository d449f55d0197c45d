"""The configuration that a run has saved, and how another one differs from it."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

CONFIG_FILE: Final = "config.yaml"
RESUMED: Final = re.compile(r"config\.resume-(\d+)\.yaml")

NO_PART: Final = (
    "ckpt_path",
    "auto_resume",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.logger",
)
"""Keys in which two runs of the same configuration may differ, and what is in them."""

NOT_TOLD: Final = (
    "ckpt_path",
    "auto_resume",
    "weights_only",
    "trainer.logger",
    "trainer.default_root_dir",
    "model.base_model",  # its folder may move; another one is refused
    "model.optimizer.init_args",  # told where they take effect (`keep_changes`)
    "model.lr_scheduler.init_args",
)
"""Keys in which a run that goes on may differ from before without a word, and what is in them."""

AUTO_RANK: Final = ("model.adapter.rank", "auto")
"""A key whose value is replaced by a number before it is saved."""


class Difference(NamedTuple):
    """A key of which two configurations have other values."""

    key: str
    before: Any
    now: Any


def next_config(run: Path) -> Path:
    """Return the file for the configuration with which a run begins, or goes on."""
    number = _resumed(run)
    if number is None:
        return run / CONFIG_FILE
    return run / f"config.resume-{number + 1}.yaml"


def newest_config(run: Path) -> Any:
    """Return the configuration with which a run began, or went on the last time; None without."""
    number = _resumed(run)
    if number is None:
        return None
    path = run / (f"config.resume-{number}.yaml" if number else CONFIG_FILE)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


def _resumed(run: Path) -> int | None:
    """Return how many times a run has gone on; None if it has no configuration."""
    names = [path.name for path in run.iterdir()] if run.is_dir() else []
    numbers = [int(match[1]) for match in map(RESUMED.fullmatch, names) if match]
    return max(numbers, default=0) if numbers or CONFIG_FILE in names else None


def first_difference(saved: Any, now: Mapping[str, Any]) -> str | None:
    """Return in what two configurations are not the same, with both values; None if they are."""
    for key, before, value in differences(saved, now):
        if not _is_within(key, NO_PART) and (key, value) != AUTO_RANK:
            return f"{key} {before!r}, not {value!r}"
    return None


def describe_changes(saved: Any, now: Mapping[str, Any]) -> str | None:
    """Return a sentence on what differs in a run that goes on; None if there is nothing to tell.

    Args:
        saved: Configuration of the run up to now.
        now: That with which it goes on.
    """
    told = [each for each in differences(saved, now) if not _is_within(each.key, NOT_TOLD)]
    if not told:
        return None
    changes = [f"{_short(d.key)} is {_say(d.now)}, and was {_say(d.before)}" for d in told]
    said = f"going on with another configuration than before: {'; '.join(changes)}."
    if any(map(_moves_rows, told)):
        said += (
            "\nthe pass goes on after as many batches as were read, which are others now: some "
            "rows come again, or are left out."
        )
    return said


def differences(before: Any, now: Any, key: str = "") -> Iterator[Difference]:
    """Yield where two configurations differ, of the keys that both have.

    Of two classes that is which they are, and not their arguments.
    """
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        if before != now:
            yield Difference(key, before, now)
    elif before.get("class_path") != now.get("class_path"):
        yield Difference(key, before, now)
    else:
        for name in now:
            if name in before:
                inner = f"{key}.{name}" if key else str(name)
                yield from differences(before[name], now[name], inner)


def _is_within(key: str, names: tuple[str, ...]) -> bool:
    return key in names or key.startswith(tuple(f"{name}." for name in names))


def _moves_rows(difference: Difference) -> bool:
    """Tell whether the batches of a pass are others, or in another order."""
    key = difference.key
    by_data = _is_within(key, ("data",)) and key != "data.init_args.num_workers"
    return by_data or key in ("trainer.devices", "trainer.num_nodes")


def _short(key: str) -> str:
    return key.replace(".init_args", "")


def _say(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"])
    return value if isinstance(value, str) else json.dumps(value, default=str)
