import pytest
from lightning.pytorch.strategies import DDPStrategy

from rslightning.errors import UserError
from rslightning.strategies import FSDP2Strategy
from rslightning.strategies.sharing import weight_sharing


def make_zero(stage):
    return pytest.importorskip("deepspeed_cpu").CPUZeroStrategy(stage=stage)


def test_those_that_keep_parts_of_the_weights():
    for strategy in (FSDP2Strategy(), make_zero(3)):
        assert weight_sharing(strategy, is_quantized=False, is_compiled=False) is strategy
    for strategy in (DDPStrategy(), make_zero(1), make_zero(2)):
        assert weight_sharing(strategy, is_quantized=True, is_compiled=True) is None


def test_compiled_layers_are_shared_out_by_fsdp2_alone():
    fsdp2 = FSDP2Strategy()
    assert weight_sharing(fsdp2, is_quantized=False, is_compiled=True) is fsdp2
    with pytest.raises(UserError) as refusal:
        weight_sharing(make_zero(3), is_quantized=False, is_compiled=True)
    assert str(refusal.value) == (
        "model.compile gains nothing under ZeRO-3, which enters each layer at many places: leave "
        "it out, or take configs/strategy/fsdp2.yaml."
    )
