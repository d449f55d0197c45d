"""A run that goes on: its structure stays, and of the rest what is changed counts.

A checkpoint restores the options of optimizer and schedule along with their state, so that a rate
given on the command line would silently be that of the checkpoint. What an option was when the run
began is therefore kept; where it is another one now, the new one holds. The rest, as a rate that a
schedule has moved, is the checkpoint's.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch.optim import Optimizer

from rslightning.errors import UserError

STRUCTURE: Final = (
    "rank",
    "alpha",
    "scaling",
    "targets",
    "rank_pattern",
    "alpha_pattern",
    "allocation",
)
"""Fields of an adapter that decide which tensors there are and what they compute."""

PARTS: Final = "_schedulers"
"""Where torch's composed schedules have those that they are made of."""

RATE, INITIAL_RATE = "lr", "initial_lr"  # the latter is there where a schedule moves the former


def plain_settings(optimizer: Any, scheduler: Any | None) -> dict[str, Any]:
    """Return the options of both in plain values, as they are before the first step."""
    groups = [_plain({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    return {"optimizer": groups, "scheduler": _of_scheduler(scheduler) if scheduler else {}}


def keep_changes(
    begun: Mapping[str, Any], now: Mapping[str, Any], optimizer: Optimizer, scheduler: Any | None
) -> list[str]:
    """Put options that differ from those of the run's begin into what a checkpoint has restored.

    Args:
        begun: `plain_settings` of the run that goes on, when it began.
        now: Those of this run, before the checkpoint was restored.
        optimizer: As restored; changed in place.
        scheduler: As restored, if there is one; changed in place.

    Returns:
        A sentence for each option that differs.
    """
    said: dict[str, None] = {}
    for group, old, new in zip(
        optimizer.param_groups, begun["optimizer"], now["optimizer"], strict=False
    ):
        for name, value in new.items():
            if name not in old or old[name] == value:
                group.setdefault(name, value)
                continue
            if name == RATE:  # a schedule may have moved it
                group[name] = group[name] * (value / old[name]) if old[name] else value
            else:
                group[name] = value
            if name != RATE or INITIAL_RATE not in new:
                told = RATE if name == INITIAL_RATE else name
                said[f"{told} is {value}, and was {old[name]}"] = None
    if scheduler is not None:
        said |= dict.fromkeys(_keep_in_schedule(begun["scheduler"], now["scheduler"], scheduler))
    return list(said)


def _keep_in_schedule(
    begun: Mapping[str, Any], now: Mapping[str, Any], scheduler: Any
) -> Iterator[str]:
    for name, value in now.items():
        if name == PARTS:
            parts = zip(begun.get(PARTS, ()), value, getattr(scheduler, PARTS), strict=False)
            for old, new, part in parts:
                yield from _keep_in_schedule(old, new, part)
        elif name in begun and begun[name] != value:
            setattr(scheduler, name, type(getattr(scheduler, name))(value))
            if name != "base_lrs":  # those that the optimizer's rate gives
                yield f"{name} is {value}, and was {begun[name]}"


def _of_scheduler(scheduler: Any) -> dict[str, Any]:
    """Return the plain attributes of a schedule and of its parts, but for those that count."""
    settings = _plain(
        {k: v for k, v in vars(scheduler).items() if not k.startswith("_") and k != "last_epoch"}
    )
    if parts := getattr(scheduler, PARTS, None):
        settings[PARTS] = [_of_scheduler(part) for part in parts]
    return settings


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) for name, value in values.items() if _is_plain(value)}


def _copy(value: Any) -> Any:
    """Return a value in the types that a checkpoint opens with; `milestones` are a `Counter`."""
    if isinstance(value, Mapping):
        return {name: _copy(inner) for name, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def refuse_other_structure(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `UserError` if a checkpoint is of another structure than the run.

    Args:
        saved: Hyperparameters of the checkpoint; what it does not say is not compared.
        own: Those of the run.
    """
    found = _structure(saved)
    for name, value in _structure(own).items():
        if name in found and found[name] != value:
            raise UserError(
                f"The checkpoint has {name} {found[name]!r}, this run {value!r}; "
                "set it to the checkpoint's, or start a new run."
            )


def short_name(base_model: str) -> str:
    """Return what is left of a base model's name where its folder moves: the last segment."""
    return Path(base_model.removeprefix("asset:")).name


def _structure(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint and a run must have in common."""
    structure: dict[str, Any] = {}
    if "base_model" in hparams:
        structure["base_model"] = short_name(hparams["base_model"])
    structure["quantization"] = hparams.get("quantization")
    adapter = hparams.get("adapter")
    structure["method"] = "full fine-tuning" if adapter is None else "adapters"
    if adapter is None:
        return structure
    return structure | {f"adapter.{name}": adapter[name] for name in STRUCTURE if name in adapter}
