import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from rslightning.callbacks import MergeAdapters, RunSummary, TrainableCheckpoint, run_summary
from rslightning.errors import UserError
from rslightning.rslora import AdapterSpec
from rslightning.rslora.linear import adapter_layers


@pytest.fixture
def said(caplog):
    """Return the function that gives what was told to the user, as one text."""
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def fit(make_trainer, module, data, callbacks=(), **options):
    options = {"max_steps": 3, **options}
    trainer = make_trainer(callbacks=[*callbacks, RunSummary()], **options)
    trainer.fit(module, data)
    return trainer


def test_the_start_says_what_will_be_trained(make_trainer, make_module, make_data, said, tmp_path):
    module = make_module()
    fit(make_trainer, module, make_data(), limit_val_batches=0, accumulate_grad_batches=2)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    share = f"{100 * trained / (frozen + trained):.2f}%"
    for line in (
        f"base       {module.base_model}, {frozen:,} parameters",
        f"train      {trained:,} parameters ({share} of {frozen + trained:,})",
        "adapters   rslora on 14 linear modules: rank 3, gamma 2.887",  # 5 / sqrt(3)
        "step       4 examples x 128 tokens x 2 micro-batches x 1 devices = at most 1,024 tokens",
        "optimizer  AdamW, lr 0.01",
        "memory     about 0.0",
        f"folder     {tmp_path}",
    ):
        assert f"  {line}" in said()


def test_ranks_that_differ_are_a_range(make_trainer, make_module, make_data, said):
    spec = AdapterSpec(rank=4, alpha=8.0, rank_pattern={"q_proj": 16})
    fit(make_trainer, make_module(adapter=spec), make_data(), limit_val_batches=0)
    assert "rslora on 14 linear modules: rank 4 to 16, gamma 2 to 4" in said()


def test_entries_that_zero_3_keeps_elsewhere_are_counted():
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_numel = 35
    assert run_summary._entries(parameter) == 35
    assert run_summary._entries(torch.nn.Parameter(torch.empty(3, 4))) == 12


def test_full_fine_tuning_is_called_so(make_trainer, make_module, make_data, said):
    module = make_module(adapter=None)
    fit(make_trainer, module, make_data(), limit_val_batches=0)
    total = sum(p.numel() for p in module.parameters())
    assert f"base       {module.base_model}, {total:,} parameters" in said()
    assert f"train      {total:,} parameters (100.00% of {total:,})" in said()
    assert "adapters   none (full fine-tuning)" in said()


