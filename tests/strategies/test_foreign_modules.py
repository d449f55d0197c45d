"""Somebody's module with PEFT's LoRA, shared out by whoever wrote it: the merge is that of one."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from strategy_fits import Fit, Left, deviation
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from rslightning.callbacks import MergeAdapters

ROWS = torch.arange(2, 2 + 8 * 9).reshape(8, 9)  # 2 steps of 4 rows


class Foreign(LightningModule):
    """Trains PEFT's rsLoRA; under FSDP2 it shards layer by layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.network = None

    def configure_model(self):
        if self.network is not None:
            return
        torch.manual_seed(3)
        config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "o_proj"])
        self.network = get_peft_model(AutoModelForCausalLM.from_pretrained(self.base), config)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.network.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def training_step(self, batch, batch_idx):
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def make_foreign_strategy(name):
    if name.startswith("zero"):
        return pytest.importorskip("deepspeed_cpu").CPUZeroStrategy(stage=int(name[-1]))
    return ModelParallelStrategy(2, 1) if name == "fsdp2" else "auto"


@pytest.fixture(scope="module")
def merged(places, fork, tmp_path_factory):
    """Return a function that trains under a strategy and returns what is left."""
    done = {}

    def fit(strategy):
        if strategy not in done:
            processes = 1 if strategy == "single" else 2
            folder = tmp_path_factory.mktemp(f"foreign-{strategy}")
            make_foreign_strategy(strategy)

            def rank(number):
                warnings.simplefilter("ignore")  # other people's modules
                trainer = Trainer(
                    accelerator="cpu",
                    devices=processes,
                    strategy=make_foreign_strategy(strategy),
                    callbacks=[MergeAdapters()],
                    max_steps=2,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    use_distributed_sampler=False,
                    default_root_dir=folder,
                )
                rows = ROWS[number::processes]
                trainer.fit(
                    Foreign(places.bases / "llama"), DataLoader(rows, batch_size=4 // processes)
                )

            assert fork(processes, rank) == [0] * processes
            done[strategy] = Left(Fit(), folder)
        return done[strategy]

    return fit


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2"])
def test_the_merge(merged, strategy):
    single, found = merged("single"), merged(strategy)
    assert deviation(found.merged, single.merged) < 1e-5
    assert deviation(found.adapter, single.adapter) < 1e-5
    assert all(bool(matrix.any()) for matrix in single.adapter.values())
