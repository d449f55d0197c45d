"""A sweep file: a base recipe, what all cells change of it, and the grids that they span.

    name: figure2
    base: [recipes/llama2_openorca.yaml]
    options: {merge_adapters: null}               # a fragment over the base, for all cells
    grids:                                        # each is a product; the cells are those of all
      - {scaling: [lora, rslora], rank: [4, 512]}
      - {adapter: [null], rate: [1.0e-5, 5.0e-5]}
    figures: {figure2: perplexity}                # what `rslightning report` draws of it
    claims: [rank_gains]

Everything that no axis names is the same in all cells: seed, order of the rows, and the draw of A,
whose entries at rank r are the first r rows of those at any higher rank.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from rslightning.errors import UserError
from rslightning.plain_yaml import read_plain_yaml

AXES: Final[dict[str, tuple[str, ...]]] = {
    "model": ("model.base_model",),
    "data": ("data",),
    "optimizer": ("model.optimizer",),
    "rate": ("model.optimizer.init_args.lr",),
    "adapter": ("model.adapter",),
    "targets": ("model.adapter.targets",),
    "init": ("model.adapter.init",),
    "scaling": ("model.adapter.scaling",),
    "alpha": ("model.adapter.alpha",),
    "rank": ("model.adapter.rank",),
    "seed": ("seed_everything", "data.init_args.seed"),
}
"""Short name of an axis -> the keys that it sets; a class stands before its arguments."""

FULL_FINE_TUNING: Final = "full"


@dataclass(frozen=True)
class Cell:
    """One fit of a sweep.

    Attributes:
        name: Name of its folder, made of its values.
        values: Axis -> value.
    """

    name: str
    values: dict[str, Any]

    def arguments(self) -> list[str]:
        """Return the options that make a fit this cell's."""
        return [
            word
            for axis, value in self.values.items()
            for key in AXES.get(axis, (axis,))
            for word in (f"--{key}", _text(value))
        ]


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says; see this module's docstring.

    Args:
        name: Name of the sweep and of its folder.
        base: Recipes and fragments, as after `--config`.
        grids: Each maps axes to the values that they take: a short name of `AXES`, or any key of
            the recipe.
        options: A fragment over the base, the same for all cells.
        figures: File name -> kind of figure.
        claims: Names of the claims that the report judges.
        title: Heading of the report.
        rate: The learning rate that the report calls untuned, where cells have several; None lets
            it choose.
        slurm: Options of the jobs, where SLURM runs them: partition, time, gpus_per_node, ...
    """

    name: str
    base: list[str]
    grids: list[dict[str, list[Any]]]
    options: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    claims: list[str] = field(default_factory=list)
    title: str = ""
    rate: float | None = None
    slurm: dict[str, Any] = field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """Return the cells of all grids, in their order; one that two grids name is there once.

        Raises:
            UserError: If two cells of different values would get the same name.
        """
        cells: dict[str, Cell] = {}
        for cell in self._products():
            same = cells.setdefault(cell.name, cell)
            if same.values != cell.values:
                raise UserError(
                    f"Two cells of sweep {self.name} are called {cell.name}: {same.values} and "
                    f"{cell.values}; leave one out."
                )
        return list(cells.values())

    def _products(self) -> Iterator[Cell]:
        for grid in self.grids:
            # Classes before their arguments, whatever the order in the file.
            order = [*AXES]
            axes = sorted(grid, key=lambda axis: order.index(axis) if axis in AXES else -1)
            for values in itertools.product(*(grid[axis] for axis in axes)):
                named = dict(zip(axes, values, strict=True))
                shown = {axis: named[axis] for axis in grid}
                yield Cell("_".join(_label(axis, value) for axis, value in shown.items()), named)


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: If it is not YAML, misses a key or has one that is not known, or an axis has no
            list of values.
    """
    content = read_plain_yaml(path)
    if not isinstance(content, dict) or "grids" not in content:
        raise UserError(
            f"{path} has no key `grids`, so it is no sweep: run a recipe with `rslightning fit`."
        )
    known = [f.name for f in fields(Sweep)]
    if unknown := [key for key in content if key not in known]:
        raise UserError(
            f"{path}: there is no key {unknown[0]} in a sweep, only {', '.join(known)}."
        )
    sweep = Sweep(**{"name": path.stem, "base": [], **content})
    _check(path, sweep)
    return sweep


def _check(path: Path, sweep: Sweep) -> None:
    kinds = {"base": list, "grids": list, "options": dict, "figures": dict, "claims": list}
    for name, kind in {**kinds, "slurm": dict}.items():
        if not isinstance(getattr(sweep, name), kind):
            word = "a list" if kind is list else "a mapping"
            raise UserError(f"{path}: {name} is {word}, got {getattr(sweep, name)!r}.")
    if not sweep.base:
        raise UserError(f"{path}: base is empty; name a recipe, as [recipes/llama_gsm8k.yaml].")
    if not re.fullmatch(r"[\w.+-]+", str(sweep.name)) or str(sweep.name).startswith("."):
        raise UserError(
            f"{path}: name {sweep.name!r} cannot be a folder's; use letters and digits."
        )
    try:
        float(0.0 if sweep.rate is None else sweep.rate)
    except (TypeError, ValueError):
        raise UserError(f"{path}: rate must be a number, got {sweep.rate!r}.") from None
    if not sweep.grids:
        raise UserError(f"{path}: grids is empty; give it one, as [{{rank: [4, 64]}}].")
    for grid in sweep.grids:
        for axis, values in (grid if isinstance(grid, dict) else {str(grid): None}).items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{path}: axis {axis} takes a list of values, got {values!r}.")


def _label(axis: str, value: Any) -> str:
    """Return the part of a cell's name that a value makes."""
    if value is None:
        return FULL_FINE_TUNING if axis == "adapter" else f"no-{_last(axis)}"
    if isinstance(value, Mapping):
        return str(value.get("class_path") or _short(value)).rpartition(".")[2].lower()
    if isinstance(value, bool | int | float):
        return f"{_last(axis)}{value}"
    if isinstance(value, str):
        number = f"{_last(axis)}" if _is_number(value) else ""
        return number + re.sub(r"[^\w.+-]+", "-", value.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.+-]+", "-", f"{_last(axis)}-{_short(value)}").strip("-")


def _short(value: Any) -> str:
    return "-".join(map(str, value.values() if isinstance(value, Mapping) else value))


def _last(axis: str) -> str:
    return axis.rpartition(".")[2]


def _is_number(text: str) -> bool:
    """Tell whether YAML 1.1 took a number for text, as it does `5e-5`."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text(value: Any) -> str:
    """Write a value as the command line reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def describe_cells(cells: Sequence[Cell]) -> str:
    """Return how many cells there are, and which values they take."""
    values: dict[str, list[Any]] = {}
    for cell in cells:
        for axis, value in cell.values.items():
            seen = values.setdefault(axis, [])
            if value not in seen:
                seen.append(value)
    spans = "; ".join(f"{axis} {', '.join(map(_label_alone, of))}" for axis, of in values.items())
    return f"{len(cells)} cells: {spans}"


def _label_alone(value: Any) -> str:
    return _label("", value) if value is not None else "none"
