"""The kinds of figures by name, and one way to draw them."""

import difflib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rslightning.errors import UserError
from rslightning.experiments.groups import Study

if TYPE_CHECKING:
    from rslightning.experiments.canvas import Drawing

KINDS: Final = {
    "perplexity": "curves",
    "gradient_norms": "curves",
    "moments": "curves",
    "held_out": "bars",
    "rates": "bars",
    "best_rank": "bars",
    "budget": "bars",
}
"""Kind -> module below this package that draws it, in `draw_<kind>`."""


def check_kind(kind: str) -> None:
    """Raise `UserError` unless `kind` is one of the kinds of figures."""
    if str(kind) not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(KINDS)}."
        raise UserError(f"There is no kind of figure {kind!r}; {hint}")


def check_figures(where: str, figures: Mapping[Any, Any]) -> None:
    """Raise `UserError` unless `figures` maps file names to kinds of figures.

    Args:
        where: What they are of, in words.
        figures: File name -> kind.
    """
    for name, kind in figures.items():
        if Path(str(name)).name != str(name):
            raise UserError(f"{where}: {name!r} is no file name for a figure.")
        check_kind(kind)


def require_matplotlib() -> None:
    """Raise `UserError` if figures cannot be drawn."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "Figures need matplotlib, which is not installed: pip install 'rslightning[figures]'."
        )


def draw(study: Study, kind: str) -> "Drawing | None":
    """Return a figure of a study; null if its runs wrote nothing that it shows.

    Raises:
        UserError: If there is no such kind of figure, or no matplotlib.
    """
    from importlib import import_module

    check_kind(kind)
    require_matplotlib()
    module = import_module(f"rslightning.experiments.{KINDS[kind]}")
    painter: Callable[[Study], Drawing | None] = getattr(module, f"draw_{kind}")
    return painter(study)
