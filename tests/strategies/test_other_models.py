"""Tied weights, `Conv1D`, training from scratch and of all weights: as in one process."""

import json
from dataclasses import replace

import pytest
import torch
from strategy_fits import SHARING, Fit, deviation, scalar_deviation

TAGS = ("train/loss", "grad_norm/mean", "grad_norm/total")
TOLERANCE = 1e-5

TIED = Fit(base="tied", steps=3)
GPT2 = Fit(base="gpt2", steps=3)
SCRATCH = Fit(rank=None, steps=2, merge=None, options=(("pretrained", False),))
SCRATCH_ADAPTERS = replace(SCRATCH, rank=3)
ALL_WEIGHTS = Fit(rank=None, steps=2, merge=(("dtype", "bfloat16"),))


def assert_trains_alike(found, single):
    assert list(found.scalars["train/loss"]) == list(range(single.fit.steps))
    assert max(scalar_deviation(found, single, tag) for tag in TAGS) < TOLERANCE


@pytest.mark.parametrize("strategy", SHARING)
@pytest.mark.parametrize("fit", [TIED, GPT2], ids=["tied", "gpt2"])
def test_other_models(run, fit, strategy):
    single, found = run(fit), run(fit.under(strategy))
    assert_trains_alike(found, single)
    assert deviation(found.merged, single.merged) < TOLERANCE
    assert "lm_head.weight" not in found.merged


@pytest.mark.parametrize("strategy", SHARING)
@pytest.mark.parametrize("fit", [SCRATCH, SCRATCH_ADAPTERS], ids=["all", "adapters"])
def test_weights_that_are_drawn(run, fit, strategy):
    assert_trains_alike(run(fit.under(strategy)), run(fit))


def test_drawn_weights_are_others(run):
    loaded = run(replace(SCRATCH, options=()))
    assert scalar_deviation(run(SCRATCH), loaded, "train/loss", [0]) > 100 * TOLERANCE


@pytest.mark.parametrize("strategy", ["zero2", *SHARING])
def test_all_weights_merged_in_bfloat16(run, strategy):
    single, found = run(ALL_WEIGHTS), run(ALL_WEIGHTS.under(strategy))
    assert_trains_alike(found, single)
    assert not (found.folder / "adapter").exists()
    merged, truth = found.merged, single.merged
    assert merged.keys() == truth.keys()
    same = [(merged[name] == weight).float().mean().item() for name, weight in truth.items()]
    assert min(same) > 0.99  # what lies between two numbers of bfloat16 goes either way
    for name, weight in truth.items():
        assert merged[name].dtype == weight.dtype == torch.bfloat16
        torch.testing.assert_close(merged[name], weight, rtol=2**-7, atol=1e-6)
    assert (found.folder / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize("fit", [TIED, GPT2], ids=["tied", "gpt2"])
@pytest.mark.parametrize("strategy", ["single", *SHARING])
def test_the_merge_says_what_it_cost(run, fit, strategy):
    folder = run(fit.under(strategy)).folder / "merged"
    report = json.loads((folder / "merge_report.json").read_text())
    assert 0 < report["largest_logit_difference"] < 1e-4
    assert len(report["layers"]) == {"tied": 14, "gpt2": 8}[fit.base]
