"""DeepSpeed under Lightning on CPU processes, for tests only: both refuse the CPU in three places.

Import this file before forking: DeepSpeed's imports take seconds.
"""

import importlib
import sys
import warnings

import pytest
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from rslightning.strategies import ZeroStrategy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what DeepSpeed deprecates at import is not ours to mend
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    # Imported when an engine is built, for ten seconds in each process: its torch.compile is why.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    importlib.import_module("deepspeed.runtime.zero.stage3")

# The collective in shared memory would be compiled on first use, for a minute; gloo does as well.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed on gloo."""

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self):
        return torch.device("cpu", 0)


class OnceScaledDeepSpeedPrecision(DeepSpeedPrecision):
    """Accumulation divides the loss once: upstream, Lightning does it and DeepSpeed again."""

    def backward(self, tensor, model, optimizer, *args, **kwargs):
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class CPUZeroStrategy(ZeroStrategy):
    """Ours on gloo; stage 3 keeps parts of the smallest matrices, too, as it does of large ones."""

    setup_environment = CPUDeepSpeedStrategy.setup_environment
    setup_distributed = CPUDeepSpeedStrategy.setup_distributed
    root_device = CPUDeepSpeedStrategy.root_device

    def __init__(self, stage=2, **options):
        super().__init__(stage, **options)
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


class CPUTwiceStrategy(CPUZeroStrategy):
    """Ours on gloo, with the checkpoints that Lightning writes: weights beside their masters."""

    save_checkpoint = DeepSpeedStrategy.save_checkpoint
