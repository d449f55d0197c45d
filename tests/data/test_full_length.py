"""On a GPU packed batches, and those of two steps, are padded to `max_length`: no more changes."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from rslightning.batch import IGNORED, Batch
from rslightning.callbacks import BeforeAfter


class Shapes(Callback):
    """Keep the optimizer step, the padded length and the losses of what is trained on."""

    def __init__(self):
        self.seen, self.losses = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert {x.shape for x in batch if x is not None and x.ndim} == {batch.input_ids.shape}
        self.seen.append((trainer.global_step, batch.input_ids.shape[1]))

    def on_train_batch_end(self, trainer, *_):
        self.losses.append(float(trainer.callback_metrics.get("train/loss", 0)))


@pytest.mark.parametrize("packing", [False, True])
def test_the_first_steps_on_a_gpu_are_as_long_as_any(
    make_module, make_data, make_trainer, monkeypatch, packing
):
    def fit():
        shapes = Shapes()
        torch.manual_seed(7)  # A is drawn
        module = make_module(optimizer=partial(torch.optim.SGD, lr=0.1))
        trainer = make_trainer(
            callbacks=[shapes], max_steps=4, accumulate_grad_batches=2, limit_val_batches=1
        )
        trainer.fit(module, make_data(packing=packing, max_length=200))
        return shapes, {name: x.clone() for name, x in module.trainable_state().items()}

    plain, expected = fit()
    monkeypatch.setattr("rslightning.data.base._is_on_gpu", lambda tensor: True)
    filled, found = fit()
    assert max(length for _, length in plain.seen) < 200 or packing
    assert [step for step, _ in filled.seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    lengths = [length for _, length in plain.seen]
    lengths[: len(lengths) if packing else 4] = [200] * (len(lengths) if packing else 4)
    assert [length for _, length in filled.seen] == lengths
    assert filled.losses == pytest.approx(plain.losses, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def test_what_looks_at_the_model_before_the_first_step_sees_no_padding(
    make_module, make_data, make_trainer, monkeypatch
):
    lengths = []
    monkeypatch.setattr("rslightning.data.base._is_on_gpu", lambda tensor: True)
    original = Batch.filled_up
    monkeypatch.setattr(
        Batch, "filled_up", lambda batch, n: lengths.append(n) or original(batch, n)
    )
    data = make_data()
    trainer = make_trainer(callbacks=[BeforeAfter()], max_steps=1, limit_val_batches=1)
    trainer.fit(make_module(), data)
    assert lengths == [data.max_length]  # of the one step


def test_padding_is_no_target_and_seen_by_nobody():
    ids = torch.arange(6).reshape(2, 3)
    batch = Batch(ids, ids + 10, torch.ones_like(ids), None, torch.tensor(5.0))
    filled = batch.filled_up(5)
    assert filled.input_ids.tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]]
    assert filled.labels.tolist() == [
        [10, 11, 12, IGNORED, IGNORED],
        [13, 14, 15, IGNORED, IGNORED],
    ]
    assert filled.attention_mask.tolist() == [[1, 1, 1, 0, 0]] * 2
    assert filled.position_ids is None
    assert filled.step_targets == 5
    assert batch.filled_up(3) is batch
    assert batch.filled_up(2) is batch
    packed = batch._replace(position_ids=torch.tensor([[0, 1, 0], [0, 1, 2]]))
    assert packed.filled_up(4).position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]
