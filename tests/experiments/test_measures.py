import math
import statistics

import numpy as np
import pytest
from made_runs import FIRST_LOSS, falling, make_run, make_study

from rslightning.experiments.groups import Cell
from rslightning.experiments.measures import (
    batch_noise,
    counts,
    difference,
    estimate,
    final_losses,
    is_unstable,
    learned,
    log_log_slope,
    loss_kind,
    loss_words,
    mean_curve,
    same_seeds,
    starting_losses,
    window_means,
)


def test_an_estimate_is_mean_and_standard_error():
    values = [1.0, 2.5, 4.0, 0.5]
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(estimate([3.0]).error)
    assert estimate([1.0, math.inf]).mean == math.inf
    assert estimate([1.0, -math.inf]).mean == -math.inf
    assert math.isnan(estimate([math.inf, -math.inf]).mean)
    assert estimate([]).seeds == 0


def test_differences_are_paired_by_seed_where_the_seeds_are_the_same():
    left, right = {0: 5.0, 1: 9.0, 2: 7.0}, {2: 6.5, 1: 8.3, 0: 4.4}
    paired = difference(left, right)
    assert paired.mean == pytest.approx(0.6)
    assert paired.error == pytest.approx(statistics.stdev([0.6, 0.7, 0.5]) / math.sqrt(3))
    shared = difference(left, {1: 8.3, 9: 100.0})
    assert shared.mean == pytest.approx(0.7)
    alone = difference(left, {7: 4.4, 8: 8.3})
    assert alone.mean == pytest.approx(0.65)
    assert alone.error == pytest.approx(math.hypot(2 / math.sqrt(3), 1.95))


def test_a_difference_counts_beyond_two_errors_or_a_twentieth_of_what_was_learned():
    assert counts(estimate([0.9, 1.1]), learned=100.0)
    assert not counts(estimate([-0.9, 1.1]), learned=0.01)
    assert counts(estimate([0.06]), learned=1.0)
    assert not counts(estimate([0.04]), learned=1.0)
    assert not counts(estimate([]), learned=1.0)


def test_the_held_out_loss_decides_if_all_have_it():
    runs = [make_run(seed=0, held_out=1.5), make_run(seed=1, held_out=1.6)]
    assert loss_kind(make_study(runs)) == "held-out"
    assert loss_kind(make_study([*runs, make_run(seed=2)])) == "training"
    broken = make_run(seed=2, losses=[4.0, math.nan])
    study = make_study([*runs, broken, make_run(seed=3, held_out=1.0, state="unfinished")])
    assert loss_kind(study) == "held-out"
    losses = final_losses(study, Cell("rslora", 4, 1e-3), "held-out")
    assert losses == {0: 1.5, 1: 1.6, 2: math.inf}


def test_a_held_out_loss_from_before_the_end_says_so():
    """Of 24 steps the last held-out loss is of the one with index 23."""
    at_the_end = make_run(seed=0, held_out=1.5)
    early = make_run(seed=1, held_out=1.6, held_out_at=19)
    killed = make_run(seed=2, held_out=1.6, held_out_at=9, state="unfinished")
    for runs, words in (
        ([at_the_end, killed], "held-out loss"),
        ([early, killed], "held-out loss (step 20 of 24)"),
        ([at_the_end, early], "held-out loss (step 20 of 24 in 1 of 2 runs)"),
    ):
        assert loss_words(make_study(runs), "held-out") == words
        assert loss_words(make_study(runs), "training") == "training loss"


def test_what_was_learned_leaves_out_what_broke():
    runs = [make_run(losses=falling(2.0)), make_run(losses=[4.0, math.inf])]
    assert learned(runs, {0: FIRST_LOSS}) == pytest.approx(FIRST_LOSS - 2.0)


def test_a_seed_begins_with_the_loss_of_its_slowest_stable_run():
    """Each batch has a difficulty of its own, which all runs of a seed share."""
    difficulty = np.array([0.3, -0.2, 0.4, -0.5, 0.1, 0.0, -0.1, 0.2, -0.3, 0.1] * 3)
    still, fast = 4.0 + difficulty, np.linspace(4.0, 1.0, 30) + difficulty
    rising = np.linspace(4.0, 9.0, 30) + difficulty
    study = make_study(
        [
            make_run("lora", rank=4, losses=still.tolist()),
            make_run("rslora", rank=4, losses=fast.tolist()),
            make_run("rslora", rank=8, losses=rising.tolist()),
            make_run("rslora", rank=4, seed=1, losses=(fast + 1.0).tolist()),
        ]
    )
    starts = starting_losses(study)
    assert starts == pytest.approx({0: 4.0, 1: (fast + 1.0)[:10].mean()})
    (run,) = study.cells[Cell("lora", 4, 1e-3)]
    assert learned([run], starts) == pytest.approx(0.0, abs=1e-12)  # 0.3 by the first step's loss


def test_unstable_is_a_loss_that_rises_by_a_tenth_of_the_first():
    down = falling(2.0, steps=40)
    assert not is_unstable(make_run(losses=down))
    assert not is_unstable(make_run(losses=[4.0, *[4.3] * 30]))
    assert not is_unstable(make_run(losses=[*down, *[2.35] * 20]))
    assert is_unstable(make_run(losses=[*down, *[2.45] * 20]))
    assert is_unstable(make_run(losses=[*down, *[2.45] * 20, *[2.0] * 40]))  # it was
    assert is_unstable(make_run(losses=[4.0, *[6.0] * 30]))  # from the first step on
    assert is_unstable(make_run(losses=[4.0, 3.0, math.nan]))


def test_batches_that_differ_much_do_not_make_a_run_unstable():
    """A tenth of the loss is within the noise of these; a rise beyond it still shows."""
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.5, 300)
        flat = np.maximum(4.0 + noise, 0.0)
        assert not is_unstable(make_run(losses=flat.tolist()))
        flat[150:] += 2.0
        assert is_unstable(make_run(losses=flat.tolist()))


def test_the_noise_of_a_batch_is_its_standard_deviation():
    noise = np.random.default_rng(0).normal(0, 0.3, 20_000)
    assert batch_noise(noise + np.linspace(9, 2, 20_000)) == pytest.approx(0.3, rel=0.03)


def test_window_means_are_means_of_windows():
    values = np.array([1.0, 5.0, 2.0, 7.0])
    np.testing.assert_allclose(window_means(values, 3), [8 / 3, 14 / 3])
    assert len(window_means(values, 5)) == 0


def test_slopes_are_exponents():
    ranks = [4, 16, 64, 256]
    assert log_log_slope(ranks, [7 * r**-0.5 for r in ranks]) == pytest.approx(-0.5)
    assert math.isnan(log_log_slope([4], [1.0]))
    assert math.isnan(log_log_slope([4, 8], [1.0, 0.0]))


def test_groups_are_compared_on_the_seeds_that_all_have():
    groups = [[make_run(seed=seed) for seed in seeds] for seeds in ((0, 1, 2), (2, 1), (1, 5))]
    assert [[run.seed for run in group] for group in same_seeds(groups)] == [[1], [1], [1]]
    groups.append([make_run(seed=7)])
    assert same_seeds(groups) == groups
    assert same_seeds([]) == []


def test_a_mean_curve_has_the_steps_that_all_have():
    runs = [make_run(losses=[4.0, 3.0, 2.0]), make_run(losses=[2.0, 2.0])]
    steps, values = mean_curve(runs, "train/loss")
    assert (steps.tolist(), values.tolist()) == ([0, 1], [3.0, 2.5])
    assert len(mean_curve(runs, "absent")[0]) == 0
