import math

import numpy as np
import pytest
from made_runs import FIRST_LOSS, falling, make_run, make_study

from rslightning.experiments.claims import decide

RANKS = (4, 16, 64)
NOISE = (-0.004, 0.004, 0.0)  # of three seeds
RATES = (1e-4, 1e-3, 1e-2)


def runs_by_rank(scaling, ends, seeds=3, rate=1e-3, **more):
    """Return the runs of a method whose loss ends at `ends` over the ranks."""
    return [
        make_run(scaling, rank, rate, seed, falling(end + NOISE[seed]), **more)
        for rank, end in zip(RANKS, ends, strict=True)
        for seed in range(seeds)
    ]


def judge(claim, runs, **fields):
    return decide(claim, make_study(runs, **fields))


def test_rank_gains_when_rslora_alone_gains():
    runs = runs_by_rank("rslora", (2.0, 1.8, 1.5)) + runs_by_rank("lora", (2.1, 2.1, 2.1))
    verdict, numbers = judge("rank_gains", runs)
    assert verdict == "reproduced"
    assert "r=64 1.5000 ± 0.0023" in numbers
    assert "rslora gains +0.5000 ± 0.0000 and lora +0.0000" in numbers
    assert "rslora leads by +0.6000 ± 0.0000 at rank 64 (3 seeds)" in numbers
    assert "Training loss at learning rate 0.001" in numbers


def test_a_verdict_says_at_which_step_its_held_out_losses_were_taken():
    runs = [
        make_run(scaling, rank, held_out=2.0, held_out_at=19)
        for scaling in ("lora", "rslora")
        for rank in RANKS
    ]
    numbers = judge("rank_gains", runs).numbers
    assert numbers.startswith("Held-out loss (step 20 of 24) at learning rate 0.001: rslora")


@pytest.mark.parametrize(
    ("rslora", "lora"),
    [
        ((2.0, 2.0, 2.0), (2.1, 2.1, 2.1)),  # rslora does not gain
        ((2.0, 1.4, 1.6), (2.1, 2.1, 2.1)),  # it rises again
        ((2.0, 1.8, 1.5), (2.0, 1.8, 1.6)),  # lora gains, too
        ((2.0, 1.8, math.nan), (2.1, 2.1, 2.1)),  # it breaks
    ],
)
def test_rank_gains_is_not_there(rslora, lora):
    runs = runs_by_rank("rslora", rslora) + runs_by_rank("lora", lora)
    assert judge("rank_gains", runs).verdict == "not reproduced"


def test_one_seed_needs_a_larger_difference():
    small = [falling(end)[-1] for end in (2.0, 1.97, 1.95)]
    lora = runs_by_rank("lora", (2.0, 2.0, 2.0), seeds=1)
    verdict = judge("rank_gains", runs_by_rank("rslora", small, seeds=1) + lora)
    assert verdict.verdict == "not reproduced"  # 0.05 of the 1.4 that was learned
    assert "(one seed)" in verdict.numbers
    three = runs_by_rank("rslora", small) + runs_by_rank("lora", (2.0, 2.0, 2.0))
    assert judge("rank_gains", three).verdict == "reproduced"


def norms(scale, slope_after=0.0):
    """Return gradient norms: `scale` at the first step, then times 2^slope_after."""
    return {"grad_norm/mean": [scale, *[scale * 2.0**slope_after] * 9]}


def runs_with_norms(lora, rslora, later=0.0):
    found = []
    for scaling, exponent in (("lora", lora), ("rslora", rslora)):
        for rank in RANKS:
            after = later if rank == 64 and scaling == "rslora" else 0.0
            found.append(make_run(scaling, rank, curves=norms(3.0 * rank**exponent, after)))
    return found


def test_gradient_norms_as_theory_has_them():
    verdict, numbers = judge("gradient_norms", runs_with_norms(-0.5, 0.0))
    assert verdict == "reproduced"
    assert "lora -0.500 (theory -0.5), rslora +0.000 (theory 0)" in numbers
    assert "lora 4.0 in the median" in numbers  # sqrt(64 / 4)


