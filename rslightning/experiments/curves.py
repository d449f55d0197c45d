"""Figures over the optimizer step: perplexity, gradient norms, moments."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rslightning.experiments.canvas import Drawing, height_for, legend_beside, log_axis, new_sheet
from rslightning.experiments.evidence import Evidence
from rslightning.experiments.groups import Cell, Study
from rslightning.experiments.measures import drawable, mean_curve, same_seeds
from rslightning.experiments.palette import cell_name, look, method_look
from rslightning.experiments.runs import Run

CURVE_HEADER: Final = ("method", "rank", "learning_rate", "seeds", "step")
SMOOTHED_FROM: Final = 40
"""Curves of fewer points are drawn as they are."""

POINTS_PER_WINDOW: Final = 25
"""A running mean spans this share of a curve."""

MOMENTS: Final = (
    ("activation/first_moment", "E[y] of the adapted layers' outputs", "output's unit"),
    ("activation/second_moment", "E[y²] of the adapted layers' outputs", "output's unit, squared"),
    ("adapter_output/first_moment", "E[z] of the adapters' own outputs", "output's unit"),
    (
        "adapter_output/second_moment",
        "E[z²] of the adapters' own outputs",
        "output's unit, squared",
    ),
)


class Line(NamedTuple):
    """A cell's curve: the mean over its seeds.

    Attributes:
        cell: Which.
        seeds: How many runs.
        steps: [n].
        values: As they were read, [n].
        smooth: Their running mean, [n].
        broke: Whether a run of it broke: the curve ends where it did.
    """

    cell: Cell
    seeds: int
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    smooth: NDArray[np.float64]
    broke: bool


def draw_perplexity(study: Study) -> Drawing | None:
    """Draw training perplexity over the step; null if no run wrote it."""
    lines = read_lines(study, "train/perplexity")
    if not lines:
        return None
    figure = _new_sheet(study, "Training perplexity", lines)
    axes = figure.add_subplot()
    for line in lines:
        raw = look(line.cell, shown_cells(study)).color
        if _window(lines) > 1:
            axes.plot(line.steps, line.values, color=raw, alpha=0.18, linewidth=0.6)
    top = _perplexity_ceiling(lines)
    _plot(axes, lines, study, top)
    log_axis(axes.yaxis, [min(value, top) for value in _finite(lines)])
    axes.set_ylim(top=top)
    axes.set(xlabel="optimizer step", ylabel="perplexity, exp(nats per target token)")
    legend_beside(figure, [axes])
    caption = f"Perplexity of the training batches{_at(study)}{_seeds(lines)}{_smoothing(lines)}."
    return Drawing(figure, (*CURVE_HEADER, "perplexity", "running_mean"), _rows(lines), caption)


def draw_gradient_norms(study: Study) -> Drawing | None:
    """Draw the mean gradient norm over the step, with each method's range over its ranks."""
    lines = read_lines(study, "grad_norm/mean")
    if not lines:
        return None
    figure = _new_sheet(study, "Average parameter gradient norm", lines)
    axes = figure.add_subplot()
    for method, group in itertools.groupby(lines, key=lambda line: line.cell.method):
        own = list(group)
        if len({line.cell.rank for line in own}) > 1:
            steps, low, high = _range(own)
            color = method_look(method).color
            axes.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0)
    _plot(axes, lines, study)
    log_axis(axes.yaxis, _finite(lines))
    axes.set(xlabel="optimizer step", ylabel="gradient norm, nats per unit of a weight")
    legend_beside(figure, [axes])
    caption = (
        "Mean over the adapter tensors (under full fine-tuning: over all trained tensors) of the "
        f"gradient's L2 norm, before clipping{_at(study)}{_seeds(lines)}{_smoothing(lines)}. "
        "Shaded: from the lowest to the highest of a method's curves."
    )
    return Drawing(figure, (*CURVE_HEADER, "gradient_norm", "running_mean"), _rows(lines), caption)


def draw_moments(study: Study) -> Drawing | None:
    """Draw first and second moments of the adapted layers' and the adapters' outputs."""
    panels = [(tag, title, unit, read_lines(study, tag)) for tag, title, unit in MOMENTS]
    if not any(lines for *_, lines in panels):
        return None
    figure = new_sheet(study, "Moments of the adapted layers", 10.5, 6.6, shown_cells(study))
    grid = figure.subplots(2, 2, sharex=True)
    rows: list[tuple[Any, ...]] = []
    for axes, (tag, title, unit, lines) in zip(grid.flat, panels, strict=True):
        _plot(axes, lines, study)
        axes.set(title=title, ylabel=unit)
        if tag.endswith("second_moment") and any(value > 0 for value in _finite(lines)):
            log_axis(axes.yaxis, _finite(lines))
        rows += [(tag, *row) for row in _rows(lines)]
    for axes in grid[1]:
        axes.set_xlabel("optimizer step")
    legend_beside(figure, grid.flat)
    every = [line for *_, lines in panels for line in lines]
    caption = (
        "Mean over the adapted layers of the moments of y = W x + gamma B A x (above) and of "
        f"z = gamma B A x alone (below), padding left out{_at(study)}{_seeds(every)}"
        f"{_smoothing(every)}."
    )
    return Drawing(figure, ("tag", *CURVE_HEADER, "moment", "running_mean"), rows, caption)


