"""A fit that is resumed in mid-pass ends as if it had not stopped, bit for bit."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from rslightning.callbacks import TrainableCheckpoint
from rslightning.rslora import adapter_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

STREAM = {"streaming": True, "held_out_examples": 7, "shuffle_buffer": 10}


class SeenRows(Callback):
    """Keeps the ids of every batch, padding left out, with its step's targets."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pairs = zip(batch.input_ids, batch.attention_mask, strict=True)
        rows = [ids[mask.bool()].tolist() for ids, mask in pairs]
        self.batches.append([[row for row in rows if row], float(batch.step_targets)])


@pytest.fixture
def fit(make_trainer, make_module, make_data):
    """Return a function that trains and returns (rows of each batch, adapters)."""

    def run(folder, steps, resume=False, data_options=None, **options):
        torch.manual_seed(0)
        module = make_module()
        data = make_data(**({"batch_size": 5} | (data_options or {})))
        seen = SeenRows()
        trainer = make_trainer(
            max_steps=steps,
            limit_val_batches=0,
            callbacks=[TrainableCheckpoint(every_n_steps=100), seen],
            enable_checkpointing=True,
            use_distributed_sampler=False,
            default_root_dir=folder,
            **options,
        )
        last = str(folder / "checkpoints" / "last.ckpt") if resume else None
        trainer.fit(module, data, ckpt_path=last)
        return seen.batches, {k: v.clone() for k, v in adapter_state_dict(module.model).items()}

    return run


def check(fit, folder, first_steps, steps=12, **options):
    """Compare a run of `steps` with one that stopped after `first_steps` of them."""
    rows, adapters = fit(folder / "whole", steps, **options)
    before, _ = fit(folder / "part", first_steps, **options)
    after, resumed = fit(folder / "part", steps, resume=True, **options)
    assert before + after == rows
    assert all(torch.equal(adapters[name], resumed[name]) for name in adapters)
    assert any(bool(tensor.any()) for name, tensor in adapters.items() if name.endswith("lora_b"))
    return rows


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [{}, {"packing": True}, STREAM, STREAM | {"packing": True}])
def test_one_process(fit, tmp_path, workers, kind):
    check(fit, tmp_path, 7, data_options={"num_workers": workers, **kind})


@pytest.mark.parametrize("kind", [{}, STREAM])
def test_with_micro_batches(fit, tmp_path, kind):
    # A pass of 5 batches makes steps of 2, 2 and 1; a stream never ends.
    check(fit, tmp_path, 4, steps=8, data_options=kind, accumulate_grad_batches=2)


@pytest.mark.parametrize("kind", [{}, STREAM])
def test_where_a_limit_cuts_the_window(fit, tmp_path, kind):
    # Epochs of 3 batches make steps of 2 and 1.
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 3, "data_options": kind}
    rows = check(fit, tmp_path, 3, steps=6, **options)
    # Lightning divides a loss by 2, in the short step as well.
    for step in (rows[0:2], rows[2:3], rows[3:5], rows[5:6]):
        assert len({targets for _, targets in step}) == 1
    assert rows[2][1] < rows[0][1]


@pytest.mark.parametrize(
    ("first_steps", "options"),
    [
        (3, {}),  # a pass of 5 batches: steps of 2, 2 and 1
        (2, {"limit_train_batches": 3}),
        (2, {"limit_train_batches": 3, "data_options": STREAM}),
    ],
)
def test_at_the_end_of_a_pass(fit, tmp_path, first_steps, options):
    check(fit, tmp_path, first_steps, steps=8, accumulate_grad_batches=2, **options)


@pytest.mark.parametrize("limit", [1.0, 3])
def test_epochs_that_follow_the_last_one(fit, tmp_path, limit):
    options = {"steps": -1, "limit_train_batches": limit}
    rows, adapters = fit(tmp_path / "whole", max_epochs=3, **options)
    before, _ = fit(tmp_path / "part", max_epochs=1, **options)
    after, resumed = fit(tmp_path / "part", max_epochs=3, resume=True, **options)
    assert before + after == rows
    assert all(torch.equal(adapters[name], resumed[name]) for name in adapters)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [{}, STREAM | {"shuffle_buffer": 5}])
def test_two_processes(fit, make_data, run_processes, tmp_path, workers, kind):
    options = {"batch_size": 3, "num_workers": workers, **kind}
    make_data(**options).setup("fit")  # the cache is there before the fork

    def rank(number):
        rows = check(fit, tmp_path, 5, steps=9, data_options=options, strategy="ddp", devices=2)
        (tmp_path / f"{number}.json").write_text(json.dumps(rows))

    assert run_processes(2, rank) == [0, 0]
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert [targets for _, targets in first] == [targets for _, targets in second]
    assert [rows for rows, _ in first] != [rows for rows, _ in second]
    if not kind:  # a pass: 4 batches of 3 rows for each of two processes
        both = [row for rows, _ in first[:4] + second[:4] for row in rows]
        data = make_data()
        data.setup("fit")
        assert sorted(both) == sorted(block.input_ids.tolist() for block in data.train)


@pytest.mark.parametrize("kind", [{}, STREAM])
def test_targets_of_a_step_are_counted_over_micro_batches(fit, tmp_path, make_data, kind):
    rows, _ = fit(tmp_path, 2, data_options=kind, accumulate_grad_batches=2)
    data = make_data()
    data.setup("fit")
    targets = {tuple(b.input_ids.tolist()): int((b.labels != -100).sum()) for b in data.train}
    for step in (rows[0:2], rows[2:4]):
        total = sum(targets[tuple(row)] for batch, _ in step for row in batch)
        assert [share * 2 for _, share in step] == [total, total]