def test_a_further_seed_of_one_rank_changes_no_slope():
    more = make_run("rslora", 4, seed=1, curves=norms(9.0))
    numbers = judge("gradient_norms", [*runs_with_norms(-0.5, 0.0), more]).numbers
    assert "rslora +0.000 (theory 0)" in numbers


def test_spreads_of_gradient_norms_are_over_the_ranks_that_both_methods_have():
    """LoRA's from 4 to 16 is 2; to 64 it would be 4."""
    runs = [run for run in runs_with_norms(-0.5, 0.0) if (run.method, run.rank) != ("rslora", 64)]
    verdict, numbers = judge("gradient_norms", runs)
    assert verdict == "reproduced"
    assert "among ranks 4 to 16 at" in numbers
    assert "lora 2.0 in the median over training, theory at the first step 2.0" in numbers


@pytest.mark.parametrize("missing", [{"lora": (64,), "rslora": (4, 16)}, {"rslora": (4, 16, 64)}])
def test_gradient_norms_of_methods_without_two_ranks_in_common_show_nothing(missing):
    runs = [
        run for run in runs_with_norms(-0.5, 0.0) if run.rank not in missing.get(run.method, ())
    ]
    runs += [make_run("rslora", 128, curves=norms(3.0)), make_run("lora", 2, curves=norms(3.0))]
    assert judge("gradient_norms", runs).verdict == "not shown"


@pytest.mark.parametrize("made", [(-0.45, 0.0), (-0.5, 0.05), (-0.5, 0.0, 4.0)])
def test_gradient_norms_otherwise(made):
    assert judge("gradient_norms", runs_with_norms(*made)).verdict == "not reproduced"


def blow_up():
    return [*falling(2.0), *np.linspace(2.0, 3.5, 12).tolist()]


@pytest.mark.parametrize(
    ("large", "small", "verdict"),
    [
        (blow_up(), falling(3.95), "reproduced"),
        ([4.0, 3.0, math.inf], falling(3.95), "reproduced"),
        (falling(1.5), falling(3.95), "not reproduced"),  # stable
        (blow_up(), falling(3.0), "not reproduced"),  # learns
    ],
)
def test_other_scalings(large, small, verdict):
    found = judge(
        "other_scalings",
        [
            make_run("quarter_root", 64, losses=large),
            make_run("inverse_square", 64, losses=small),
            make_run("rslora", 64, losses=falling(1.5)),
        ],
    )
    assert found.verdict == verdict
    fall = np.mean(small[:10]) - 1.5  # the slowest begins as all do
    assert f"rslora's by {fall:.4f}" in found.numbers


def test_a_rate_that_breaks_rslora_too_says_nothing_of_a_scaling():
    small = make_run("inverse_square", 64, losses=falling(3.95))
    breaks = [make_run("quarter_root", 64, rate, losses=blow_up()) for rate in (1e-3, 1e-2)]
    rslora = [make_run("rslora", 64, 1e-3, losses=blow_up())]
    runs = [small, *breaks, *rslora, make_run("rslora", 64, 1e-2, losses=blow_up())]
    assert judge("other_scalings", runs, rate=1e-3).verdict == "not reproduced"
    runs[-1] = make_run("rslora", 64, 1e-2, losses=falling(1.5))
    rslora_first = [small, *breaks, make_run("rslora", 64, 1e-3, losses=falling(1.5)), runs[-1]]
    found = judge("other_scalings", rslora_first, rate=1e-3)
    assert found.verdict == "reproduced"
    assert "unstable at learning rates 0.001, 0.01 of 0.001, 0.01, rslora at none" in found.numbers


