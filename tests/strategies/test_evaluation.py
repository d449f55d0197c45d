"""Validating, testing and predicting from a folder of DeepSpeed: with what was trained."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from strategy_fits import (
    Fit,
    ignoring_deepspeed,
    make_fit_data,
    make_fit_module,
    make_fit_trainer,
    make_strategy,
)

from rslightning.errors import UserError
from rslightning.rslora import AdapterSpec

cpu = pytest.importorskip("deepspeed_cpu")

FIT = Fit(steps=8, save_every=8)  # two passes, each with its validation at the end
BF16 = replace(FIT, precision="bf16-mixed", options=(("dtype", "bfloat16"),))
FULL = replace(FIT, rank=None, optimizer="SGD", merge=None)
TOLERANCE = 1e-5


class Ids(Callback):
    """Keeps what was generated."""

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.ids = outputs.tolist()


def evaluate(fit, places, path, verb="validate", strategy=None):
    """Return the metrics, or the ids of the last batch, as each process finds them."""
    torch.manual_seed(8)
    callback = Ids()
    with ignoring_deepspeed(fit):
        trainer = Trainer(
            accelerator="cpu",
            devices=fit.processes,
            strategy=strategy or make_strategy(fit),
            precision=fit.precision,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        data = make_fit_data(fit, places)
        found = getattr(trainer, verb)(make_fit_module(fit, places), data, ckpt_path=path)
    return callback.ids if verb == "predict" else found[0]


@pytest.fixture
def found(fork, places, tmp_path):
    """Return a function that evaluates a checkpoint; what the processes find is returned."""

    def evaluated(fit, path, verb="validate"):
        def rank(number):
            result = evaluate(fit, places, path, verb)
            (tmp_path / f"{number}.json").write_text(json.dumps(result))

        assert fork(fit.processes, rank) == [0] * fit.processes
        return [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(fit.processes)]

    return evaluated


@pytest.mark.parametrize(
    ("strategy", "fit"),
    [("zero1", FIT), ("zero2", BF16), ("zero3", BF16), ("zero3", FULL)],
    ids=["zero1-float32", "zero2-bfloat16", "zero3-bfloat16", "zero3-full"],
)
def test_the_loss_of_the_living_model(run, found, strategy, fit):
    fit = fit.under(strategy)
    living = run(fit).scalars
    truth = {tag: living[tag][7] for tag in ("val/loss", "val/perplexity")}
    assert found(fit, run(fit).checkpoint()) == [truth] * 2
    assert abs(living["val/loss"][3] - living["val/loss"][7]) > 0.05


@pytest.mark.parametrize("fit", [BF16], ids=["bfloat16"])
def test_a_folder_with_trained_weights_beside_their_masters(run, found, fit):
    living = run(fit.under("zero2_twice"))
    truth = living.scalars["val/loss"][7]
    for result in found(fit.under("zero2"), living.checkpoint()):
        assert result["val/loss"] == truth


@pytest.mark.parametrize(
    ("wrote", "now", "processes"),
    [("zero2", "zero1", 3), ("zero2", "zero3", 1)],
)
def test_another_stage_and_number_of_processes(run, found, wrote, now, processes):
    living = run(FIT.under(wrote))
    truth = living.scalars["val/loss"][7]
    for result in found(FIT.under(now, processes), living.checkpoint()):
        assert result["val/loss"] == pytest.approx(truth, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", ["zero3"])
def test_testing_and_predicting(run, found, strategy):
    """Against one process without DeepSpeed that begins with the adapters of the folder."""
    fit, path = FIT.under(strategy), run(FIT.under(strategy)).checkpoint()
    alone = replace(FIT, options=(("start_from", str(path)),))
    [loss], [ids] = found(alone, None, "test"), found(alone, None, "predict")
    for result in found(fit, path, "test"):
        assert result["test/loss"] == pytest.approx(loss["test/loss"], rel=TOLERANCE)
    shares = found(fit, path, "predict")
    assert [shares[index % 2][index // 2] for index in range(len(ids))] == ids
    [base] = found(FIT, None, "predict")
    assert base != ids


def test_small_matrices_that_stage_3_keeps_whole(run, fork, places):
    """As it does by default; the tests' own strategy shares them out."""
    living = run(FIT.under("zero3"))

    def rank(_):
        strategy = cpu.CPUZeroStrategy(stage=3)
        del strategy.config["zero_optimization"]["stage3_param_persistence_threshold"]
        result = evaluate(living.fit, places, living.checkpoint(), strategy=strategy)
        parameters = strategy.lightning_module.parameters()
        assert all(p.ds_persist for p in parameters if p.requires_grad)
        assert result["val/loss"] == living.scalars["val/loss"][7]

    assert fork(2, rank) == [0, 0]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_that_does_not_fit(run, fork, places, stage):
    path = run(FIT.under(f"zero{stage}")).checkpoint()
    file = run(FIT).checkpoint()
    fit = FIT.under(f"zero{stage}")
    first = "model.model.layers.0.self_attn.q_proj"
    full = replace(fit, rank=None)
    wider = replace(fit, rank=5)
    cases = [
        (fit, file, f"{file} was not written by DeepSpeed: "),
        (full, path, "The saved state lacks model.model.embed_tokens.weight ("),
        (wider, path, f"{first}.lora_a has shape [3, "),
    ]

    def rank(_):
        for other, saved, message in cases:
            with pytest.raises(UserError) as caught:
                evaluate(other, places, saved)
            assert str(caught.value).startswith(message), caught.value

    assert fork(2, rank) == [0, 0]


def test_an_adapter_that_the_model_has_not(run, fork, places):
    fit = FIT.under("zero2")
    path = run(fit).checkpoint()
    narrower = AdapterSpec(rank=3, alpha=5.0, targets=["q_proj"])

    def rank(_):
        with ignoring_deepspeed(fit):
            trainer = make_fit_trainer(fit, places.data, [])
            module = make_fit_module(fit, places)
            module.adapter = narrower
            with pytest.raises(UserError, match=r"^The model has no place for .*k_proj.lora_a "):
                trainer.validate(module, make_fit_data(fit, places), path)

    assert fork(2, rank) == [0, 0]


def test_after_a_fit(fork, places, tmp_path):
    """By the same Trainer: the module that it has trained, and another one."""

    def rank(_):
        for stage in (1, 3):
            fit, path = FIT.under(f"zero{stage}"), tmp_path / f"{stage}.ckpt"
            with ignoring_deepspeed(fit):
                trainer = make_fit_trainer(fit, tmp_path, [])
                module, data = make_fit_module(fit, places), make_fit_data(fit, places)
                trainer.fit(module, data)
                trainer.save_checkpoint(path)
                [living] = trainer.validate(module, data, verbose=False)
                assert trainer.validate(module, data, path, verbose=False) == [living]
                other = make_fit_module(fit, places)
                assert trainer.validate(other, data, path, verbose=False) == [living]

    assert fork(2, rank) == [0, 0]
