"""`rslightning report`: figures, tables and verdicts from run folders.

The same runs give the same bytes: nothing of the report depends on the clock or on where it is.
"""

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from rslightning.errors import UserError
from rslightning.experiments.claims import CLAIMS, check_claim, decide
from rslightning.experiments.figures import check_figures, draw, require_matplotlib
from rslightning.experiments.groups import Study, find_studies
from rslightning.experiments.measures import CRITERIA, is_unstable
from rslightning.experiments.palette import method_name
from rslightning.experiments.runs import Run
from rslightning.storage import new_folder

FILE: Final = "report.md"
MARK: Final = "<!-- written by rslightning report; the next report in this folder replaces it -->"


def run(arguments: argparse.Namespace) -> None:
    """Carry out `rslightning report RUN_FOLDER... --output DIR`."""
    folder = write_report(arguments.folders, arguments.output)
    print((folder / FILE).read_text(encoding="utf-8"), end="")
    print(f"\nThe report is {folder / FILE}")


def write_report(folders: Sequence[str], output: str | Path) -> Path:
    """Write the report of the runs in `folders` to the folder `output`; return it.

    The folder exists whole or not at all; one that a report wrote before is replaced.

    Args:
        folders: Sweeps, run folders, or folders of them.
        output: Where to write: `report.md`, and for each study a folder of figures.

    Raises:
        UserError: If there is no run or nothing to draw, a figure or claim is not known, matplotlib
            is not installed, or `output` is something that no report wrote.
        RunError: If the file system refuses.
    """
    path = Path(output)
    _refuse_other_folders(path)
    require_matplotlib()
    studies = find_studies(folders)
    for study in studies:
        _check(study)
    with new_folder(path, replace=True) as aside:
        parts = [_write_study(study, aside) for study in studies]
        if not any(drawn for _, drawn in parts):
            raise UserError(
                f"There is nothing to draw in {', '.join(folders)}: no curve was found."
            )
        text = "\n\n".join([MARK, "# Report", *(text for text, _ in parts), CRITERIA])
        (aside / FILE).write_text(f"{text}\n", encoding="utf-8")
    return path


def _refuse_other_folders(path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    written = path / FILE
    if not written.is_file() or not written.read_text(encoding="utf-8").startswith(MARK):
        raise UserError(f"{path} exists and no report wrote it; choose another --output.")


def _check(study: Study) -> None:
    check_figures(study.name, study.figures)
    for claim in study.claims:
        check_claim(claim)


def _write_study(study: Study, folder: Path) -> tuple[str, bool]:
    """Write a study's figures; return its chapter and whether there is any figure."""
    figures = list(_write_figures(study, folder))
    drawn = (folder / study.name).exists()
    parts = [f"## {study.title}", f"Setting: {_setting(study)}.", *_repeated(study)]
    if study.claims:
        parts += ["### Verdicts", *_waiting(study), _verdicts(study)]
    if figures:
        parts += ["### Figures", *figures]
    if incomplete := list(_incomplete(study)):
        parts += ["### Failed and unfinished cells", "\n".join(incomplete)]
    parts += ["### Cells", _cells(study)]
    return "\n\n".join(parts), drawn


def _setting(study: Study) -> str:
    from rslightning.experiments.canvas import describe

    return describe(study)


def _write_figures(study: Study, folder: Path) -> Iterator[str]:
    from rslightning.experiments.canvas import drawing_settings, save

    for name, kind in study.figures.items():
        with drawing_settings():
            drawing = draw(study, kind)
            if drawing is None:
                yield f"*{name}* ({kind}): no run of this study wrote what it shows."
                continue
            place = folder / study.name
            place.mkdir(exist_ok=True, parents=True)
            save(drawing, place, name)
        path = f"{study.name}/{name}"
        yield (
            f"![{name}]({path}.png)\n\n*{name}* ({kind}; [SVG]({path}.svg), "
            f"[numbers]({path}.csv)): {drawing.caption}"
        )


def _repeated(study: Study) -> Iterator[str]:
    if study.repeated:
        names = ", ".join(f"`{name}`" for name in study.repeated)
        yield (
            f"Method, rank, learning rate and seed are those of another run in {names}: each is "
            "shown by itself, and no verdict rests on it."
        )


def _waiting(study: Study) -> Iterator[str]:
    count = len(study.absent) + sum(not run.counts for run in study.runs)
    if count:
        cells = "1 cell has" if count == 1 else f"{count} cells have"
        yield f"{cells} not ended or failed by accident; the verdicts rest on the others."


def _verdicts(study: Study) -> str:
    rows = []
    for name in study.claims:
        claim, verdict = CLAIMS[name], decide(name, study)
        statement = f"`{name}`: {claim.statement} ({claim.source})"
        rows.append((statement, f"**{verdict.verdict}**", verdict.numbers))
    criteria = [f"- `{name}` is reproduced if {CLAIMS[name].criterion}." for name in study.claims]
    return "\n\n".join((_table(("claim", "verdict", "numbers"), rows), "\n".join(criteria)))


def _incomplete(study: Study) -> Iterator[str]:
    """Yield a line for each cell that did not finish."""
    for run in study.runs:
        if run.state == "finished":
            continue
        steps = run.curve("train/loss").steps
        reached = f"after step {steps[-1]}" if len(steps) else "before its first step"
        why = f": {_reason(run.message)}" if run.message else ""
        effect = " It counts as unstable." if run.broke else ""
        yield f"- `{run.name}` {run.state} {reached}{why}.{effect}".replace("..", ".")
    for name in study.absent:
        yield f"- `{name}` not started."


def _reason(message: str) -> str:
    """Return the first sentence of a message; of absolute paths in it the last part."""
    sentence = message.partition(". ")[0]
    return re.sub(r"(?<![\w.])/(?:[^\s/]+/)+", "", sentence)


def _cells(study: Study) -> str:
    header = (
        "cell", "method", "rank", "alpha", "gamma", "learning rate", "seed",
        "final training loss", "held-out loss", "state",
    )  # fmt: skip
    return _table(header, [_row(run) for run in study.runs])


def _row(run: Run) -> tuple[str, ...]:
    state = f"{run.state}, unstable" if is_unstable(run) else run.state
    numbers = (run.rank, run.alpha, run.gamma, run.learning_rate, run.seed)
    losses = (run.final_training_loss, run.held_out_loss)
    return (
        f"`{run.name or '.'}`",
        method_name(run.method),
        *("" if number is None else f"{number:.4g}" for number in numbers),
        *("" if math.isnan(loss) and not run.broke else f"{loss:.4f}" for loss in losses),
        state,
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(text: Any) -> str:
    return str(text).replace("|", r"\|").replace("\n", " ")
