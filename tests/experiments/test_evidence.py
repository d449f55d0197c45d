import math

from made_runs import falling, make_run, make_study

from rslightning.experiments.evidence import Evidence, common, ends, list_losses, signed
from rslightning.experiments.measures import Estimate


def grid(ends_of):
    """Return the evidence of runs by (scaling, rank, rate): final loss."""
    runs = [make_run(*cell, losses=falling(end)) for cell, end in ends_of.items()]
    return Evidence(make_study(runs))


def test_the_untuned_rate_is_where_most_cells_are():
    evidence = grid(
        {
            ("lora", 4, 1e-3): 2.0,
            ("lora", 4, 1e-2): 1.0,
            ("lora", 16, 1e-3): 2.0,
            ("rslora", 64, 1e-3): 1.9,
            ("rslora", 64, 1e-2): 1.0,
        }
    )
    assert evidence.rate == 1e-3


def test_among_complete_rates_the_untuned_one_favours_rslora():
    evidence = grid(
        {
            ("lora", 4, 1e-3): 2.0,
            ("lora", 4, 1e-2): 1.0,
            ("rslora", 4, 1e-3): 2.0,
            ("rslora", 4, 1e-2): 1.0,
            ("rslora", 64, 1e-3): 1.8,
            ("rslora", 64, 1e-2): 2.5,
            ("full", 0, 5e-5): 0.5,
        }
    )
    assert evidence.rate == 1e-3
    assert evidence.untuned("rslora") == {4: {0: 2.0}, 64: {0: 1.8}}
    assert evidence.tuned("rslora") == {4: (1e-2, {0: 1.0}), 64: (1e-3, {0: 1.8})}
    assert list(evidence.rates("lora")[4]) == [1e-3, 1e-2]


def test_a_rate_at_which_training_broke_is_not_the_best():
    evidence = grid(
        {("rslora", 4, 1e-3): 2.0, ("rslora", 4, 1e-2): math.nan, ("lora", 4, 1e-3): 2.0}
    )
    assert evidence.tuned("rslora") == {4: (1e-3, {0: 2.0})}
    assert evidence.tuned("lora") == {}  # one rate is no choice
    assert evidence.rates("rslora")[4][1e-2] == {0: math.inf}


def test_sentences_have_numbers_with_their_errors():
    assert list_losses("lora", {4: {0: 1.0, 1: 1.2}, 8: {0: 2.0}, 16: {0: math.inf}}) == (
        "lora r=4 1.1000 ± 0.1000, r=8 2.0000, r=16 unstable"
    )
    assert signed(Estimate(-0.25, math.nan, 1)) == "-0.2500"
    assert signed(Estimate(math.inf, math.nan, 2)) == "not finite"


def test_ranks():
    assert common({4: 1, 8: 1, 2: 1}, {8: 1, 4: 1}) == [4, 8]
    assert ends([8, 2, 4]) == (2, 8)
    assert grid({("lora", 4, 1e-3): 2.0}).seeds == "one seed"
    runs = [make_run("lora", rank, seed=seed) for rank, seed in ((4, 0), (4, 1), (8, 0))]
    assert Evidence(make_study(runs)).seeds == "1 to 2 seeds"
    assert grid({("lora", 4, 1e-3): 2.0}).at_rate == " at learning rate 0.001"
