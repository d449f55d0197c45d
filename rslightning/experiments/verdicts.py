"""What the runs of a study say about each claim: nothing here is decided ahead.

`measures` defines the words; the thresholds that only verdicts use stand here.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from rslightning.experiments.evidence import (
    CONFOUNDED,
    NOT_REPRODUCED,
    REPRODUCED,
    ByRank,
    Evidence,
    Losses,
    Verdict,
    common,
    ends,
    list_losses,
    missing,
    signed,
    undecided,
)
from rslightning.experiments.measures import (
    FLAT,
    LEARNS,
    Estimate,
    counts,
    difference,
    estimate,
    log_log_slope,
    mean_curve,
)

SLOPE_TOLERANCE: Final = 0.03
"""How far a slope of the first step may be from theory: a factor of 1.1 over ranks 4 to 128."""

ORDER_OF_MAGNITUDE: Final = 10.0
ABOUT: Final = 2.0
"""`About` a ratio: within this factor. Also the bound on moments that are called stable."""

SHARE: Final = 0.25
"""LoRA gains from rank if it gains this share of what rsLoRA does; a rate closes part of a gap if
it closes this share."""

HALF: Final = 0.5
"""With less than this share of the untuned gap left, the learning rate explains most of it."""


def rank_gains(evidence: Evidence) -> Verdict:
    """Judge whether rsLoRA, and rsLoRA alone, gains from a higher rank."""
    lora, rslora = evidence.untuned("lora"), evidence.untuned("rslora")
    ranks = common(lora, rslora)
    if len(ranks) < 2:
        return missing("LoRA and rsLoRA at two ranks or more, at one learning rate")
    low, high = ends(ranks)
    gain, other = difference(rslora[low], rslora[high]), difference(lora[low], lora[high])
    lead = difference(lora[high], rslora[high])
    learned = evidence.learned("rslora", low)
    rises = _rises(rslora, ranks, learned)
    falls = gain.mean > 0 and counts(gain, learned) and not rises
    flat = not counts(other, learned) or other.mean < SHARE * gain.mean
    numbers = (
        f"{evidence.loss.capitalize()}{evidence.at_rate}: {list_losses('rslora', rslora)}; "
        f"{list_losses('lora', lora)}. From rank {low} to {high} rslora gains {signed(gain)} and "
        f"lora {signed(other)}; rslora leads by {signed(lead)} at rank {high} ({evidence.seeds})"
        f"{'; rslora rises at rank ' + ', '.join(map(str, rises)) if rises else ''}"
    )
    if falls and flat and (math.isinf(gain.mean) or math.isnan(other.mean)):
        return undecided(numbers, f"training broke at rank {low}, so that no gain can be measured")
    return Verdict(REPRODUCED if falls and flat else NOT_REPRODUCED, f"{numbers}.")


def _rises(found: ByRank, ranks: list[int], learned: float) -> list[int]:
    """Return the ranks at which the loss is higher than at the rank before, beyond noise."""
    pairs = itertools.pairwise(ranks)
    steps = [(rank, difference(found[rank], found[before])) for before, rank in pairs]
    return [rank for rank, step in steps if step.mean > 0 and counts(step, learned)]


def gradient_norms(evidence: Evidence) -> Verdict:
    """Judge the slopes of the first step and the spread over the ranks through training."""
    ranks = common(evidence.untuned("lora"), evidence.untuned("rslora"))
    slopes = {method: _first_slope(evidence, method) for method in ("lora", "rslora")}
    spreads = {method: _norm_spread(evidence, method, ranks) for method in ("lora", "rslora")}
    if any(map(math.isnan, slopes.values())) or not all(len(s) for s in spreads.values()):
        return missing("grad_norm/mean of LoRA and rsLoRA at two ranks or more that both have")
    low, high = ends(ranks)
    expected, usual = math.sqrt(high / low), float(np.median(spreads["lora"]))
    widest = float(np.max(spreads["rslora"]))
    theory = {"lora": -0.5, "rslora": 0.0}
    holds = (
        all(abs(slopes[name] - theory[name]) < SLOPE_TOLERANCE for name in theory),
        widest < ORDER_OF_MAGNITUDE,
        1 / ABOUT < usual / expected < ABOUT,
    )
    return Verdict(
        REPRODUCED if all(holds) else NOT_REPRODUCED,
        f"Slope of log gradient norm over log rank at the first step: lora {slopes['lora']:+.3f} "
        f"(theory -0.5), rslora {slopes['rslora']:+.3f} (theory 0). Highest over lowest norm among "
        f"ranks {low} to {high}{evidence.at_rate}: rslora at most {widest:.1f} after the first "
        f"step; lora {usual:.1f} in the median over training, theory at the first step "
        f"{expected:.1f} ({evidence.seeds}).",
    )


def _first_slope(evidence: Evidence, method: str) -> float:
    return _slope(evidence, method, "grad_norm/mean", 0)


def _slope(evidence: Evidence, method: str, tag: str, place: int) -> float:
    """Return the slope over the rank of a curve's value at a place; NaN if a rank has no curve."""
    curves = {rank: mean_curve(runs, tag)[1] for rank, runs in evidence.paired(method).items()}
    values = [float(curve[place]) if len(curve) else math.nan for curve in curves.values()]
    return log_log_slope(list(curves), values)


