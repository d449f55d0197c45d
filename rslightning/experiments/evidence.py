"""What verdicts ask of a study: losses by method and rank at one rate, or at each cell's best."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from rslightning.experiments.groups import Cell, Study
from rslightning.experiments.measures import (
    Estimate,
    estimate,
    final_losses,
    is_unstable,
    learned,
    loss_kind,
    loss_words,
    same_seeds,
    starting_losses,
)
from rslightning.experiments.runs import Run

Losses = dict[int, float]  # seed -> final loss
ByRank = dict[int, Losses]

REPRODUCED: Final = "reproduced"
NOT_REPRODUCED: Final = "not reproduced"
CONFOUNDED: Final = "confounded"
NOT_SHOWN: Final = "not shown"


class Verdict(NamedTuple):
    """What the runs say about a claim.

    Attributes:
        verdict: `reproduced`, `not reproduced`, `confounded` (something else explains it as well)
            or `not shown` (the runs for it are not there, or broke where they are compared).
        numbers: One or two sentences with the numbers.
    """

    verdict: str
    numbers: str


@dataclass(frozen=True)
class Evidence:
    """A study, asked in the terms of the claims."""

    study: Study

    @cached_property
    def kind(self) -> str:
        """Which loss decides: `held-out` or `training`."""
        return loss_kind(self.study)

    @cached_property
    def loss(self) -> str:
        """What that loss is called, for a sentence."""
        return loss_words(self.study, self.kind)

    @cached_property
    def rate(self) -> float | None:
        """The untuned rate, one for all.

        The sweep's own `rate`; else the one at which most cells of LoRA and rsLoRA have ended, and
        among several the best of rsLoRA at its highest rank. That favours rsLoRA, as a rate does at
        which its figures look best: what tuning leaves of its lead is then told from the most.
        """
        if self.study.rate is not None:
            return self.study.rate
        ended = [cell for cell in self.study.cells if cell.rate is not None and self.losses(cell)]
        both = [cell for cell in ended if cell.method in ("lora", "rslora")] or ended
        if not both:
            return None
        anchor = both[-1]  # rsLoRA's highest rank: cells are sorted
        rates = [cell.rate for cell in both if cell.rate is not None]

        def key(rate: float) -> tuple[int, float, float]:
            return (-rates.count(rate), _mean(self.losses(anchor._replace(rate=rate))), rate)

        return min(set(rates), key=key)

    def losses(self, cell: Cell) -> Losses:
        """Return the final loss of each seed of a cell; none if nothing of it has ended."""
        found = final_losses(self.study, cell, self.kind)
        return {seed: loss for seed, loss in found.items() if not math.isnan(loss)}

    def untuned(self, method: str) -> ByRank:
        """Return the losses of a method by rank, at the untuned rate."""
        ranks = {cell.rank for cell in self.study.cells if cell.method == method and cell.rank}
        found = {rank: self.losses(Cell(method, rank, self.rate)) for rank in sorted(ranks)}
        return {rank: losses for rank, losses in found.items() if losses}

    def tuned(self, method: str) -> dict[int, tuple[float, Losses]]:
        """Return the best rate and its losses, for each rank of a method that has several rates."""
        best: dict[int, tuple[float, Losses]] = {}
        for rank, rates in self.rates(method).items():
            if len(rates) > 1:
                rate = min(rates, key=lambda rate: (_mean(rates[rate]), rate))
                best[rank] = rate, rates[rate]
        return best

    def rates(self, method: str) -> dict[int, dict[float, Losses]]:
        """Return rank -> rate -> losses, of a method's cells that have ended."""
        found: dict[int, dict[float, Losses]] = {}
        for cell in self.study.cells:
            losses = self.losses(cell) if cell.method == method else {}
            if losses and cell.rank is not None and cell.rate is not None:
                found.setdefault(cell.rank, {})[cell.rate] = losses
        return {rank: found[rank] for rank in sorted(found)}

    def runs(self, method: str, rank: int) -> list[Run]:
        """Return the runs at the untuned rate that say something."""
        runs = self.study.cells.get(Cell(method, rank, self.rate), [])
        return [run for run in runs if run.counts]

    def paired(self, method: str, ranks: Sequence[int] = ()) -> dict[int, list[Run]]:
        """Return the runs of a method by rank at the untuned rate, of seeds that all ranks have.

        Args:
            method: Whose.
            ranks: Those that are meant; none: all.
        """
        ranks = ranks or list(self.untuned(method))
        return dict(zip(ranks, same_seeds([self.runs(method, r) for r in ranks]), strict=True))

    @cached_property
    def starts(self) -> dict[int, float]:
        """The training loss that each seed begins with."""
        return starting_losses(self.study)

    def learned(self, method: str, rank: int) -> float:
        """Return by how many nats the training loss fell, at the untuned rate."""
        return learned(self.runs(method, rank), self.starts)

    def rates_tried(self, method: str, rank: int) -> dict[float, bool]:
        """Return rate -> whether more than half of a cell's runs are unstable."""
        cells = [c for c in self.study.cells if (c.method, c.rank) == (method, rank)]
        runs = {c.rate: [r for r in self.study.cells[c] if r.counts] for c in cells}
        tried = sorted(rate for rate in runs if rate is not None and runs[rate])
        return {rate: 2 * sum(map(is_unstable, runs[rate])) > len(runs[rate]) for rate in tried}

    def breaks_first(self, method: str, rank: int) -> list[float]:
        """Return the rates at which a method is unstable, and rsLoRA's runs there are not."""
        rslora = self.rates_tried("rslora", rank)
        found = self.rates_tried(method, rank)
        return [rate for rate, breaks in found.items() if breaks and rslora.get(rate) is False]

    def breaks_alone(self, method: str, rank: int) -> list[float]:
        """Return the rates at which a method is unstable, and no run of rsLoRA has ended."""
        rslora = self.rates_tried("rslora", rank)
        found = self.rates_tried(method, rank)
        return [rate for rate, breaks in found.items() if breaks and rate not in rslora]

    @property
    def seeds(self) -> str:
        """How many seeds the cells have, for a sentence."""
        found = [sum(run.counts for run in runs) for runs in self.study.cells.values()]
        fewest, most = min(filter(None, found), default=0), max(found, default=0)
        if fewest != most:
            return f"{fewest} to {most} seeds"
        return "one seed" if most == 1 else f"{most} seeds"

    @property
    def at_rate(self) -> str:
        """The untuned rate, for a sentence."""
        return "" if self.rate is None else f" at learning rate {self.rate:g}"


