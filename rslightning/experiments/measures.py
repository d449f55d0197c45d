"""Numbers that figures and verdicts share, and the criteria by which words are used.

The criteria, in one place:

    unstable   a loss is infinite or NaN, or the mean training loss of 10 steps rises above its
               lowest value before by more than `RISE` of the first loss and `NOISE` times what
               one batch differs from the next
    learns     the training loss falls by at least `LEARNS` of what the reference's does
    gains nothing   from the lowest to the highest rank the final loss falls by less than `FLAT` of
               what was learned, or by what does not count
    counts     a difference is larger than `ERRORS` standard errors over the seeds; with one seed,
               larger than `ONE_SEED` of what was learned
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rslightning.experiments.groups import Cell, Study
from rslightning.experiments.runs import LAST, Run

RISE: Final = 0.1
"""A tenth of the loss that training starts from: what is lost then is no detail."""

NOISE: Final = 3.0
"""Times the standard deviation of one batch's loss; that of a mean of ten is a third of it, so that
the highest and the lowest of thousands of such means differ by less."""

LEARNS: Final = 0.1
"""Below a tenth of the reference's fall in loss nobody would call it learning."""

FLAT: Final = 0.1
"""A tenth of what was learned, over the whole range of ranks."""

ERRORS: Final = 2.0
"""Standard errors of the mean: about 95 % if the seeds' losses are normally distributed."""

ONE_SEED: Final = 0.05
"""Where there is no second seed, a difference counts from a twentieth of what was learned."""

CRITERIA: Final = f"""\
*What the words mean.* "Learned" is by how much the training loss fell: from the mean of the first
{LAST} steps, in the run of the same seed that learned least in them (all runs of a seed see the
same rows and begin as the same function), to the mean of the last {LAST}. A difference *counts* if
it is larger than {ERRORS:g} standard errors over the seeds (paired by seed), or, with one seed,
larger than {ONE_SEED:.0%} of what was learned. *Gains nothing*: from the lowest to the highest rank
the final loss falls by less than {FLAT:.0%} of what was learned, or by what does not count.
*Learns*: the training loss falls by at least {LEARNS:.0%} of what the reference's does. *Unstable*:
a loss is infinite or NaN, or the mean training loss of {LAST} steps rises above its lowest value
before by more than {RISE:.0%} of the first step's loss and more than {NOISE:g} standard deviations
of one batch's loss."""


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: Infinite if a run broke, NaN if runs on both sides of a difference did.
        error: Standard error; NaN with one seed.
        seeds: Number of seeds.
    """

    mean: float
    error: float
    seeds: int

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "unstable" if self.seeds else "nothing"
        error = f" ± {self.error:.4f}" if math.isfinite(self.error) else ""
        return f"{self.mean:.4f}{error}"


def estimate(values: Iterable[float]) -> Estimate:
    """Return mean and standard error of independent values, which may be infinite."""
    numbers = list(values)
    if not numbers:
        return Estimate(math.nan, math.nan, 0)
    mean = sum(numbers) / len(numbers)
    if not math.isfinite(mean) or len(numbers) == 1:
        return Estimate(mean, math.nan, len(numbers))
    return Estimate(mean, float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers)), len(numbers))


def loss_kind(study: Study) -> str:
    """Return the loss that decides: `held-out` if all runs that end have it, else `training`."""
    ended = [run for run in study.runs if run.counts and not run.broke]
    has_all = ended and all(math.isfinite(run.held_out_loss) for run in ended)
    return "held-out" if has_all else "training"


def loss_words(study: Study, kind: str) -> str:
    """Return what a final loss is called: `held-out loss (step 600 of 625)` if training went on.

    Nothing is said of the step where every run's last held-out loss is of its last step.
    """
    ended = [run for run in study.runs if run.counts and not run.broke]
    early = [found for run in ended if (found := _early_step(run)) is not None]
    if kind != "held-out" or not early:
        return f"{kind} loss"
    steps = " or ".join(f"{step} of {last}" for step, last in sorted(set(early)))
    some = f" in {len(early)} of {len(ended)} runs" if len(early) < len(ended) else ""
    return f"{kind} loss (step {steps}{some})"


def _early_step(run: Run) -> tuple[int, int] | None:
    """Return the steps of the last held-out and of the last training loss, if the first is less."""
    held_out, training = (run.curve(f"{part}/loss").steps for part in ("val", "train"))
    if not len(held_out) or not len(training) or held_out[-1] >= training[-1]:
        return None
    return int(held_out[-1]) + 1, int(training[-1]) + 1


def final_losses(study: Study, cell: Cell, kind: str) -> dict[int, float]:
    """Return the final loss of each seed of a cell, infinite where a run broke.

    Args:
        study: Where the cell is.
        cell: Which; one that is not there has no losses.
        kind: `held-out` or `training`.
    """
    runs = [run for run in study.cells.get(cell, []) if run.counts]
    return {seed_of(run, index): final_loss(run, kind) for index, run in enumerate(runs)}


def final_loss(run: Run, kind: str) -> float:
    """Return a run's final loss; infinite if it broke."""
    if run.broke:
        return math.inf
    return run.held_out_loss if kind == "held-out" else run.final_training_loss