def test_packed_weights_are_counted_as_entries_and_as_bytes(
    make_trainer, make_module, make_data, said, monkeypatch
):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    plain = make_module()
    plain.configure_model()
    linear = sum(layer.base.weight.numel() for _, layer in adapter_layers(plain))
    frozen = sum(p.numel() for p in plain.parameters() if not p.requires_grad)
    found = []
    original = run_summary.estimate_memory
    monkeypatch.setattr(
        run_summary, "estimate_memory", lambda *a, **k: found.append(original(*a, **k)) or found[-1]
    )
    for quantization in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        module = make_module(quantization=quantization)
        fit(make_trainer, module, make_data(), limit_val_batches=0, max_steps=1)
    assert said().count(f"base       {plain.base_model}, {frozen:,} parameters") == 2
    others = 4 * (frozen - linear)
    scales = 4 * linear // 64  # of blocks, of 4-bit entries alone
    assert [x.frozen for x in found] == [others + linear // 2 + scales, others + linear]


def test_what_a_gpu_took_is_told_beside_the_estimate(
    make_trainer, make_module, make_data, said, monkeypatch
):
    steps, estimates, original = [], [], run_summary.estimate_memory

    def estimate(*arguments):
        estimates.append(original(*arguments).total)
        return original(*arguments)

    def peak(device):
        steps.append(trainer.global_step)
        return 3 * estimates[0] // 2

    monkeypatch.setattr(run_summary, "estimate_memory", estimate)
    monkeypatch.setattr(run_summary, "_peak_memory", peak)
    trainer = make_trainer(
        callbacks=[RunSummary()], max_steps=4, accumulate_grad_batches=2, limit_val_batches=0
    )
    trainer.fit(make_module(), make_data())
    assert steps == [2]  # the optimizer's state is there in the second step
    gib = 1.5 * estimates[0] / 2**30
    assert said().count(f"  memory     {gib:.2f} GiB at most so far, 1.50 of the estimate") == 1
    assert said().count("of the estimate") == 1


def test_what_a_cpu_took_is_not_told(make_trainer, make_module, make_data, said):
    fit(make_trainer, make_module(), make_data(), limit_val_batches=0)
    assert "memory     about " in said()
    assert "of the estimate" not in said()


def test_what_a_gpu_took_is_told_without_an_estimate(
    make_trainer, make_module, make_data, said, monkeypatch
):
    def refuse(*arguments):
        raise UserError("This family is unknown.")

    monkeypatch.setattr(run_summary, "estimate_memory", refuse)
    monkeypatch.setattr(run_summary, "_peak_memory", lambda device: 3 * 2**30)
    fit(make_trainer, make_module(), make_data(), limit_val_batches=0)
    assert "  memory     not estimated: This family is unknown." in said()
    assert "  memory     3.00 GiB at most so far\n" in said()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_peak_is_what_the_allocator_says():
    device = torch.device("cuda", 0)
    held = torch.zeros(1 << 20, device=device)
    peak = run_summary._peak_memory(device)
    assert peak >= held.nbytes
    assert peak == torch.cuda.max_memory_allocated(device)


def test_the_end_counts_real_tokens_and_targets(
    make_trainer, make_module, make_data, said, monkeypatch
):
    data = make_data()
    times = iter([100.0, 104.0])  # start and end of training
    monkeypatch.setattr(run_summary, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    fit(make_trainer, make_module(), data, limit_val_batches=0)
    again = make_data()
    again.setup("fit")
    batches = [batch for _, batch in zip(range(3), again.train_dataloader(), strict=False)]
    tokens = sum(int((batch.input_ids != data.pad_id).sum()) for batch in batches)
    targets = sum(int((batch.labels != -100).sum()) for batch in batches)
    found = re.search(
        r"trained 3 steps on ([\d,]+) tokens in ([\d.]+) s: ([\d,]+) tokens/s, "
        r"of which ([\d,]+) targets/s",
        said(),
    )
    total, seconds, rate, target_rate = (float(x.replace(",", "")) for x in found.groups())
    assert (total, seconds) == (tokens, 4.0)
    assert (rate, target_rate) == pytest.approx((tokens / 4.0, targets / 4.0), abs=0.5)


def tokens_trained(text):
    """Return (steps, tokens) of each fit that a text tells of."""
    found = re.findall(r"trained (\d+ steps(?: after step \d+)?) on ([\d,]+) tokens", text)
    return [(steps, int(tokens.replace(",", ""))) for steps, tokens in found]


def test_a_resumed_run_tells_of_its_own_steps(make_trainer, make_module, make_data, said, tmp_path):
    data = make_data()
    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    fit(make_trainer, make_module(), data, [TrainableCheckpoint()], max_steps=2, **options)
    trainer = make_trainer(max_steps=5, limit_val_batches=0, callbacks=[summary := RunSummary()])
    trainer.fit(make_module(), make_data(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    again = make_data()
    again.setup("fit")
    batches = [batch for _, batch in zip(range(5), again.train_dataloader(), strict=False)]
    tokens = [int((batch.input_ids != data.pad_id).sum()) for batch in batches]
    expected = [("2 steps", sum(tokens[:2])), ("3 steps after step 2", sum(tokens[2:]))]
    assert tokens_trained(said()) == expected
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[summary])
    trainer.fit(make_module(), make_data())  # what the callback counted before is over
    assert tokens_trained(said()) == [*expected, ("1 steps", tokens[0])]


def test_the_tokens_of_all_processes_are_counted(
    make_trainer, run_processes, said, tmp_path, make_module
):
    """Also where one process has longer rows than the other."""
    module = make_module()
    module.configure_model()

    class Foreign(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = module.model

        def training_step(self, batch, batch_idx):
            return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def rank(number):
        ids = torch.ones(2, 5 if number == 0 else 11, dtype=torch.int64)
        rows = DataLoader([{"input_ids": ids, "labels": ids}] * 3, batch_size=None)
        options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        fit(make_trainer, Foreign(), rows, limit_val_batches=0, **options)
        (tmp_path / f"{number}.txt").write_text(said())

    assert run_processes(2, rank) == [0, 0]
    assert tokens_trained((tmp_path / "0.txt").read_text()) == [("3 steps", 3 * 2 * (5 + 11))]
    assert "trained" not in (tmp_path / "1.txt").read_text()


def test_labels_that_are_no_tokens_are_no_targets(make_trainer, make_module, said):
    callback, module = RunSummary(), make_module()
    trainer = make_trainer(max_steps=1)
    ids = torch.ones(3, 7, dtype=torch.int64)
    batch = BatchEncoding({"input_ids": ids, "labels": torch.tensor([0, 1, 2])})
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    callback.on_train_end(trainer, module)
    assert "on 21 tokens in " in said()
    assert said().endswith("of which 0 targets/s")


def test_validation_is_no_training_time(make_trainer, make_module, monkeypatch, said):
    trainer, module, callback = make_trainer(max_steps=1), make_module(), RunSummary()
    times = iter([100.0, 103.0, 110.0, 112.0])  # validation takes 7 of the 12 seconds
    monkeypatch.setattr(run_summary, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    callback.on_train_start(trainer, module)
    callback.on_validation_start(trainer, module)
    callback.on_validation_end(trainer, module)
    callback.on_train_end(trainer, module)
    assert "on 0 tokens in 5.0 s" in said()


def test_the_end_says_where_everything_is(make_trainer, make_module, make_data, said, tmp_path):
    callbacks = [TrainableCheckpoint(), MergeAdapters()]
    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    fit(make_trainer, make_module(), make_data(), callbacks, **options)
    end = said().partition("trained 3 steps")[2]
    for name in ("checkpoints", "adapter", "merged"):
        assert re.search(rf"^  {name} +{tmp_path / name}$", end, re.MULTILINE)
        assert (tmp_path / name).is_dir()


def test_what_was_not_written_is_not_named(make_trainer, make_module, make_data, said):
    fit(make_trainer, make_module(), make_data(), limit_val_batches=0)
    end = said().partition("trained 3 steps")[2]
    assert "merged" not in end
    assert "checkpoints" not in end


@pytest.mark.parametrize("streaming", [False, True])
def test_what_became_of_the_rows_is_logged(
    make_trainer, make_module, make_data, tmp_path, streaming
):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = make_data(max_length=60, streaming=streaming, held_out_examples=6)
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(make_trainer, make_module(), data, limit_val_batches=0, logger=logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for part, counts in data.counts.items():
        for name, value in counts.as_dict().items():
            steps = ([3] if part == "training" else [0, 3]) if streaming else [0]
            found = [(e.step, e.value) for e in events.Scalars(f"data/{part}/{name}")]
            assert found == [(step, value) for step in steps]
    again = make_data(max_length=1000)
    again.setup("fit")
    longer = sum(length > 60 for block in again.train for length in block.lengths)
    assert data.counts["training"].rows_cut == longer > 0
