"""Micro-batches and processes give the gradient of the one big batch: nats over targets."""

import pytest
import torch

from rslightning.rslora import adapter_state_dict


def train(make_trainer, make_module, make_data, batch_size, steps, packing, **options):
    """Return the adapters after some steps of SGD, whose updates show a gradient's size."""
    torch.manual_seed(0)
    module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    data = make_data(batch_size=batch_size, packing=packing, max_length=64)
    trainer = make_trainer(
        max_steps=steps, limit_val_batches=0, use_distributed_sampler=False, **options
    )
    trainer.fit(module, data)
    return {name: tensor.clone() for name, tensor in adapter_state_dict(module.model).items()}


def assert_close(found, expected):
    moved = 0.0
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6 * max(scale, 1.0))
        moved += scale if name.endswith("lora_b") else 0.0
    assert moved > 1e-3  # B has left zero


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_are_one_batch(make_trainer, make_module, make_data, packing):
    # Two passes of 24 rows: 24 = 16 + 8, so that the second step of a pass has an open window.
    options = {"steps": 4, "packing": packing}
    makers = (make_trainer, make_module, make_data)
    whole = train(*makers, batch_size=16, **options)
    split = train(*makers, batch_size=4, accumulate_grad_batches=4, **options)
    assert_close(split, whole)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_processes_are_one_batch(
    make_trainer, make_module, make_data, run_processes, tmp_path, micro_batches
):
    makers = (make_trainer, make_module, make_data)
    options = {"steps": 4, "packing": False, "accumulate_grad_batches": micro_batches}
    data = make_data(max_length=64)
    data.setup("fit")  # the cache is there before the fork

    def rank(number):
        adapters = train(*makers, batch_size=5, strategy="ddp", devices=2, **options)
        torch.save(adapters, tmp_path / f"{number}.pt")

    assert run_processes(2, rank) == [0, 0]
    whole = train(*makers, batch_size=10, **options)
    for number in range(2):
        assert_close(torch.load(tmp_path / f"{number}.pt", weights_only=True), whole)
