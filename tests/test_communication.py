"""The counted bytes of a step, against the collectives of real processes and what sockets sent."""

import json
import os
import socket
import struct
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from rslightning import CausalLMModule
from rslightning.batch import Batch
from rslightning.communication import Communication, step_communication
from rslightning.model_shape import read_shape
from rslightning.rslora import AdapterSpec
from rslightning.strategies import FSDP2Strategy
from rslightning.training_step import Sharding, TrainingStep

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

# Every matrix below has a multiple of P rows: nothing is filled up.
P, N, RANK = 3, 2, 6
BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 54,
    "hidden_size": 24,
    "intermediate_size": 42,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENTRIES_OF_LAYER = 24 * 24 * 2 + 24 * 12 * 2 + 24 * 42 * 3 + 2 * 24
ENTRIES = 3 * ENTRIES_OF_LAYER + 2 * 54 * 24 + 24
ADAPTERS = 3 * RANK * (2 * (24 + 24) + 2 * (24 + 12) + 3 * (24 + 42))
SUMS = 64  # bytes: the loss and its count of targets, the sum of squares for a norm

REDUCED, GATHERED, SCATTERED = "allreduce_", "_allgather_base_", "_reduce_scatter_base_"


class CountedCollectives(TorchDispatchMode):
    """Adds up the bytes of what each kind of collective works on."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.name().split("::")
        if namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if torch.is_tensor(leaf)]
            self.bytes[name] += max((tensor.nbytes for tensor in tensors), default=0)
        return function(*args, **(kwargs or {}))


class SecondStep(Callback):
    """Counts in the second optimizer step: the first one sets things up."""

    def __init__(self):
        self.mode = CountedCollectives()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == N:
            self.mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2 * N - 1:
            self.mode.__exit__(None, None, None)


@pytest.fixture
def count(run_processes, make_trainer, tmp_path):
    """Return a function: what a strategy's processes exchange in a step of N micro-batches."""

    def fit(rank, strategy, recompute, precision):
        module = CausalLMModule(
            str(tmp_path),
            AdapterSpec(rank=RANK),
            partial(torch.optim.AdamW, lr=1e-3),
            dtype="float32" if precision == "32-true" else "bfloat16",
            pretrained=False,
            activation_checkpointing=recompute,
        )
        ids = torch.randint(2, 54, (4, 11), generator=torch.Generator().manual_seed(rank))
        second = SecondStep()
        trainer = make_trainer(
            devices=P,
            strategy=strategy(),
            max_steps=2,
            accumulate_grad_batches=N,
            precision=precision,
            callbacks=[second],
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        batch = Batch(ids, ids.clone(), torch.ones_like(ids))
        trainer.fit(module, DataLoader([batch] * (2 * N), batch_size=None))
        (tmp_path / f"{rank}.json").write_text(json.dumps(second.mode.bytes))

    def counted(strategy, tied=False, recompute=True, precision="32-true"):
        config = BASE | {"tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        function = partial(fit, strategy=strategy, recompute=recompute, precision=precision)
        assert run_processes(P, function) == [0] * P
        found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(P)]
        assert all(other == found[0] for other in found)
        return Counter(found[0])

    return counted


def planned(sharding, micro_batches=N, tied=False, **changes):
    shape = read_shape(BASE | {"tie_word_embeddings": tied})
    ranks = {linear.path: RANK for linear in shape.maps[:-1]}
    defaults = {"ranks": ranks, "base_bytes": 4, "compute_bytes": 4}
    defaults |= {"activation_checkpointing": True, "sharding": sharding}
    step = TrainingStep(4, 11, **(defaults | changes))
    return step_communication(shape, step, micro_batches)


FSDP2 = Sharding(P, optimizer=True, gradients=True, weights=True)
ZERO = {
    stage: Sharding(P, optimizer=True, gradients=stage > 1, weights=stage > 2, masters=True)
    for stage in (1, 2, 3)
}
SHARE = (P - 1) / P  # of what a process gathers or scatters, it sends


def test_ddp_sums_the_gradients_of_the_adapters_once(count):
    found = count(partial(DDPStrategy, process_group_backend="gloo"))
    assert 4 * ADAPTERS <= found[REDUCED] <= 4 * ADAPTERS + SUMS
    assert found[GATHERED] == found[SCATTERED] == 0
    expected = planned(Sharding(P, buckets=True))
    assert expected == Communication(gradients=pytest.approx(2 * SHARE * 4 * ADAPTERS), weights=0)


@pytest.mark.parametrize(("tied", "recompute"), [(False, True), (True, False)])
def test_fsdp2_gathers_all_weights_twice_in_each_micro_batch(count, tied, recompute):
    found = count(FSDP2Strategy, tied, recompute)
    expected = planned(FSDP2, tied=tied, activation_checkpointing=recompute)
    assert found[GATHERED] * SHARE == pytest.approx(expected.weights)
    assert found[SCATTERED] * SHARE == pytest.approx(expected.gradients)
    assert found[SCATTERED] == N * 4 * ADAPTERS
    assert found[REDUCED] <= SUMS
    everything = 4 * (ENTRIES - tied * 54 * 24 + ADAPTERS)
    once = 4 * (24 + tied * 54 * 24)
    assert found[GATHERED] == N * (2 * everything - once)


def test_fsdp2_gathers_weights_as_they_are_stored(count):
    found = count(FSDP2Strategy, precision="bf16-mixed")
    everything = 2 * ENTRIES + 4 * ADAPTERS
    assert found[GATHERED] == N * (2 * everything - 2 * 24)
    assert found[SCATTERED] == N * 4 * ADAPTERS
    expected = planned(FSDP2, base_bytes=2, compute_bytes=2)
    assert found[GATHERED] * SHARE == pytest.approx(expected.weights)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's
@pytest.mark.parametrize(("stage", "precision"), [(1, "32-true"), (2, "bf16-mixed")])
def test_zero_1_and_2_sum_gradients_and_gather_the_updated_adapters(count, stage, precision):
    cpu = pytest.importorskip("deepspeed_cpu")
    found = count(partial(cpu.CPUZeroStrategy, stage=stage), precision=precision)
    width = 4 if precision == "32-true" else 2
    reduced = width * ADAPTERS * (N if stage == 2 else 1)
    assert reduced <= found[REDUCED] <= reduced + SUMS
    assert found[GATHERED] == width * ADAPTERS
    assert found[SCATTERED] == 0
    expected = planned(ZERO[stage], base_bytes=width, compute_bytes=width)
    assert expected.gradients == pytest.approx(2 * SHARE * reduced)
    assert expected.weights == pytest.approx(SHARE * found[GATHERED])


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's
@pytest.mark.parametrize("recompute", [False, True])
def test_zero_3_gathers_weights_at_most_as_often_as_planned(count, recompute):
    cpu = pytest.importorskip("deepspeed_cpu")

    def strategy():  # that keeps nothing for the next use
        made = cpu.CPUZeroStrategy(stage=3)
        kept = ("max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
        made.config["zero_optimization"] |= {f"stage3_{name}": 0 for name in kept}
        return made

    found = count(strategy, recompute=recompute)
    assert found[SCATTERED] == N * 4 * ADAPTERS
    expected = planned(ZERO[3], activation_checkpointing=recompute)
    assert expected.gradients == pytest.approx(SHARE * found[SCATTERED])
    assert 0.85 * expected.weights < SHARE * found[GATHERED] <= expected.weights
    assert expected.weights == pytest.approx(
        SHARE * N * (3 if recompute else 2) * 4 * (ENTRIES + ADAPTERS)
    )


def sent_bytes():
    """Return the bytes that this process's TCP connections have sent, as the kernel counts them.

    What was sent again, because the reader's buffer was full, is counted once.
    """
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        if not (path.exists() or path.is_symlink()) or "socket" not in str(path.readlink()):
            continue
        with socket.socket(fileno=os.dup(int(path.name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                sent, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, _retrans
                total += sent - again
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_a_ring_sends_what_the_equations_say(run_processes, tmp_path):
    size = 4_800_000

    def measure(rank):
        distributed.init_process_group("gloo")
        whole, part = torch.ones(size // 4), torch.ones(size // 4 // P)
        parts = [torch.empty_like(part) for _ in range(P)]
        found = {}
        for name, collective in {
            "reduce": lambda: distributed.all_reduce(whole),
            "gather": lambda: distributed.all_gather(parts, part),
        }.items():
            distributed.barrier()
            before = sent_bytes()
            collective()
            distributed.barrier()
            found[name] = sent_bytes() - before
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))
        distributed.destroy_process_group()

    assert run_processes(P, measure) == [0] * P
    for rank in range(P):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["reduce"] == pytest.approx(2 * size * (P - 1) / P, rel=0.001)
        assert found["gather"] == pytest.approx(size * (P - 1) / P, rel=0.001)


def test_one_process_sends_nothing():
    alone = Sharding(1, optimizer=True, gradients=True, weights=True, masters=True)
    assert planned(Sharding()).total == planned(alone).total == 0


def test_full_fine_tuning_sends_gradients_of_everything():
    found = planned(Sharding(P, buckets=True), ranks=None)
    assert found.total == pytest.approx(2 * SHARE * 4 * ENTRIES)
    found = planned(FSDP2, micro_batches=1, ranks=None)
    assert found.gradients == pytest.approx(SHARE * 4 * ENTRIES)
    assert found.weights == pytest.approx(SHARE * 4 * (2 * ENTRIES - 24))
