"""What a strategy cannot do is refused in one sentence, before anything is built."""

import io
from contextlib import redirect_stderr, redirect_stdout

import pytest
import yaml
from lightning.pytorch import Trainer, strategies
from lightning.pytorch.strategies import ModelParallelStrategy
from strategy_fits import Fit, make_fit_module

from rslightning.__main__ import main
from rslightning.errors import UserError
from rslightning.strategies import FSDP2Strategy, ZeroStrategy

WHOLE = Fit(save_every=5)


class FSDPStrategy(strategies.FSDPStrategy):
    """Lightning refuses the class itself on a CPU."""


@pytest.fixture
def refusal(places):
    """Return a function that says how a model is refused under a strategy, before it is built."""

    def message(strategy="auto", rank=3, **options):
        module = make_fit_module(Fit(rank=rank, options=tuple(options.items())), places)
        module.trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, logger=False, barebones=True
        )
        with pytest.raises(UserError) as caught:
            module.configure_model()
        return str(caught.value)

    return message


def test_a_quantized_base(refusal):
    pytest.importorskip("bitsandbytes")
    assert refusal(FSDP2Strategy(), quantization={"load_in_4bit": True}) == (
        "A quantized base is not shared out by FSDP2Strategy: leave quantization out, or take "
        "configs/strategy/ddp.yaml."
    )


@pytest.mark.parametrize("strategy", [ModelParallelStrategy(1, 1), FSDPStrategy()])
def test_lightnings_own_sharding(refusal, strategy):
    assert refusal(strategy) == (
        f"{type(strategy).__name__} is not supported; take configs/strategy/fsdp2.yaml."
    )


def test_lightnings_own_stage_3(refusal):
    cpu = pytest.importorskip("deepspeed_cpu")
    assert refusal(cpu.CPUDeepSpeedStrategy(stage=3)) == (
        "CPUDeepSpeedStrategy is not supported; take configs/strategy/deepspeed_zero3.yaml."
    )


def test_a_beginning_without_adapters(refusal, run):
    adapter = run(WHOLE).folder / "adapter"
    assert refusal(rank=None, start_from=str(adapter)) == (
        "start_from needs adapters: give model.adapter a rank."
    )


@pytest.mark.parametrize("strategy", ["single", "fsdp2", "zero3"])
def test_a_beginning_of_another_rank(refusal, run, strategy):
    left = run(WHOLE.under(strategy))
    assert refusal(rank=5, start_from=str(left.checkpoint())) == (
        "model.layers.0.self_attn.q_proj has rank 3 and gamma 2.88675 in the saved adapter, rank 5 "
        "and gamma 2.23607 in this run: give both the same rank, alpha and scaling."
    )


@pytest.fixture
def command(places, tmp_path, monkeypatch):
    """Return a function that says how `fit` refuses to go on from a checkpoint."""
    monkeypatch.chdir(tmp_path)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    config = {
        "model": {
            "base_model": str(places.bases / "llama"),
            "dtype": "float32",
            "adapter": {"rank": 3, "alpha": 5.0},
            "optimizer": optimizer,
        },
        "data": {
            "class_path": "rslightning.data.OpenOrca",
            "init_args": {"path": str(places.data), "batch_size": 6, "max_length": 80},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 10, "logger": False},
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))

    def message(path):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main(["fit", "--config", "fit.yaml", "--ckpt_path", str(path)])
        assert status == 2
        assert [path.name for path in tmp_path.iterdir()] == ["fit.yaml"]
        return err.getvalue().splitlines()[-1]

    return message


def test_a_folder_under_a_strategy_that_writes_files(run, command):
    path = run(WHOLE.under("zero3")).checkpoint().resolve()
    assert command(path) == (
        f"rslightning: {path} was written in parts, from which SingleDeviceStrategy cannot go on: "
        f"take the strategy that wrote it, or begin anew from its adapters with "
        f"--model.start_from {path}."
    )


def test_deepspeed_without_a_gpu(make_trainer, make_module, make_data):
    pytest.importorskip("deepspeed_cpu")
    trainer = make_trainer(max_steps=1, strategy=ZeroStrategy(stage=2))
    with pytest.raises(UserError) as refusal:
        trainer.fit(make_module(), make_data())
    assert str(refusal.value) == (
        "DeepSpeed needs a CUDA GPU here, and this run has a CPUAccelerator: take "
        "configs/strategy/fsdp2.yaml, which shares out as much as ZeRO-3 anywhere."
    )
