"""What all figures share: sheet, titles, legends, and files that are the same bytes each time."""

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from rslightning.experiments.groups import Cell, Study

INK: Final = "#22272e"
SETTINGS: Final[dict[Any, Any]] = {
    "svg.hashsalt": "rslightning",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.markersize": 4.2,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
DOTS_PER_INCH: Final = 160
TITLE_SIZE: Final = 12
CHARACTERS: Final = 15
"""Of the subtitle per inch."""

ROWS: Final = 24
"""Of a legend's column."""


@dataclass(frozen=True)
class Drawing:
    """A figure with the numbers that it shows.

    Attributes:
        figure: The sheet.
        header: Names of the columns.
        rows: The numbers, sorted.
        caption: One or two sentences: what is drawn, and how.
    """

    figure: Figure
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    caption: str


@contextmanager
def drawing_settings() -> Iterator[None]:
    """Draw by our settings alone, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def new_sheet(
    study: Study, subject: str, width: float, height: float, cells: Sequence[Cell] | None = None
) -> Figure:
    """Return an empty figure with its title: the subject, and below it the setting of `cells`."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    lines = textwrap.wrap(describe(study, cells), int(width * CHARACTERS))
    # The title's empty lines keep the place of the subtitle, which is of another size.
    title = subject + "\n" * len(lines)
    figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE_SIZE, fontweight="bold")
    below = 1 - (0.05 + 1.4 * TITLE_SIZE / 72) / height
    subtitle = figure.text(0.01, below, "\n".join(lines), va="top", fontsize=8.5, color="#57606a")
    subtitle.set_in_layout(False)
    return figure


def describe(study: Study, cells: Sequence[Cell] | None = None) -> str:
    """Return the setting in words: model, data, optimizer, batch, steps, rates and seeds.

    Args:
        study: Whose.
        cells: Those that are meant; null: all.
    """
    chosen = list(study.cells) if cells is None else cells
    rates = sorted({cell.rate for cell in chosen if cell.rate is not None})
    words = [str(study.setting)]
    if len(rates) == 1:
        words.append(f"learning rate {short_rate(rates[0])}")
    elif rates:
        words.append(f"learning rates {short_rate(rates[0])} to {short_rate(rates[-1])}")
    seeds = ", ".join(map(str, study.seeds))
    words.append(f"seed{'s' if len(study.seeds) > 1 else ''} {seeds}" if seeds else "")
    return "; ".join(word for word in words if word)


def legend_beside(figure: Figure, panels: Sequence[Any]) -> None:
    """Set one legend for all panels to their right, where it covers nothing."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        columns = 1 + len(found) // ROWS
        place: Any = "outside right center"
        figure.legend(list(found.values()), list(found), loc=place, ncols=columns, handlelength=3.2)


def height_for(entries: int) -> float:
    """Return the inches of a sheet whose legend has so many entries."""
    return max(5.0, 0.9 + 0.2 * min(entries, ROWS))


def log_axis(axis: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with plain numbers at ticks that are few and not too few."""
    name = axis.axis_name
    getattr(axis.axes, f"set_{name}scale")("log", nonpositive="mask")
    positive = [value for value in values if value > 0]
    ratio = max(positive) / min(positive) if positive else 1.0
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    if ratio < 300:
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if ratio < 8 else (1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())


def plain(value: float) -> str:
    """Return a tick's number in full where it is short: `0.0005`, `200,000`, `1e-07`."""
    if value >= 1000:
        return f"{value:,.0f}" if value < 1e7 else f"{value:.0e}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if value >= 1e-4 else f"{value:.0e}"


def rank_axis(axes: Any, ranks: Sequence[int]) -> None:
    """Make the x-axis logarithmic with one tick at each rank."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(ranks))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("rank r")


def rate_axis(axes: Any, rates: Sequence[float]) -> None:
    """Make the x-axis logarithmic with one tick at each rate, slanted where they are many."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(rates))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_rate(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=45 if len(set(rates)) > 3 else 0)
    axes.set_xlabel("learning rate")


def save(drawing: Drawing, folder: Path, name: str) -> None:
    """Write `name`.png, `name`.svg and `name`.csv; the same drawing gives the same bytes."""
    figure = drawing.figure
    # The canvases are called themselves: `savefig` draws everything twice.
    FigureCanvasAgg(figure).print_png(folder / f"{name}.png", metadata={"Software": None})
    figure.set_layout_engine("none")  # the places are found
    canvas = FigureCanvasSVG(figure)
    canvas.print_svg(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    (folder / f"{name}.csv").write_text(to_csv(drawing), encoding="utf-8")


def to_csv(drawing: Drawing) -> str:
    """Return the numbers as CSV: nine digits, all that 32-bit events hold."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(drawing.header)
    writer.writerows([_cell(value) for value in row] for row in drawing.rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def short_rate(rate: float) -> str:
    """Return `5e-4` for 0.0005: of one width, whatever its size."""
    digits, _, power = f"{rate:e}".partition("e")
    return f"{float(digits):g}e{int(power)}"
