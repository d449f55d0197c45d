"""What else tells runs apart: any key of a recipe but those that name a cell or its setting."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

SECTIONS: Final = (
    "model",
    "model.adapter",
    "model.adapter.allocation",
    "model.optimizer",
    "model.optimizer.init_args",
    "data",
    "data.init_args",
)
"""Mappings whose keys are compared one by one; a value that is a mapping itself is one value."""

NAMED: Final = frozenset(
    [
        "model.adapter.rank",
        "model.adapter.alpha",
        "model.adapter.scaling",
        "model.adapter.init",
        "model.adapter.targets",
        "model.adapter.allocation.target_rank",  # it goes with the rank
        "model.optimizer.init_args.lr",
        "data.init_args.batch_size",
        "data.init_args.seed",
    ]
)
"""Keys that `Cell`, `Setting` or the seed speak of."""

HARMLESS: Final = frozenset(
    [
        "model.activation_checkpointing",
        "model.attention",
        "model.compile",
        "model.max_new_tokens",
        "model.trust_remote_code",
        "data.init_args.num_workers",
    ]
)
"""Keys that no loss depends on."""

TRAINER: Final = (
    "devices",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "max_epochs",
    "max_time",
    "num_nodes",
    "overfit_batches",
    "precision",
)
"""The trainer's keys that losses depend on."""


def tell_apart(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return for each configuration in words what it does not share with all others.

    Those of equal words can be compared: `dropout 0.5, path b.jsonl`; empty where nothing differs.
    What a configuration says nothing of (another version wrote it, or it has no adapter) is taken
    for null, and null for the same as zero, false or nothing.
    """
    found = [_conditions(config) for config in configs]
    words: list[list[str]] = [[] for _ in configs]
    for key in dict.fromkeys(key for conditions in found for key in conditions):
        values = [_comparable(conditions.get(key)) for conditions in found]
        if len({value for value, own in zip(values, found, strict=True) if key in own}) < 2:
            continue
        shown = _show([own[key] for own in found if key in own])
        for own, value in zip(words, values, strict=True):
            own.append(f"{key.rpartition('.')[2]} {shown.get(value, 'none')}")
    return [", ".join(own) for own in words]


def _conditions(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for section in SECTIONS:
        values: Any = config
        for key in section.split("."):
            values = values.get(key) if isinstance(values, dict) else None
        if isinstance(values, dict):
            found |= {f"{section}.{key}": value for key, value in values.items()}
    trainer = config.get("trainer")
    if isinstance(trainer, dict):
        found |= {f"trainer.{key}": trainer[key] for key in TRAINER if key in trainer}
    return {k: v for k, v in found.items() if k not in {*SECTIONS, *NAMED, *HARMLESS}}


def _comparable(value: Any) -> str | None:
    """Return a text that equal values have in common, whatever way YAML has of writing them."""
    if not value:
        return None
    if not isinstance(value, bool | dict | list):
        try:
            return repr(float(value)) if float(value) else None
        except (TypeError, ValueError, OverflowError):
            pass
    return json.dumps(value, sort_keys=True, default=str)


def _show(values: Iterable[Any]) -> dict[str | None, str]:
    """Return `_comparable` text -> how a value is shown; of paths no more than is needed."""
    first: dict[str | None, Any] = {}
    for value in values:
        first.setdefault(_comparable(value), value)
    paths = [value.replace("\\", "/").split("/") for value in first.values() if _is_text(value)]
    for parts in itertools.count(1):
        tails = {"/".join(path[-parts:]) for path in paths}
        if len(tails) == len(paths) or all(parts >= len(path) for path in paths):
            break
    return {key: _word(value, parts) for key, value in first.items()}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _word(value: Any, parts: int) -> str:
    """Return a value in words: of a path the last parts, of a class its name and arguments."""
    if isinstance(value, dict):
        named = {k: str(v).rpartition(".")[2] if k == "class_path" else v for k, v in value.items()}
        within = ("class_path", "init_args")
        words = [
            _word(v, parts) if k in within else f"{k} {_word(v, parts)}" for k, v in named.items()
        ]
        return " ".join(words) or "none"
    if isinstance(value, list):
        return " ".join(_word(item, parts) for item in value) or "none"
    if _is_text(value):
        return "/".join(value.replace("\\", "/").split("/")[-parts:])
    return "none" if value is None or value == "" else str(value)