def test_a_rate_at_which_no_run_of_rslora_ended_shows_no_difference():
    high = 1e-2
    runs = [
        make_run("inverse_square", 64, losses=falling(3.95)),
        make_run("quarter_root", 64, losses=falling(1.5)),
        make_run("quarter_root", 64, high, losses=blow_up()),
        make_run("rslora", 64, losses=falling(1.5)),
    ]
    killed = make_run("rslora", 64, high, losses=blow_up(), state="unfinished")
    for of in (runs, [*runs, killed]):
        found = judge("other_scalings", of, rate=1e-3)
        assert found.verdict == "not shown"
        assert "unstable at learning rates 0.01 of 0.001, 0.01, rslora at none of 0.001" in (
            found.numbers
        )
        assert found.numbers.endswith(
            "Undecided: no run of rslora at rank 64 has ended at learning rate 0.01."
        )
    stable = make_run("rslora", 64, high, losses=falling(1.4))
    assert judge("other_scalings", [*runs, stable], rate=1e-3).verdict == "reproduced"
    learns = make_run("inverse_square", 64, losses=falling(2.0))
    assert judge("other_scalings", [learns, *runs[1:]], rate=1e-3).verdict == "not reproduced"


@pytest.mark.parametrize(
    ("unit", "lora", "verdict"),
    [
        (blow_up(), (2.0, 2.0, 2.0), "reproduced"),
        (falling(2.0), (2.0, 2.0, 2.0), "not reproduced"),
        (blow_up(), (2.0, 1.8, 1.5), "not reproduced"),
    ],
)
def test_initialization(unit, lora, verdict):
    init = {"init": "rank_corrected"}
    runs = [make_run("unit", 64, losses=unit, **init), *runs_by_rank("lora", lora, **init)]
    stable = [make_run("rslora", 64, losses=falling(1.5))]
    assert judge("initialization", runs + stable).verdict == verdict
    alone = judge("initialization", runs)
    assert alone.verdict == ("not shown" if verdict == "reproduced" else verdict)


@pytest.mark.parametrize(
    ("last", "verdict"), [(7.5, "reproduced"), (15.0, "not reproduced"), (3.0, "not reproduced")]
)
def test_moments(last, verdict):
    tag = "activation/second_moment"
    runs = [
        make_run(scaling, rank, curves={tag: [7.0, last if rank == 64 else 7.1]})
        for scaling in ("lora", "rslora")
        for rank in RANKS
    ]
    assert judge("moments", runs).verdict == verdict


def rate_runs(lora):
    """Return LoRA at rank 4 over the rates, and rsLoRA at rank 64 and its own rate, the second."""
    low = [
        make_run("lora", 4, rate, seed, falling(end + NOISE[seed]))
        for rate, end in zip(RATES, lora, strict=True)
        for seed in range(3)
    ]
    high = [make_run("rslora", 64, 1e-3, seed, falling(1.5 + NOISE[seed])) for seed in range(3)]
    return low + high


@pytest.mark.parametrize(
    ("lora", "verdict", "words"),
    [
        ((2.2, 2.0, 2.4), "reproduced", "closes 0% of the gap; it does not reach it"),
        ((2.2, 2.0, 1.9), "reproduced", "closes 20% of the gap; it does not reach it"),
        ((2.2, 2.0, 1.7), "confounded", "closes 60% of the gap; it does not reach it"),
        ((2.2, 2.0, 1.4), "confounded", "closes 120% of the gap; it reaches it"),
        ((2.2, 1.5, 2.0), "not reproduced", "there is no gap to close"),
    ],
)
def test_learning_rate(lora, verdict, words):
    found = judge("learning_rate", rate_runs(lora))
    assert found.verdict == verdict
    assert words in found.numbers
    assert ("at the edge" in found.numbers) == (min(lora) == lora[2])


def test_there_is_no_gap_where_rslora_broke():
    runs = rate_runs((2.2, 2.0, 1.7))
    broken = [make_run("rslora", 64, 1e-3, seed, [4.0, math.nan]) for seed in range(3)]
    found = judge("learning_rate", [run for run in runs if run.method == "lora"] + broken)
    assert found.verdict == "not reproduced"


def tuned_runs(lora, rslora):
    """Return runs over ranks 4 and 64 and the rates; `lora`, `rslora`: rank -> ends."""
    return [
        make_run(scaling, rank, rate, seed, falling(end + NOISE[seed]))
        for scaling, ranks in (("lora", lora), ("rslora", rslora))
        for rank, ends in ranks.items()
        for rate, end in zip(RATES, ends, strict=True)
        for seed in range(3)
    ]