def ends(found: Iterable[int]) -> tuple[int, int]:
    """Return the lowest and the highest rank."""
    ranks = sorted(found)
    return ranks[0], ranks[-1]


def common(*methods: Mapping[int, object]) -> list[int]:
    """Return the ranks that all have."""
    ranks = set(methods[0]).intersection(*methods[1:])
    return sorted(ranks)


def list_losses(name: str, found: Mapping[int, Losses]) -> str:
    """Return `LoRA r=4 2.91, r=64 2.90 ± 0.01`."""
    values = [f"r={rank} {estimate(losses.values())}" for rank, losses in found.items()]
    return f"{name} {', '.join(values)}"


def signed(found: Estimate) -> str:
    """Return a difference with its sign and error, for a sentence."""
    if not math.isfinite(found.mean):
        return "not finite"
    error = f" ± {found.error:.4f}" if math.isfinite(found.error) else ""
    return f"{found.mean:+.4f}{error}"


def missing(what: str) -> Verdict:
    """Return the verdict that nothing can be said, with what is missing."""
    return Verdict(NOT_SHOWN, f"The runs for it are not there: it takes {what}.")


def undecided(numbers: str, why: str) -> Verdict:
    """Return the verdict that the runs do not decide, with what they show and the reason."""
    return Verdict(NOT_SHOWN, f"{numbers}. Undecided: {why}.")


def _mean(losses: Losses) -> float:
    mean = estimate(losses.values()).mean
    return math.inf if math.isnan(mean) else mean