def _norm_spread(evidence: Evidence, method: str, ranks: Sequence[int]) -> np.ndarray:
    """Return the highest over the lowest norm among `ranks`, at each step after the first."""
    return _spread(evidence, method, "grad_norm/mean", ranks)[1:] if ranks else np.zeros(0)


def _spread(evidence: Evidence, method: str, tag: str, ranks: Sequence[int] = ()) -> np.ndarray:
    """Return the highest over the lowest value among the ranks at each step that all have."""
    curves = [mean_curve(runs, tag) for runs in evidence.paired(method, ranks).values()]
    if len(curves) < 2:
        return np.zeros(0)
    steps = curves[0][0]
    for others, _ in curves[1:]:
        steps = np.intersect1d(steps, others)
    rows = np.array([values[np.isin(own, steps)] for own, values in curves])
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = rows.max(axis=0) / rows.min(axis=0)
    return np.where(np.isfinite(spread), spread, np.inf)


def other_scalings(evidence: Evidence) -> Verdict:
    """Judge whether a larger factor is unstable and a smaller one does not learn."""
    large, small = evidence.untuned("quarter_root"), evidence.untuned("inverse_square")
    rslora = evidence.untuned("rslora")
    if not large or not small or not common(small, rslora):
        return missing("quarter_root, inverse_square and rslora at a high rank")
    high, rank = max(large), max(common(small, rslora))
    reference, learned = (evidence.learned(name, rank) for name in ("rslora", "inverse_square"))
    numbers = (
        f"quarter_root at rank {high} {_where_unstable(evidence, 'quarter_root', high)}; "
        f"{evidence.at_rate.strip()}: {_beside(evidence, 'quarter_root', high)}. inverse_square at "
        f"rank {rank}{evidence.at_rate}: the training loss falls by {learned:.4f}, rslora's by "
        f"{reference:.4f} ({evidence.seeds})"
    )
    if math.isnan(reference):
        return undecided(numbers, f"rslora broke at rank {rank}{evidence.at_rate}")
    return _judge_breaking(
        evidence, "quarter_root", high, numbers, rest=learned < LEARNS * reference
    )


def _judge_breaking(
    evidence: Evidence, method: str, rank: int, numbers: str, rest: bool
) -> Verdict:
    """Judge whether a method is unstable where rsLoRA is not, and the rest of the claim holds."""
    broken, alone = (f(method, rank) for f in (evidence.breaks_first, evidence.breaks_alone))
    if rest and alone and not broken:
        rates = ", ".join(f"{rate:g}" for rate in alone)
        why = f"no run of rslora at rank {rank} has ended at learning rate {rates}"
        return undecided(numbers, why)
    return Verdict(REPRODUCED if broken and rest else NOT_REPRODUCED, f"{numbers}.")


def _where_unstable(evidence: Evidence, method: str, rank: int) -> str:
    """Return at which of the rates that were tried a method is unstable, and rsLoRA is."""

    def listed(name: str) -> str:
        tried = evidence.rates_tried(name, rank)
        broken = ", ".join(f"{rate:g}" for rate, breaks in tried.items() if breaks) or "none"
        return f"{broken} of {', '.join(f'{rate:g}' for rate in tried) or 'none that were tried'}"

    return f"is unstable at learning rates {listed(method)}, rslora at {listed('rslora')}"


def _beside(evidence: Evidence, method: str, rank: int) -> str:
    """Return a method's loss beside rsLoRA's at the same rank."""
    own, rslora = evidence.untuned(method).get(rank), evidence.untuned("rslora").get(rank)
    words = f"{evidence.loss} {estimate((own or {}).values())}"
    return f"{words}, rslora {estimate(rslora.values())}" if rslora else words


