"""Colours, line styles and markers: copper for LoRA, blue to green for rsLoRA, brighter with rank.

Lightness follows the rank and the line style follows the method, so that a figure can be read in
grey print and without colour vision.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from rslightning.experiments.groups import Cell

RAMPS: Final = {
    "lora": ("#3a1a0c", "#b1662f", "#f2b685"),
    "rslora": ("#0b1f5c", "#12869a", "#86dd8e"),
    "quarter_root": ("#33104d", "#8a49b0", "#d9a8ee"),
    "inverse_square": ("#5a0826", "#bd3e68", "#f4a3b8"),
    "unit": ("#3a3a06", "#8c8a1d", "#d8d27a"),
    "adalora": ("#6b2a02", "#e07b1a", "#fbcf8f"),
    "adalora-rslora": ("#04343b", "#2a9d8f", "#a5e3d2"),
    "full": ("#000000", "#000000", "#000000"),
}
OTHER: Final = ("#1f2933", "#616e7c", "#b8c2cc")

DASHES: Final = {
    "lora": (0, (4, 2)),
    "rslora": "-",
    "quarter_root": (0, (6, 2, 1, 2)),
    "inverse_square": (0, (1, 1.5)),
    "unit": (0, (5, 1.5, 1, 1.5, 1, 1.5)),
    "adalora": (0, (2, 1)),
    "adalora-rslora": (0, (8, 2)),
    "full": "-",
}
MARKERS: Final = {
    "lora": "o",
    "rslora": "s",
    "quarter_root": "^",
    "inverse_square": "v",
    "unit": "D",
    "adalora": "P",
    "adalora-rslora": "X",
    "full": "*",
}
NAMES: Final = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "quarter_root": r"$\alpha/r^{1/4}$",
    "inverse_square": r"$\alpha/r^2$",
    "unit": r"$\alpha$",
    "adalora": "AdaLoRA",
    "adalora-rslora": "rsLoRA-scaled AdaLoRA",
    "full": "full fine-tuning",
}


class Look(NamedTuple):
    """How a line is drawn."""

    color: str
    linestyle: object
    marker: str
    fillstyle: str


def look(cell: Cell, cells: Sequence[Cell]) -> Look:
    """Return how `cell` is drawn: the brighter, the higher its rank (or rate) among `cells`."""
    family, variant = _family(cell.method)
    place, last = _place(cell, cells)
    color = _between(RAMPS.get(family, OTHER), place / last if last else 0.5)
    fill = "none" if variant else "full"
    return Look(color, DASHES.get(family, (0, (3, 1, 1, 1))), MARKERS.get(family, "h"), fill)


def method_look(method: str) -> Look:
    """Return how a method is drawn where its ranks are not told apart by colour."""
    cell = Cell(method, None, None)
    return look(cell, [cell])


def method_name(method: str) -> str:
    """Return a method's name for people: `LoRA, rank_corrected`."""
    family, variant = _family(method)
    words = NAMES.get(family, family)
    return f"{words}, {variant.replace('_', '-')}" if variant else words


def cell_name(cell: Cell, cells: Sequence[Cell]) -> str:
    """Return a cell's name for a legend; its rate only where its method has several."""
    name = method_name(cell.method)
    if cell.rank is not None:
        name += f", r = {cell.rank}"
    rates = {other.rate for other in cells if other.method == cell.method}
    if len(rates) > 1 and cell.rate is not None:
        name += f", {cell.rate:g}"
    return name


def _family(method: str) -> tuple[str, str]:
    """Return a method's family and what tells it from the family's first."""
    name, _, alpha = method.partition(", ")
    family, _, init = name.partition("/")
    return family, ", ".join(part for part in (init and f"{init} init", alpha) if part)


def _place(cell: Cell, cells: Sequence[Cell]) -> tuple[int, int]:
    """Return the cell's place among its method's shades, and the last place."""
    own = [other for other in cells if other.method == cell.method]
    by_rank = len({other.rank for other in own}) > 1
    shades = sorted({(other.rank if by_rank else other.rate) or 0 for other in own})
    return shades.index((cell.rank if by_rank else cell.rate) or 0), len(shades) - 1


def _between(ramp: Sequence[str], share: float) -> str:
    """Return the colour at `share` (0 to 1) of the way through a ramp."""
    position = share * (len(ramp) - 1)
    index = min(int(position), len(ramp) - 2)
    left, right = _channels(ramp[index]), _channels(ramp[index + 1])
    mixed = [a + (b - a) * (position - index) for a, b in zip(left, right, strict=True)]
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def _channels(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]