RSLORA = {4: (2.2, 2.0, 2.1), 64: (1.8, 1.5, 3.0)}


@pytest.mark.parametrize(
    ("lora_high", "verdict", "left"),
    [
        ((2.4, 2.1, 2.1), "reproduced", "100% of the untuned lead is left"),
        ((2.4, 2.1, 1.9), "reproduced", "67% of the untuned lead is left"),
        ((2.4, 2.1, 1.6), "confounded", "17% of the untuned lead is left"),
        ((2.4, 2.1, 1.4), "confounded", "-17% of the untuned lead is left"),
        ((2.4, 1.5, 1.5), "not reproduced", "no untuned lead"),
    ],
)
def test_tuned(lora_high, verdict, left):
    runs = tuned_runs({4: (2.4, 2.1, 2.0), 64: lora_high}, RSLORA)
    found = judge("tuned", runs)
    assert found.verdict == verdict
    assert left in found.numbers
    assert "rslora r=4 2.0000 ± 0.0023 at 0.001, r=64 1.5000 ± 0.0023 at 0.001" in found.numbers


def test_what_broke_at_every_rate_leaves_no_lead_to_measure():
    """Nor is a loss that is infinite a gap of which a share could be told."""
    runs = tuned_runs({4: (2.4, 2.1, 2.0), 64: (math.nan,) * 3}, RSLORA)
    found = judge("tuned", runs)
    assert found.verdict == "not shown"
    assert "Undecided: lora broke at each of its rates" in found.numbers
    assert "nan" not in found.numbers
    some = tuned_runs({4: (2.4, 2.1, 2.0), 64: (2.4, math.nan, 2.1)}, RSLORA)
    assert judge("tuned", some).verdict == "confounded"  # a rate brings it from infinity to 2.1

    found = judge("learning_rate", rate_runs((2.2, math.nan, 1.7)), rate=1e-3)
    assert found.verdict == "not shown"
    assert "Undecided: lora broke at rank 4 at learning rate 0.001" in found.numbers

    rslora = runs_by_rank("rslora", (2.0, 1.8, 1.5))
    rslora[0] = make_run("rslora", 4, losses=[4.0, math.nan])
    found = judge("rank_gains", rslora + runs_by_rank("lora", (2.1, 2.1, 2.1)))
    assert found.verdict == "not shown"
    broken = runs_by_rank("lora", (math.nan, 2.1, math.nan))
    found = judge("rank_gains", runs_by_rank("rslora", (2.0, 1.8, 1.5)) + broken)
    assert found.verdict == "not shown"
    assert "Undecided: training broke at rank 4" in found.numbers

    plain, scaled = allocated("lora", (2.0, 2.0, math.nan)), allocated("rslora", (2.0, 1.9, 1.7))
    assert judge("adalora", plain + scaled).verdict == "not shown"


def test_the_sweep_may_name_the_untuned_rate():
    runs = tuned_runs({4: (2.4, 2.1, 2.0), 64: (2.4, 2.1, 1.9)}, RSLORA)
    assert "at one rate for all (0.0001) +0.6000" in judge("tuned", runs, rate=1e-4).numbers


def allocated(scaling, ends):
    return runs_by_rank(scaling, ends, allocation={"target_rank": 2})


@pytest.mark.parametrize(
    ("scaled", "verdict"),
    [
        ((2.0, 1.9, 1.7), "reproduced"),
        ((2.0, 2.0, 2.0), "not reproduced"),
        ((1.7, 1.8, 1.9), "not reproduced"),  # it helps less and less
    ],
)
def test_adalora(scaled, verdict):
    runs = allocated("lora", (2.0, 2.0, 2.0)) + allocated("rslora", scaled)
    assert judge("adalora", runs).verdict == verdict


def test_runs_that_did_not_end_show_nothing():
    runs = [
        make_run(scaling, rank, losses=[FIRST_LOSS, 3.0], state="unfinished")
        for scaling in ("lora", "rslora")
        for rank in RANKS
    ]
    assert judge("rank_gains", runs).verdict == "not shown"