def read_lines(study: Study, tag: str) -> list[Line]:
    """Return the curves of a tag, one for each cell that has it, in the order of the cells.

    All are means over the same seeds, where there are any that all cells have.
    """
    found = {cell: _runs_with(study, cell, tag) for cell in shown_cells(study)}
    found = {cell: runs for cell, runs in found.items() if runs}
    lines = []
    for cell, runs in zip(found, same_seeds(list(found.values())), strict=True):
        steps, values = mean_curve(runs, tag)
        if len(steps):
            broke = any(run.broke for run in runs)
            lines.append(Line(cell, len(runs), steps, values, running_mean(values), broke))
    return lines


def _runs_with(study: Study, cell: Cell, tag: str) -> list[Run]:
    return [run for run in drawable(study.cells[cell]) if len(run.curve(tag).steps)]


def shown_cells(study: Study) -> list[Cell]:
    """Return the cells whose curves are drawn.

    Where a method has several ranks and several rates, only one rate for all is: the untuned one.
    """
    rate = Evidence(study).rate
    cells = list(study.cells)
    crowded = [
        method
        for method in {cell.method for cell in cells}
        if len({cell.rank for cell in cells if cell.method == method}) > 1
        and len({cell.rate for cell in cells if cell.method == method}) > 1
    ]
    if not crowded:
        return cells
    return [cell for cell in cells if cell.rate == rate] or cells


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centred running mean of a long curve; at its ends over what is there."""
    weights = np.ones(window(len(values)))
    sums = np.convolve(values, weights, "same")
    return sums / np.convolve(np.ones_like(values), weights, "same")


def window(points: int) -> int:
    """Return the odd number of points of the running mean of a curve."""
    return 1 if points < SMOOTHED_FROM else 2 * (points // POINTS_PER_WINDOW // 2) + 1


def _new_sheet(study: Study, subject: str, lines: Sequence[Line]) -> Any:
    return new_sheet(study, subject, 9.2, height_for(len(lines)), shown_cells(study))


def _perplexity_ceiling(lines: Sequence[Line]) -> float:
    """Return where the figure ends above: what diverges leaves it."""
    firsts = [float(line.values[0]) for line in lines if np.isfinite(line.values[0])]
    highest = [float(np.nanmax(line.values)) for line in lines]
    return min(2 * max(firsts, default=1.0), 1.05 * max(highest))


def _plot(axes: Any, lines: Sequence[Line], study: Study, top: float = math.inf) -> None:
    cells = shown_cells(study)
    for index, line in enumerate(lines):
        style = look(line.cell, cells)
        every = max(1, len(line.steps) // 5)
        axes.plot(
            line.steps,
            line.smooth,
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker,
            fillstyle=style.fillstyle,
            markevery=(index * every // max(1, len(lines)), every),
            linewidth=1.5,
            label=cell_name(line.cell, cells) + (" (broke)" if line.broke else ""),
        )
        if line.broke and (ends := np.flatnonzero(np.isfinite(line.smooth))).size:
            step, last = line.steps[ends[-1]], min(line.smooth[ends[-1]], top)
            cross = {"markersize": 9, "markeredgewidth": 2, "clip_on": False}
            axes.plot(step, last, "x", color=style.color, **cross)


def _range(lines: Sequence[Line]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the steps of the longest curve and the lowest and highest value at each."""
    steps = max((line.steps for line in lines), key=len)
    found = np.full((len(lines), len(steps)), np.nan)
    for row, line in zip(found, lines, strict=True):
        _, here, there = np.intersect1d(steps, line.steps, return_indices=True)
        row[here] = line.smooth[there]
    found[~np.isfinite(found)] = np.nan
    some = ~np.isnan(found).all(axis=0)
    return steps[some], np.nanmin(found[:, some], axis=0), np.nanmax(found[:, some], axis=0)


def _rows(lines: Sequence[Line]) -> list[tuple[Any, ...]]:
    return [
        (line.cell.method, line.cell.rank, line.cell.rate, line.seeds, int(step), value, smooth)
        for line in lines
        for step, value, smooth in zip(
            line.steps, line.values.tolist(), line.smooth.tolist(), strict=True
        )
    ]


def _at(study: Study) -> str:
    """Name the rate in a caption, where the curves of others are left out."""
    left_out = len(shown_cells(study)) < len(study.cells)
    return f" at learning rate {Evidence(study).rate:g}" if left_out else ""


def _seeds(lines: Sequence[Line]) -> str:
    """Say of how many seeds the curves are means."""
    counts = sorted({line.seeds for line in lines})
    if counts == [1]:
        return ", of one seed"
    return f", mean over {' to '.join(map(str, {counts[0]: 0, counts[-1]: 0}))} seeds"


def _finite(lines: Sequence[Line]) -> list[float]:
    return [value for line in lines for value in line.smooth.tolist() if np.isfinite(value)]


def _window(lines: Sequence[Line]) -> int:
    return max((window(len(line.steps)) for line in lines), default=1)


def _smoothing(lines: Sequence[Line]) -> str:
    width = _window(lines)
    return f", as a running mean over {width} points" if width > 1 else ""