def seed_of(run: Run, index: int) -> int:
    """Return a run's seed, or its place where it has none."""
    return index if run.seed is None else run.seed


def difference(left: Mapping[int, float], right: Mapping[int, float]) -> Estimate:
    """Return the mean of left - right: by pairs of equal seeds, where both have some in common.

    Runs of one seed share data order and draws, so that their difference is the steadier number.
    """
    if both := sorted(set(left) & set(right)):
        return estimate(left[seed] - right[seed] for seed in both)
    one, two = estimate(left.values()), estimate(right.values())
    if not one.seeds or not two.seeds:
        return Estimate(math.nan, math.nan, 0)
    return Estimate(
        one.mean - two.mean, math.hypot(one.error, two.error), min(one.seeds, two.seeds)
    )


def counts(found: Estimate, learned: float) -> bool:
    """Tell whether a difference is more than noise; see the module's docstring."""
    if not found.seeds or math.isnan(found.mean):
        return False
    if math.isfinite(found.error):
        return abs(found.mean) > ERRORS * found.error
    return abs(found.mean) > ONE_SEED * learned


def learned(runs: Sequence[Run], starts: Mapping[int, float]) -> float:
    """Return by how many nats the training loss fell, mean over runs that did not break.

    Args:
        runs: Of one cell.
        starts: The loss that each seed begins with, see `starting_losses`.
    """
    falls = [
        starts.get(seed_of(run, index), math.nan) - run.final_training_loss
        for index, run in enumerate(runs)
        if run.counts and not run.broke
    ]
    return float(np.mean(falls)) if falls else math.nan


def starting_losses(study: Study) -> dict[int, float]:
    """Return the training loss that each seed begins with.

    A first step is one batch. All runs of a seed see the same rows and begin as the same function,
    so that the mean of the first steps is nearest to that function's in the run that learns least.
    """
    starts: dict[int, float] = {}
    for runs in study.cells.values():
        for index, run in enumerate(runs):
            losses = run.curve("train/loss").values[:LAST]
            if run.counts and len(losses) and not is_unstable(run):
                seed = seed_of(run, index)
                starts[seed] = max(starts.get(seed, -math.inf), float(losses.mean()))
    return starts


def is_unstable(run: Run) -> bool:
    """Tell whether a run broke or its loss rose again; see the module's docstring."""
    if run.broke:
        return True
    values = run.curve("train/loss").values
    if len(values) < 2:
        return False
    noise = NOISE * batch_noise(values)
    means = np.append(values[0] + noise, window_means(values, LAST))  # the first step is one batch
    rise = (means - np.minimum.accumulate(means)).max()
    return bool(rise > max(RISE * abs(values[0]), noise))


def batch_noise(values: NDArray[np.float64]) -> float:
    """Return the standard deviation of one step's loss, from the median change between steps.

    A trend and single jumps hardly move it: for normal noise the median of |x - y| is 0.954 sigma.
    """
    return float(np.median(np.abs(np.diff(values)))) / 0.954


def window_means(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the means of all windows of `width` consecutive values; none if there are fewer."""
    if len(values) < width:
        return np.zeros(0)
    return np.lib.stride_tricks.sliding_window_view(values, width).mean(axis=-1)


def log_log_slope(ranks: Sequence[int], values: Sequence[float]) -> float:
    """Return the least-squares slope of log(value) over log(rank); NaN if it is not defined."""
    if len(set(ranks)) < 2 or not all(value > 0 and math.isfinite(value) for value in values):
        return math.nan
    x, y = np.log(np.array(ranks, np.float64)), np.log(np.array(values, np.float64))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / np.square(x).sum())


def mean_curve(runs: Sequence[Run], tag: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the mean over runs of a curve, at the steps that all of them have."""
    curves = [run.curve(tag) for run in runs]
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return np.zeros(0, np.int64), np.zeros(0)
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps, assume_unique=True)
    rows = [curve.values[np.searchsorted(curve.steps, steps)] for curve in curves]
    return steps, np.mean(rows, axis=0)


def drawable(runs: Sequence[Run]) -> list[Run]:
    """Return the runs of a cell that curves are drawn of: those that ended, else all."""
    return [run for run in runs if run.counts] or list(runs)


def same_seeds(groups: Sequence[Sequence[Run]]) -> list[list[Run]]:
    """Return of each group the runs whose seeds all groups have; where there are none, all runs.

    Runs of one seed see the same batches, so that what differs between such groups is not theirs.
    """
    seeds = [{run.seed for run in group} for group in groups if group]
    shared = set.intersection(*seeds) if seeds else set()
    return [[run for run in group if not shared or run.seed in shared] for group in groups]