def initialization(evidence: Evidence) -> Verdict:
    """Judge what scaling A at initialization does in place of the factor."""
    unit, lora = "unit/rank_corrected", "lora/rank_corrected"
    large, small = evidence.untuned(unit), evidence.untuned(lora)
    if not large or len(small) < 2:
        return missing("unit at a high rank and lora at two, both with init: rank_corrected")
    high = max(large)
    low, top = ends(small)
    gain, learned = difference(small[low], small[top]), evidence.learned(lora, low)
    numbers = (
        f"With A scaled by 1/sqrt(r) at initialization, unit at rank {high} "
        f"{_where_unstable(evidence, unit, high)}; {evidence.at_rate.strip()}: "
        f"{_beside(evidence, unit, high)}. {list_losses('lora', small)}: from rank {low} to {top} "
        f"it gains {signed(gain)} of {learned:.4f} that it learns ({evidence.seeds})"
    )
    return _judge_breaking(evidence, unit, high, numbers, rest=_gains_nothing(gain, learned))


def _gains_nothing(gain: Estimate, learned: float) -> bool:
    return math.isfinite(gain.mean) and (gain.mean < FLAT * learned or not counts(gain, learned))


def moments(evidence: Evidence) -> Verdict:
    """Judge whether the outputs of the adapted layers stay in size."""
    tag = "activation/second_moment"
    spreads = {name: _spread(evidence, name, tag) for name in ("lora", "rslora")}
    if not all(len(spread) for spread in spreads.values()):
        return missing(f"{tag} of LoRA and rsLoRA at two ranks or more")
    widest = {name: float(spread.max()) for name, spread in spreads.items()}
    change = max(_change(evidence, "rslora", rank, tag) for rank in evidence.untuned("rslora"))
    slopes = {name: _slope(evidence, name, "adapter_output/second_moment", -1) for name in spreads}
    return Verdict(
        REPRODUCED if max(widest["rslora"], change) < ABOUT else NOT_REPRODUCED,
        f"Second moment of the adapted layers' outputs{evidence.at_rate}: highest over lowest "
        f"among the ranks at most {widest['rslora']:.2f} for rslora and {widest['lora']:.2f} for "
        f"lora; under rslora it changes in training by at most a factor of {change:.2f}. The "
        f"adapters' own output ends with a second moment of slope {slopes['rslora']:+.2f} over the "
        f"rank under rslora, {slopes['lora']:+.2f} under lora ({evidence.seeds}).",
    )


def _change(evidence: Evidence, method: str, rank: int, tag: str) -> float:
    """Return the highest over the lowest value that a mean curve takes."""
    _, values = mean_curve(evidence.runs(method, rank), tag)
    change = float(values.max() / values.min()) if len(values) and values.min() > 0 else math.inf
    return change if math.isfinite(change) else math.inf


def learning_rate(evidence: Evidence) -> Verdict:
    """Judge whether a rate brings LoRA at its lowest rank to rsLoRA at its highest."""
    rates, rslora = evidence.rates("lora"), evidence.untuned("rslora")
    if not rates or len(rates[min(rates)]) < 2 or not rslora:
        return missing("LoRA at its lowest rank and several rates, and rsLoRA at its own rate")
    low, high = min(rates), max(rslora)
    if evidence.rate not in rates[low]:
        return missing(f"LoRA at rank {low}{evidence.at_rate}, rsLoRA's own")
    own, best, rate = rates[low][evidence.rate], *_best(rates[low])
    before, after = difference(own, rslora[high]), difference(best, rslora[high])
    learned = evidence.learned("rslora", high)
    numbers = (
        f"{evidence.loss.capitalize()} of rslora at rank {high}{evidence.at_rate}: "
        f"{estimate(rslora[high].values())}; lora at rank {low} is behind by {signed(before)} at "
        f"that rate and by {signed(after)} at its best of {len(rates[low])} rates, {rate:g}"
        f"{_edge(rate, rates[low])} ({evidence.seeds})"
    )
    if not (before.mean > 0 and counts(before, learned)):
        return Verdict(NOT_REPRODUCED, f"{numbers}: there is no gap to close.")
    reached = not (after.mean > 0 and counts(after, learned))
    if not reached and math.isinf(before.mean):
        why = f"lora broke at rank {low}{evidence.at_rate}, so that the gap has no size"
        return undecided(numbers, why)
    closed = 1 - after.mean / before.mean
    verdict = CONFOUNDED if reached or closed >= SHARE else REPRODUCED
    how = "it reaches it" if reached else "it does not reach it"
    return Verdict(verdict, f"{numbers}: the rate closes {closed:.0%} of the gap; {how}.")


