"""A fit goes on from a checkpoint, under the same strategy or another, as if it had not stopped."""

from dataclasses import replace

import pytest
import torch
from strategy_fits import STRATEGIES, Fit, deviation, matrices, scalar_deviation

WHOLE = Fit(save_every=5)
BF16 = replace(WHOLE, precision="bf16-mixed", options=(("dtype", "bfloat16"),))
HALF = Fit(steps=5, save_every=5)
TAGS = ("train/loss", "grad_norm/mean", "grad_norm/total", "grad_norm/a", "grad_norm/b")
AFTER = range(5, 10)
TOLERANCE = 1e-5

# What goes on writes into a folder of its own, so that both can be read.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")


def resumed(fit, checkpoint):
    return replace(fit, resume=str(checkpoint), save_every=5)


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES, "fsdp2_parts"])
def test_the_same_strategy_goes_on_bit_for_bit(run, strategy):
    whole = run(WHOLE.under(strategy))
    assert_goes_on(run, whole, whole.checkpoint("step-5"))


@pytest.mark.parametrize(("strategy", "processes"), [("zero1", 1), ("zero2", 2), ("zero3", 2)])
def test_weights_in_bfloat16_are_made_of_their_masters(run, strategy, processes):
    whole = run(BF16.under(strategy, processes))
    assert_goes_on(run, whole, whole.checkpoint("step-5"))


@pytest.mark.parametrize(
    ("strategy", "fit"), [("zero1", WHOLE), ("zero2", BF16)], ids=["float32", "bfloat16"]
)
def test_a_folder_with_trained_weights_beside_their_masters_goes_on(run, strategy, fit):
    twice = run(fit.under(f"{strategy}_twice"))
    assert_goes_on(run, run(fit.under(strategy)), twice.checkpoint("step-5"))


def test_full_fine_tuning_goes_on(run):
    whole = run(replace(BF16, rank=None, merge=None).under("zero2"))
    assert_goes_on(run, whole, whole.checkpoint("step-5"))


def assert_goes_on(run, whole, checkpoint):
    """Compare what went on from a checkpoint with the run that did not stop."""
    found = run(resumed(whole.fit, checkpoint))
    for tag in TAGS if whole.fit.rank else TAGS[:1]:
        assert list(found.scalars[tag]) == list(AFTER)
        assert [found.scalars[tag][step] for step in AFTER] == [
            whole.scalars[tag][step] for step in AFTER
        ]
    assert found.scalars["val/loss"] == {7: whole.scalars["val/loss"][7]}
    for name, truth in (whole.adapter if whole.fit.merge is not None else {}).items():
        assert torch.equal(found.adapter[name], truth)
    for rank in range(found.fit.processes):
        assert found.facts(rank)["state_numbers"] == whole.facts(rank)["state_numbers"]


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2", "zero3"])
def test_the_optimizers_state_is_shared_out(run, strategy):
    whole = run(WHOLE).facts()["state_numbers"]
    parts = [run(WHOLE.under(strategy)).facts(rank)["state_numbers"] for rank in range(2)]
    assert max(parts) < 0.6 * whole
    assert whole * 0.99 < sum(parts) < 1.1 * whole  # DeepSpeed has fewer step counts


CROSSINGS = {
    "fsdp2 to one process": (WHOLE.under("fsdp2"), Fit()),
    "fsdp2 to ddp": (WHOLE.under("fsdp2"), Fit().under("ddp")),
    "one process to fsdp2": (WHOLE, Fit().under("fsdp2")),
    "three processes to two": (HALF.under("fsdp2", 3), Fit().under("fsdp2")),
    "parts of two processes to three": (WHOLE.under("fsdp2_parts"), Fit().under("fsdp2", 3)),
}


@pytest.mark.parametrize("crossing", CROSSINGS)
def test_another_strategy_goes_on(run, crossing):
    before, after = CROSSINGS[crossing]
    single = run(WHOLE)
    found = run(resumed(after, run(before).checkpoint("step-5")))
    assert list(found.scalars["train/loss"]) == list(AFTER)
    assert max(scalar_deviation(found, single, tag, AFTER) for tag in TAGS) < TOLERANCE
    assert deviation(found.merged, single.merged) < TOLERANCE


def test_a_file_of_fsdp2_is_that_of_one_process(run):
    truth = torch.load(run(WHOLE).checkpoint("step-5"), weights_only=True)
    found = torch.load(run(WHOLE.under("fsdp2")).checkpoint("step-5"), weights_only=True)
    assert found.keys() == truth.keys()
    assert deviation(found["state_dict"], truth["state_dict"]) < TOLERANCE
    ours, theirs = found["optimizer_states"][0], truth["optimizer_states"][0]
    for group, truth_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert group | {"fused": None} == truth_group | {"fused": None}  # DTensors are not fused
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entries in theirs["state"].items():
        assert ours["state"][index]["step"] == entries["step"] == 5
        assert deviation(ours["state"][index], entries) < TOLERANCE
    assert found["lr_schedulers"] == truth["lr_schedulers"]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_folder_of_deepspeed_holds_the_same_adapter(run, strategy):
    folder = run(WHOLE.under(strategy)).checkpoint("step-5")
    assert folder.is_dir()
    truth = matrices(run(WHOLE).checkpoint("step-5"))
    assert deviation(matrices(folder), truth) < TOLERANCE


@pytest.mark.parametrize(("strategy", "processes"), [("single", 1), ("fsdp2", 3), ("zero3", 1)])
def test_adapters_of_zero3_begin_a_fit_of_other_processes(run, strategy, processes):
    def first_loss(fit, path):
        return run(replace(fit, steps=1, merge=None, options=(("start_from", str(path)),)))

    truth = first_loss(Fit(), run(WHOLE).checkpoint("step-5"))
    found = first_loss(
        Fit().under(strategy, processes), run(WHOLE.under("zero3")).checkpoint("step-5")
    )
    assert scalar_deviation(found, truth, "train/loss") < TOLERANCE
    assert scalar_deviation(found, truth, "grad_norm/total") < TOLERANCE
    anew = run(WHOLE).scalars["train/loss"][0]
    assert abs(truth.scalars["train/loss"][0] - anew) > 100 * TOLERANCE


def test_a_node_s_parts_go_on_in_another_number_of_processes(run):
    whole = replace(WHOLE, batch=4)
    half = replace(HALF, batch=4).under("fsdp2_nodes_parts", 4)
    before = run(replace(half, nodes=2))
    parts = [path.name for path in before.checkpoint().glob("part-*")]
    assert sorted(parts) == [f"part-0000{rank}-of-00002.safetensors" for rank in range(2)]
    found = run(resumed(whole.under("fsdp2"), before.checkpoint()))
    assert scalar_deviation(found, run(whole), "train/loss", AFTER) < TOLERANCE
