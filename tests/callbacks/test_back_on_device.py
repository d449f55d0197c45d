from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule

from rslightning.callbacks.back_on_device import back_on_device


class Layer(LightningModule):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(2))


def trainer_on(device):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


def test_a_module_is_on_its_device_for_a_while():
    module = Layer()
    module.weight = None  # the meta device keeps no values to come back with
    with back_on_device(trainer_on("meta"), module):
        assert module.device == torch.device("meta")
    assert module.device == torch.device("cpu")


def test_it_leaves_whatever_happens():
    module = Layer()
    module.weight = None
    with pytest.raises(KeyError), back_on_device(trainer_on("meta"), module):
        raise KeyError
    assert module.device == torch.device("cpu")


def test_on_the_cpu_nothing_moves():
    module = Layer()
    weight = module.weight
    with back_on_device(trainer_on("cpu"), module):
        assert module.weight is weight
    assert module.weight is weight
