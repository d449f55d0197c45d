"""The same fit under every strategy: losses, gradient norms, moments and merged weights agree."""

from dataclasses import replace

import pytest
from strategy_fits import (
    CLIP,
    SHARING,
    STRATEGIES,
    Fit,
    Left,
    deviation,
    matrices,
    scalar_deviation,
)

WHOLE = Fit(save_every=5)
SGD = Fit(steps=4, optimizer="SGD", clip=None)  # sees a wrong scale of gradients, as AdamW does not
HALF = Fit(steps=5, save_every=5)
TOLERANCE = 1e-5  # relative, in float32
LOSSES = ("train/loss", "val/loss")
NORMS = tuple(f"grad_norm/{name}" for name in ("mean", "total", "a", "b"))
MOMENTS = tuple(
    f"{group}/{moment}_moment"
    for group in ("activation", "adapter_output", "input_grad")
    for moment in ("first", "second")
)


def largest_deviation(found: Left, single: Left, tags, steps=None):
    return max(scalar_deviation(found, single, tag, steps) for tag in tags)


def test_the_fit_tells_wrong_steps_from_right_ones(run, places):
    single = run(WHOLE)
    losses, norms = single.scalars["train/loss"], single.scalars["grad_norm/total"]
    assert list(losses) == list(norms) == list(range(10))
    assert min(norms.values()) > 1.5 * CLIP  # clips every step
    assert losses[9] < 0.95 * losses[0]
    assert list(single.scalars["val/loss"]) == [3, 7]  # a pass: 7 batches, 4 steps
    assert list(single.scalars["input_grad/second_moment"]) == [0, 5]
    assert deviation(single.merged, run(SGD).merged) > 100 * TOLERANCE


@pytest.mark.parametrize("fit", [WHOLE, SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_as_one_process(run, strategy, fit):
    single, found = run(fit), run(fit.under(strategy))
    assert found.facts()["global_step"] == found.facts(1)["global_step"] == fit.steps
    assert found.scalars.keys() == single.scalars.keys()
    assert largest_deviation(found, single, (*LOSSES, *NORMS, *MOMENTS)) < TOLERANCE
    assert deviation(found.merged, single.merged) < TOLERANCE
    assert deviation(found.adapter, single.adapter) < TOLERANCE


@pytest.mark.parametrize("strategy", SHARING)
def test_parts_of_three_processes(run, strategy):
    # 24 columns, ranks of 3, 301 tokens: some parts are smaller, and the last ones empty.
    single, found = run(WHOLE), run(HALF.under(strategy, 3))
    assert largest_deviation(found, single, ("train/loss", *NORMS), range(5)) < TOLERANCE
    assert scalar_deviation(found, single, "val/loss", [3]) < TOLERANCE
    truth = matrices(single.checkpoint("step-5"))
    assert deviation(matrices(found.checkpoint()), truth) < TOLERANCE


def test_nodes_that_hold_all_parts(run):
    fit = replace(SGD, batch=4)
    single, found = run(fit), run(replace(fit.under("fsdp2_nodes", 4), nodes=2))
    assert largest_deviation(found, single, ("train/loss", *NORMS)) < TOLERANCE
    assert deviation(found.merged, single.merged) < TOLERANCE
    halves = [found.facts(rank)["state_numbers"] for rank in range(4)]  # SGD's momentum
    assert halves[:2] == halves[2:]
    assert sum(halves[:2]) == single.facts()["state_numbers"] > max(halves)


def test_parts_in_the_hosts_memory(run):
    single, found = run(SGD), run(SGD.under("zero3_offload"))
    assert largest_deviation(found, single, (*LOSSES, *NORMS)) < TOLERANCE
    assert deviation(found.merged, single.merged) < TOLERANCE


@pytest.mark.parametrize("strategy", SHARING)
def test_activation_checkpointing(run, strategy):
    recomputing = replace(SGD, options=(("activation_checkpointing", True),))
    single, found = run(SGD), run(recomputing.under(strategy))
    assert largest_deviation(found, single, (*LOSSES, *NORMS, *MOMENTS)) < TOLERANCE
    assert deviation(found.merged, single.merged) < TOLERANCE


@pytest.mark.parametrize("strategy", SHARING)
def test_packed_rows(run, strategy):
    packed = Fit(steps=2, optimizer="SGD", clip=None, batch=4, packing=True)
    single, found = run(packed), run(packed.under(strategy))
    assert largest_deviation(found, single, ("train/loss", *NORMS)) < TOLERANCE
    assert deviation(found.merged, single.merged) < TOLERANCE


def test_table(run):
    print(f"\n{'':10}{'step 1':>10}{'step 5':>10}{'step 10':>10}  largest relative deviation of")
    print(f"{'AdamW':40}{'losses':>10}{'norms':>10}{'moments':>10}{'merged':>10}")
    single, worst = run(WHOLE), 0.0
    for strategy in ("single", *STRATEGIES):
        found = run(WHOLE.under(strategy))
        losses = [found.scalars["train/loss"][step] for step in (0, 4, 9)]
        differences = [largest_deviation(found, single, tags) for tags in (LOSSES, NORMS, MOMENTS)]
        differences.append(deviation(found.merged, single.merged))
        cells = [f"{loss:10.6f}" for loss in losses] + [f"{d:10.1e}" for d in differences]
        print(f"{strategy:10}{''.join(cells)}")
        worst = max(worst, *differences)
    assert 0 < worst < TOLERANCE  # nothing is compared with itself alone