def _best(rates: dict[float, Losses]) -> tuple[Losses, float]:
    rate = min(rates, key=lambda rate: (estimate(rates[rate].values()).mean, rate))
    return rates[rate], rate


def _edge(rate: float, rates: dict[float, Losses]) -> str:
    """Say so where the best rate is the last one that was tried."""
    return ", at the edge of those tried" if rate in (min(rates), max(rates)) else ""


def tuned(evidence: Evidence) -> Verdict:
    """Judge what is left of rsLoRA's lead when every method and rank has its best rate."""
    tuned = {name: evidence.tuned(name) for name in ("lora", "rslora")}
    untuned = {name: evidence.untuned(name) for name in ("lora", "rslora")}
    ranks = common(*tuned.values(), *untuned.values())
    if len(ranks) < 2:
        return missing("LoRA and rsLoRA at two ranks or more and several rates each")
    low, high = ends(ranks)
    best = {name: {r: tuned[name][r][1] for r in ranks} for name in tuned}
    before = difference(untuned["lora"][high], untuned["rslora"][high])
    lead = difference(best["lora"][high], best["rslora"][high])
    gains = {name: difference(best[name][low], best[name][high]) for name in best}
    first = difference(untuned["rslora"][low], untuned["rslora"][high])
    learned = evidence.learned("rslora", low)
    numbers = (
        f"With the best rate of each method and rank ({evidence.loss}, {evidence.seeds}): "
        f"{_list_tuned(evidence, 'rslora', ranks)}; {_list_tuned(evidence, 'lora', ranks)}. "
        f"rslora's lead at rank {high} is {signed(lead)}, at one rate for all ({evidence.rate:g}) "
        f"{signed(before)}; from rank {low} to {high} rslora gains {signed(gains['rslora'])} (one "
        f"rate: {signed(first)}) and lora {signed(gains['lora'])}"
    )
    return _judge_tuned(numbers, before, lead, learned)


def _judge_tuned(numbers: str, before: Estimate, lead: Estimate, learned: float) -> Verdict:
    if not (before.mean > 0 and counts(before, learned)):
        return Verdict(NOT_REPRODUCED, f"{numbers}. There is no untuned lead to explain.")
    if math.isinf(lead.mean):
        return undecided(numbers, "lora broke at each of its rates, so that the lead has no size")
    left = lead.mean / before.mean
    words = f"{numbers}. {left:.0%} of the untuned lead is left"
    if left < HALF:
        return Verdict(CONFOUNDED, f"{words}: the learning rate explains most of it.")
    if not counts(lead, learned):
        return Verdict(CONFOUNDED, f"{words}, which does not count beside the noise of the seeds.")
    return Verdict(REPRODUCED, f"{words}.")


def _list_tuned(evidence: Evidence, method: str, ranks: list[int]) -> str:
    rates, tuned = evidence.rates(method), evidence.tuned(method)
    words = [
        f"r={rank} {estimate(tuned[rank][1].values())} at {tuned[rank][0]:g}"
        f"{_edge(tuned[rank][0], rates[rank])}"
        for rank in ranks
    ]
    return f"{method} {', '.join(words)}"


def adalora(evidence: Evidence) -> Verdict:
    """Judge whether rsLoRA's scaling helps AdaLoRA, and more so at larger budgets."""
    plain, scaled = evidence.untuned("adalora"), evidence.untuned("adalora-rslora")
    ranks = common(plain, scaled)
    if len(ranks) < 2:
        return missing("AdaLoRA with the scalings lora and rslora at two budgets or more")
    low, high = ends(ranks)
    leads = {rank: difference(plain[rank], scaled[rank]) for rank in ranks}
    learned = evidence.learned("adalora-rslora", high)
    helps = leads[high].mean > 0 and counts(leads[high], learned)
    grows = leads[high].mean > leads[low].mean
    listed = ", ".join(f"r={rank} {signed(lead)}" for rank, lead in leads.items())
    numbers = (
        f"{evidence.loss.capitalize()}{evidence.at_rate}: "
        f"{list_losses('adalora-rslora', scaled)}; {list_losses('adalora', plain)}. Lead of "
        f"rsLoRA's scaling by initial rank: {listed} ({evidence.seeds})"
    )
    if helps and grows and math.isinf(leads[high].mean):
        return undecided(numbers, f"adalora broke at rank {high}, so that the lead has no size")
    return Verdict(REPRODUCED if helps and grows else NOT_REPRODUCED, f"{numbers}.")
