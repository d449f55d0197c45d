"""Figures of final losses: per cell, over the rate, over the rank, over the budget."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from rslightning.experiments.canvas import (
    Drawing,
    legend_beside,
    log_axis,
    new_sheet,
    rank_axis,
    rate_axis,
    short_rate,
)
from rslightning.experiments.groups import Cell, Study
from rslightning.experiments.measures import (
    Estimate,
    estimate,
    final_losses,
    loss_kind,
    loss_words,
    starting_losses,
)
from rslightning.experiments.palette import cell_name, look, method_look, method_name
from rslightning.experiments.runs import Run

CELL_HEADER: Final = ("method", "rank", "learning_rate")
ESTIMATE_HEADER: Final = ("seeds", "mean_loss", "standard_error")
ERRORS: Final = "error bars are one standard error over the seeds"


class Point(NamedTuple):
    """The final loss of a cell."""

    cell: Cell
    loss: Estimate
    seeds: dict[int, float]

    @property
    def row(self) -> tuple[Any, ...]:
        """Its line of a CSV file."""
        return (*self.cell, self.loss.seeds, self.loss.mean, self.loss.error)


def points(study: Study, kind: str) -> list[Point]:
    """Return the final losses of all cells that have one, in the order of the cells."""
    found = [(cell, final_losses(study, cell, kind)) for cell in study.cells]
    own = [Point(cell, estimate(seeds.values()), seeds) for cell, seeds in found]
    return [point for point in own if point.loss.seeds and not math.isnan(point.loss.mean)]


def best_points(found: Iterable[Point]) -> list[Point]:
    """Return for each method and rank the point of the rate with the lowest mean loss."""
    best: dict[tuple[str, int | None], Point] = {}
    for point in found:
        key = (point.cell.method, point.cell.rank)
        if key not in best or point.loss.mean < best[key].loss.mean:
            best[key] = point
    return sorted(best.values(), key=lambda point: point.cell.order)


def draw_held_out(study: Study) -> Drawing | None:
    """Draw the final loss of each cell, with its seeds; null if no cell has ended."""
    kind = loss_kind(study)
    found = points(study, kind)
    if not found:
        return None
    cells = list(study.cells)
    figure = new_sheet(study, f"Final {kind} loss", 8, 1.8 + 0.27 * len(found))
    axes = figure.add_subplot()
    top = _ceiling(study, found)
    for place, point in enumerate(found):
        style = look(point.cell, cells)
        if not point.loss.mean < top:
            _write_at_edge(axes, top, place, point, style.color)
            continue
        seeds = list(point.seeds.values())
        axes.plot(seeds, [place] * len(seeds), "|", color=style.color, alpha=0.6, markersize=9)
        _error_bar(axes, point.loss.mean, place, "x", point.loss, style)
    axes.set_xlim(right=top)
    axes.set_yticks(range(len(found)), [cell_name(point.cell, cells) for point in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(f"{kind} loss, nats per target token")
    caption = (
        f"Final {loss_words(study, kind)} of each cell; {ERRORS}, thin strokes the seeds. Arrows: "
        "at or above the loss that all begin with, or not finite."
    )
    return Drawing(figure, (*CELL_HEADER, *ESTIMATE_HEADER), [p.row for p in found], caption)


def draw_rates(study: Study) -> Drawing | None:
    """Draw the final loss over the learning rate, a panel for each method."""
    kind = loss_kind(study)
    found = [point for point in points(study, kind) if point.cell.rate is not None]
    if not found:
        return None
    methods = list(dict.fromkeys(point.cell.method for point in found))
    figure = new_sheet(
        study, f"Final {kind} loss over the learning rate", 2.6 + 2.6 * len(methods), 4.4
    )
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    top = _ceiling(study, found)
    for axes, method in zip(panels, methods, strict=True):
        own = [point for point in found if point.cell.method == method]
        _draw_rate_panel(axes, own, list(study.cells), top)
        axes.set_title(method_name(method))
    # After the last panel: they share the axis, and a limit ends its scaling.
    panels[0].set_ylim(top=top)
    panels[0].set_ylabel(f"{kind} loss, nats per target token")
    legend_beside(figure, panels)
    caption = (
        f"Final {loss_words(study, kind)} over the learning rate; {ERRORS}, rings the best rate of "
        "each curve. Arrows: at or above the loss that all begin with, or not finite."
    )
    return Drawing(figure, (*CELL_HEADER, *ESTIMATE_HEADER), [p.row for p in found], caption)


def draw_best_rank(study: Study) -> Drawing | None:
    """Draw the loss at the best rate over the rank; full fine-tuning is a band."""
    kind = loss_kind(study)
    best = [point for point in best_points(points(study, kind)) if math.isfinite(point.loss.mean)]
    ranked = [point for point in best if point.cell.rank is not None]
    if not ranked:
        return None
    figure = new_sheet(study, f"Final {kind} loss at the best learning rate", 8.4, 4.8)
    axes = figure.add_subplot()
    _draw_methods(axes, ranked, lambda point: point.cell.rank or 0)
    for rank in {point.cell.rank for point in ranked}:
        _write_rates(axes, [point for point in ranked if point.cell.rank == rank])
    for point in best:
        if point.cell.rank is None:
            _draw_band(axes, point)
    rank_axis(axes, [point.cell.rank or 0 for point in ranked])
    axes.margins(x=0.1, y=0.12)
    axes.set_ylabel(f"{kind} loss, nats per target token")
    legend_beside(figure, [axes])
    caption = (
        f"Lowest mean {loss_words(study, kind)} over the learning rates; {ERRORS}; the chosen rate "
        "stands beside each point."
    )
    return Drawing(figure, (*CELL_HEADER, *ESTIMATE_HEADER), [p.row for p in best], caption)


def draw_budget(study: Study) -> Drawing | None:
    """Draw the loss at the best rate over the budget of parameters."""
    kind = loss_kind(study)
    best = [point for point in best_points(points(study, kind)) if math.isfinite(point.loss.mean)]
    budgets = {point.cell: budget(study.cells[point.cell][0]) for point in best}
    found = [point for point in best if budgets[point.cell]]
    if not found:
        return None
    figure = new_sheet(study, f"Final {kind} loss over the budget", 8.4, 4.8)
    axes = figure.add_subplot()
    _draw_methods(axes, found, lambda point: budgets[point.cell] or 0)
    log_axis(axes.xaxis, [budgets[point.cell] or 1 for point in found])
    axes.set(xlabel="parameters kept", ylabel=f"{kind} loss, nats per target token")
    legend_beside(figure, [axes])
    caption = (
        f"Final {loss_words(study, kind)} (at the best rate, where there are several) over the "
        f"number of parameters that are trained or, under AdaLoRA, kept at the end; {ERRORS}."
    )
    rows = [(*p.row[:3], budgets[p.cell], *p.row[3:]) for p in found]
    header = (*CELL_HEADER, "parameters", *ESTIMATE_HEADER)
    return Drawing(figure, header, rows, caption)


def budget(run: Run) -> int | None:
    """Return how many parameters a run trains or, under a falling budget, keeps at the end.

    An allocation keeps `target_rank` of `rank` on average, and each rank costs the same.
    """
    trained = run.trained_parameters
    target = ((run.adapter or {}).get("allocation") or {}).get("target_rank")
    if trained is None or not target or not run.rank:
        return trained
    kept, begun_with = float(target), run.rank
    return round(trained * kept / begun_with)


def _draw_methods(axes: Any, found: Sequence[Point], x: Callable[[Point], float]) -> None:
    """Draw one line with error bars for each method."""
    for method, group in itertools.groupby(found, key=lambda point: point.cell.method):
        own = sorted(group, key=x)
        style = method_look(method)
        axes.errorbar(
            [x(point) for point in own],
            [point.loss.mean for point in own],
            yerr=[_error(point.loss) for point in own],
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker,
            fillstyle=style.fillstyle,
            capsize=2.5,
            label=method_name(method),
        )


def _draw_rate_panel(axes: Any, found: Sequence[Point], cells: Sequence[Cell], top: float) -> None:
    for _, group in itertools.groupby(found, key=lambda point: point.cell.rank):
        own = list(group)
        style = look(own[0].cell._replace(rate=None), [c._replace(rate=None) for c in cells])
        inside = [point for point in own if point.loss.mean < top]
        axes.errorbar(
            [point.cell.rate for point in inside],
            [point.loss.mean for point in inside],
            yerr=[_error(point.loss) for point in inside],
            color=style.color,
            linestyle=style.linestyle,
            marker=style.marker,
            fillstyle=style.fillstyle,
            capsize=2,
            label=cell_name(own[0].cell._replace(rate=None), []),
        )
        above = [point.cell.rate for point in own if not point.loss.mean < top]
        if above:  # an unclipped line without points would have no place in the layout
            axes.plot(above, [top] * len(above), "^", color=style.color, clip_on=False)
        if inside:
            best = min(inside, key=lambda point: point.loss.mean)
            ring = {"fillstyle": "none", "color": style.color, "markersize": 10}
            axes.plot(best.cell.rate, best.loss.mean, "o", **ring)
    rate_axis(axes, [point.cell.rate or 0 for point in found])


def _ceiling(study: Study, found: Sequence[Point]) -> float:
    """Return the loss from which on nothing was learned: that which all runs begin with."""
    starts = starting_losses(study).values()
    finite = [point.loss.mean for point in found if math.isfinite(point.loss.mean)]
    highest = max(finite, default=1.0) * 1.02
    return min(sum(starts) / len(starts), highest) if starts else highest


def _draw_band(axes: Any, point: Point) -> None:
    style = method_look(point.cell.method)
    half = _error(point.loss)
    axes.axhspan(point.loss.mean - half, point.loss.mean + half, color="#8c959f", alpha=0.3, lw=0)
    rate = "" if point.cell.rate is None else f" ({short_rate(point.cell.rate)})"
    name = method_name(point.cell.method) + rate
    axes.axhline(point.loss.mean, color=style.color, linewidth=1.2, label=name)


def _write_rates(axes: Any, found: Sequence[Point]) -> None:
    """Write the rates of one rank: over the highest point, under the lowest, beside the others."""
    ordered = sorted(found, key=lambda point: point.loss.mean)
    for place, point in enumerate(ordered):
        if point.cell.rate is None:
            continue
        side = 1 if place == len(ordered) - 1 else -1 if place == 0 else 0
        axes.annotate(
            short_rate(point.cell.rate),
            (point.cell.rank, point.loss.mean + side * _error(point.loss)),
            xytext=(0 if side else 8, 5 * side),
            textcoords="offset points",
            ha="center" if side else "left",
            va={1: "bottom", 0: "center", -1: "top"}[side],
            fontsize=8,
            color=method_look(point.cell.method).color,
        )


def _error_bar(axes: Any, x: float, y: float, along: str, loss: Estimate, style: Any) -> None:
    axes.errorbar(
        x,
        y,
        **{f"{along}err": _error(loss)},
        color=style.color,
        marker=style.marker,
        fillstyle=style.fillstyle,
        capsize=3,
    )


def _write_at_edge(axes: Any, top: float, place: int, point: Point, color: str) -> None:
    """Draw an arrow for a loss that is beyond the axis, with its number."""
    axes.plot(top, place, ">", color=color, clip_on=False)
    finite = math.isfinite(point.loss.mean)
    words = f"{point.loss.mean:.2f} " if finite else "the loss was not finite "
    axes.annotate(
        words, (top, place), xytext=(-6, 0), textcoords="offset points", ha="right", va="center"
    )


def _error(loss: Estimate) -> float:
    return loss.error if math.isfinite(loss.error) else 0.0
