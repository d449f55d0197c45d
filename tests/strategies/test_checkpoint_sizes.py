"""A checkpoint holds the trainable state and the optimizer's, under every strategy: no base."""

import pytest
import torch
from safetensors.torch import load_file
from strategy_fits import STRATEGIES, Fit, matrices

from rslightning.deepspeed_checkpoint import DEEPSPEED_CLASSES
from rslightning.safe_load import load_plain

RANKS = (4, 64)
FLOAT32 = 4  # bytes
OVERHEAD = 64 * 1024  # hyperparameters, the loops' state, names and file headers, of each file
PER_MATRIX = 2 * 1024  # the same of each matrix
NUMBERS = 3  # of each entry: the weight, or DeepSpeed's master of it, and two moments


def files(checkpoint):
    """Return the files of a checkpoint, which is one or a folder of them."""
    return [checkpoint] if checkpoint.is_file() else list(checkpoint.rglob("*.pt"))


@pytest.fixture
def written(run, babyllama361):
    """Return a function that trains two steps and returns the checkpoint."""

    def checkpoint(strategy, rank):
        folder = str(babyllama361)
        fit = Fit(steps=2, base=folder, rank=rank, batch=2, save_every=2, merge=None)
        return run(fit.under(strategy)).checkpoint()

    return checkpoint


def allowance(files, matrices):
    """Return the bytes that a checkpoint may have beside its numbers."""
    return OVERHEAD * files + PER_MATRIX * matrices * NUMBERS


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_bytes(written, strategy, rank):
    checkpoint = written(strategy, rank)
    adapter = matrices(checkpoint)
    trained = sum(matrix.numel() for matrix in adapter.values())
    size = sum(file.stat().st_size for file in files(checkpoint))
    least = trained * FLOAT32 * NUMBERS
    most = least + allowance(len(files(checkpoint)), len(adapter))
    if rank == RANKS[1]:
        assert most < trained * FLOAT32 * (NUMBERS + 1)  # another copy would show
    print(
        f"\n{strategy:8} rank {rank:3}: {size:9,} bytes, {size / least:5.2f} x weight and moments"
    )
    assert least <= size <= most


@pytest.mark.parametrize("processes", [1, 8, 64])
def test_llama_2_7b_at_rank_64_by_count(processes):
    """32 layers, of which 4 maps are 4096 -> 4096 and 3 between 4096 and 11008."""
    trained = 64 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    most = trained * FLOAT32 * NUMBERS + allowance(2 * processes, 32 * 7 * 2)
    assert 1.9e9 < most < 2e9


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_nothing_of_the_base_is_inside(written, babyllama361, strategy):
    checkpoint = written(strategy, 4)
    content = b"".join(file.read_bytes() for file in files(checkpoint))
    adapter = matrices(checkpoint)
    # A process may hold a part of a matrix only: of a base's matrix, any 64 bytes in a row tell.
    assert any(_piece(matrix, 0) in content for matrix in adapter.values())
    for name, weight in load_file(babyllama361 / "model.safetensors").items():
        for start in range(0, weight.numel() - 16, max(1, weight.numel() // 8)):
            assert _piece(weight, start) not in content, name


def _piece(matrix, start):
    return matrix.detach().contiguous().view(-1)[start : start + 16].numpy().tobytes()


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_names_of_a_file(written, strategy):
    checkpoint = torch.load(written(strategy, 4), weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names == {f"model.{name}" for name in matrices(written(strategy, 4))}
    [optimizer] = checkpoint["optimizer_states"]
    assert len(optimizer["state"]) == len(names)
    for entries in optimizer["state"].values():
        assert set(entries) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_names_of_a_folder(written, strategy):
    checkpoint = written(strategy, 4)
    names = {f"model.{name}" for name in matrices(checkpoint)}
    states = [file for file in files(checkpoint) if file.name.endswith("model_states.pt")]
    assert len(states) == (2 if strategy == "zero3" else 1)
    for file in states:
        content = load_plain(file, DEEPSPEED_CLASSES)
        assert content["frozen_param_fragments"] is None
        assert set(content["module"]) <= names
        assert not any(weight.numel() for weight in content["module"].values())
