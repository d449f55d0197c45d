"""Rates against closed forms on a clock of the test's own; counts against plain loops."""

import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from rslightning.batch import IGNORED, Batch
from rslightning.callbacks import TokenThroughputMonitor, training_clock
from rslightning.callbacks.throughput import (
    count_targets,
    count_tokens,
    linear_maps,
    peak_memory_bytes,
    shifts_labels,
    uncountable,
)
from rslightning.cost import GIB, LayerShape, LinearMap, training_flops
from rslightning.errors import UserError
from rslightning.rslora import AdapterSpec, adapter_state_dict

WIDTH, VOCABULARY = 6, 19
COMPUTING, FETCHING = 2.0, 0.5  # seconds of a micro-batch


class FakeTime:
    """Stands still until somebody says what takes how long."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(training_clock, "time", fake)
    return fake


class Rows:
    """Micro-batches with 1, 2, ... padded positions; fetching one takes a while."""

    def __init__(self, clock, count, seconds=FETCHING, first=0):
        self.clock, self.count, self.seconds, self.first = clock, count, seconds, first

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError
        self.clock.now += self.seconds
        return token_batch(index + self.first)


def token_batch(index):
    """Return 3 rows of 9 tokens less `index % 5` in the last row; of each row 2 are no target."""
    padded = index % 5
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[-1, 9 - padded :] = 0
    ids = torch.full((3, 9), 1 + index % 7)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :2] = IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def tokens_of(indices):
    return sum(27 - index % 5 for index in indices)


def targets_of(indices):
    return tokens_of(indices) - 6 * len(indices)


class Foreign(LightningModule):
    """Somebody's module, whose every part takes a known time."""

    def __init__(self, clock, rows):
        super().__init__()
        torch.manual_seed(0)
        self.clock, self.rows = clock, rows
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def training_step(self, batch, batch_idx):
        self.clock.now += COMPUTING
        logits = self.head(self.embedding(batch["input_ids"]))[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        self.clock.now += 100

    def on_save_checkpoint(self, checkpoint):
        self.clock.now += 1000  # after the callbacks' hook

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=None)

    def val_dataloader(self):
        return DataLoader([token_batch(0)], batch_size=None)


def fit(make_trainer, folder, module, *callbacks, **options):
    """Train with a logger; return tag -> [(step, value)]."""
    defaults = {"limit_val_batches": 0, "use_distributed_sampler": False}
    trainer = make_trainer(
        callbacks=list(callbacks),
        logger=TensorBoardLogger(str(folder), name="", version=""),
        **(defaults | options),
    )
    trainer.fit(module)
    return read_scalars(folder) if trainer.is_global_zero else {}


def read_scalars(folder, prefix="perf/"):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(prefix)]
    return {
        tag.removeprefix(prefix): [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags
    }


def values_of(found, name):
    return [value for _, value in found[name]]


def test_rates_of_a_run_that_accumulates(make_trainer, tmp_path, clock):
    module = Foreign(clock, Rows(clock, 14))
    monitor = TokenThroughputMonitor(every_n_steps=2, peak_tflops=1e-9)
    found = fit(make_trainer, tmp_path, module, monitor, max_steps=6, accumulate_grad_batches=2)
    intervals = [[2, 3, 4, 5], [6, 7, 8, 9]]  # of steps 1 and 2, of steps 3 and 4
    seconds = 4 * (COMPUTING + FETCHING)
    tokens = [tokens_of(each) / seconds for each in intervals]
    assert tokens[0] != tokens[1]
    assert [step for step, _ in found["tokens_per_second"]] == [2, 4]
    assert values_of(found, "tokens_per_second") == pytest.approx(tokens)
    targets = [targets_of(each) / seconds for each in intervals]
    assert values_of(found, "target_tokens_per_second") == pytest.approx(targets)
    assert values_of(found, "step_seconds") == [seconds / 2] * 2
    assert values_of(found, "data_wait_share") == pytest.approx([FETCHING / 2.5] * 2)
    flops = [6 * WIDTH * VOCABULARY * each for each in tokens]
    assert values_of(found, "tflops_per_second") == pytest.approx([each / 1e12 for each in flops])
    assert values_of(found, "mfu") == pytest.approx([each / 1e3 for each in flops])
    assert set(found) == {
        "tokens_per_second", "target_tokens_per_second", "step_seconds", "data_wait_share",
        "tflops_per_second", "mfu", "memory_gib",
    }  # fmt: skip


class Save(Callback):
    """Saves after every fourth micro-batch, between two of them, as Lightning's own does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 4 == 3:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/{batch_idx}.ckpt")


@pytest.mark.parametrize("validating", [False, True])
def test_validation_and_checkpoints_take_no_time(make_trainer, tmp_path, clock, validating):
    module = Foreign(clock, Rows(clock, 13))
    options = (
        {"limit_val_batches": 1, "val_check_interval": 4, "num_sanity_val_steps": 1}
        if validating
        else {}
    )
    callbacks = [] if validating else [Save()]
    found = fit(
        make_trainer,
        tmp_path,
        module,
        TokenThroughputMonitor(4),
        *callbacks,
        max_steps=13,
        **options,
    )
    assert clock.now > 1000 + (300 if validating else 3000)
    # Micro-batches 1 to 4, 5 to 8, 9 to 12; before 4, 8 and 12 there is a pause, with the fetching.
    seconds = 4 * (COMPUTING + FETCHING) - FETCHING
    assert values_of(found, "step_seconds") == [seconds / 4] * 3
    assert values_of(found, "data_wait_share") == pytest.approx([3 * FETCHING / seconds] * 3)
    expected = [tokens_of(range(4 * i + 1, 4 * i + 5)) / seconds for i in range(3)]
    assert values_of(found, "tokens_per_second") == pytest.approx(expected)


class SaveInTheStep(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 3:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/inside.ckpt")


def test_what_is_saved_within_a_micro_batch_takes_its_time(make_trainer, tmp_path, clock):
    module = Foreign(clock, Rows(clock, 5))
    found = fit(
        make_trainer, tmp_path, module, TokenThroughputMonitor(1), SaveInTheStep(), max_steps=5
    )
    step = COMPUTING + FETCHING
    assert values_of(found, "step_seconds") == [step, step, step + 1000, step]


def test_processes_add_their_tokens(make_trainer, run_processes, tmp_path, monkeypatch):
    def rank(number):
        fake = FakeTime()
        monkeypatch.setattr(training_clock, "time", fake)
        rows = Rows(fake, 6, seconds=FETCHING + number, first=number)
        monitor = TokenThroughputMonitor(2, peak_tflops=1e-9)
        options = {"strategy": "ddp", "devices": 2, "max_steps": 6}
        fit(make_trainer, tmp_path, Foreign(fake, rows), monitor, **options)

    assert run_processes(2, rank) == [0, 0]
    found, seconds = read_scalars(tmp_path), 2 * (COMPUTING + FETCHING)
    indices = [[1, 2, 2, 3], [3, 4, 4, 5]]  # of both processes
    tokens = [tokens_of(each) / seconds for each in indices]
    assert values_of(found, "tokens_per_second") == pytest.approx(tokens)
    targets = [targets_of(each) / seconds for each in indices]
    assert values_of(found, "target_tokens_per_second") == pytest.approx(targets)
    per_device = [6 * WIDTH * VOCABULARY * each / 2 / 1e3 for each in tokens]
    assert values_of(found, "mfu") == pytest.approx(per_device)
    waited = 2 * (FETCHING + 1)  # the second process
    assert values_of(found, "data_wait_share") == pytest.approx([waited / seconds] * 2)


def test_a_monitored_run_is_the_same_run(make_trainer, make_module, make_data, tmp_path):
    runs = []
    for callbacks in ([], [TokenThroughputMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        folder = tmp_path / str(len(callbacks))
        logger = TensorBoardLogger(str(folder), name="", version="")
        trainer = make_trainer(
            max_steps=4,
            accumulate_grad_batches=2,
            logger=logger,
            callbacks=callbacks,
            log_every_n_steps=1,
        )
        module = make_module(adapter=AdapterSpec(rank=3, alpha=5.0, dropout=0.1))
        trainer.fit(module, make_data())
        runs.append((read_scalars(folder, "train/"), adapter_state_dict(module), torch.rand(3)))
    (plain_loss, plain, plain_draw), (monitored_loss, monitored, draw) = runs
    assert plain_loss == monitored_loss
    assert len(plain_loss["loss"]) == 4
    assert all(torch.equal(monitored[name], tensor) for name, tensor in plain.items())
    assert torch.equal(plain_draw, draw)
    found = read_scalars(tmp_path / "1")
    assert [step for step, _ in found["tflops_per_second"]] == [1, 2, 3]
    assert "mfu" not in found  # nobody knows what this CPU could do


class SlowRows:
    """Micro-batches that take `seconds` to fetch."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 7

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return token_batch(index)


def test_a_slow_loader_is_waited_for(make_trainer, tmp_path):
    shares, seconds = {}, {}
    for pause in (0.0, 0.1):
        module = Foreign(FakeTime(), SlowRows(pause))
        folder = tmp_path / str(pause)
        found = fit(make_trainer, folder, module, TokenThroughputMonitor(6), max_steps=7)
        (shares[pause],), (seconds[pause],) = (
            values_of(found, name) for name in ("data_wait_share", "step_seconds")
        )
    assert shares[0.0] < shares[0.1] <= 1
    assert 0.1 <= shares[0.1] * seconds[0.1] < 0.1 + seconds[0.0] + 0.05


def layouts():
    """Yield (batch, lengths of its examples, number of targets)."""
    packed = Batch(
        input_ids=torch.zeros(2, 8, dtype=torch.int64),
        labels=torch.tensor(
            [[-100, 5, 5, -100, 5, 5, 5, 5], [-100, -100, 5, -100, 5, 5] + [-100] * 2]
        ),
        attention_mask=torch.tensor([[1] * 8, [1] * 6 + [0] * 2]),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 0, 0]]),
    )
    yield packed, [3, 5, 3, 3], 9
    left = Batch(
        torch.zeros(2, 5, dtype=torch.int64),
        torch.full((2, 5), -100),
        torch.tensor([[0, 0, 1, 1, 1], [1] * 5]),
    )
    yield left, [3, 5], 0
    bare = {"input_ids": torch.zeros(3, 4, dtype=torch.int64)}
    yield bare, [4, 4, 4], 0
    whole = bare | {"labels": bare["input_ids"], "position_ids": torch.arange(4)[None]}
    yield whole, [4, 4, 4], 9  # positions [1, 4] say nothing of where rows end
    flat = SimpleNamespace(
        input_ids=torch.zeros(1, 9, dtype=torch.int64),
        labels=torch.tensor([[-100, 1, 1, 1, -100, 1, 1, -100, 1]]),
        attention_mask=None,
        position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]),
    )
    yield flat, [4, 3, 2], 6


@pytest.mark.parametrize(("batch", "lengths", "targets"), list(layouts()))
def test_tokens_targets_and_squared_lengths(batch, lengths, targets):
    expected = [sum(lengths), targets, sum(length**2 for length in lengths)]
    assert count_tokens(batch).tolist() == expected


IDS = torch.zeros(3, 7, dtype=torch.int64)
EVERYWHERE = torch.ones_like(IDS)


@pytest.mark.parametrize(
    ("labels", "is_shifted", "targets"),
    [
        (EVERYWHERE, True, 3 * 6),
        (EVERYWHERE, False, 3 * 7),
        (EVERYWHERE[:, :4], False, 3 * 4),  # what the decoder writes
        (EVERYWHERE[:, :4].masked_fill(torch.arange(4) > 1, -100), False, 3 * 2),
        (EVERYWHERE[:, :4], True, None),
        (EVERYWHERE[:, 0], True, None),  # classes
        (EVERYWHERE[:, 0], False, None),
        (EVERYWHERE[:, :4].float(), False, None),  # a probability of each class
        (None, True, None),
    ],
)
def test_targets_are_counted_where_they_can_be_told(labels, is_shifted, targets):
    batch = {"input_ids": IDS, "labels": labels}
    found = count_targets(batch, is_shifted)
    assert (None if found is None else found.item()) == targets
    assert count_tokens(batch, is_shifted).tolist() == [21, targets or 0, 3 * 49]


def test_whose_labels_are_shifted(tiny_llama, make_gpt2):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertConfig(vocab_size=VOCABULARY, intermediate_size=8, **sizes)
    t5 = T5Config(vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    for model in (tiny_llama, make_gpt2(), nn.Linear(2, 3)):
        assert shifts_labels(nn.Sequential(model))
    for model in (BertForMaskedLM(bert), BertForTokenClassification(bert)):
        assert not shifts_labels(nn.Sequential(model))
    assert not shifts_labels(nn.Sequential(T5ForConditionalGeneration(t5)))


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_targets_of_other_models_than_causal_ones(
    make_trainer, tmp_path, clock, is_encoder_decoder
):
    class Classes(Foreign):
        def training_step(self, batch, batch_idx):
            self.clock.now += COMPUTING
            logits = self.head(self.embedding(batch["input_ids"]))
            return logits.mean() + 0 * batch["labels"].sum()

    module = Classes(clock, Rows(clock, 4))
    module.config = PreTrainedConfig(is_encoder_decoder=is_encoder_decoder)
    labels = EVERYWHERE[:, :4] if is_encoder_decoder else EVERYWHERE[:, 0]
    rows = [token_batch(index) | {"labels": labels} for index in range(4)]
    module.train_dataloader = lambda: DataLoader(rows, batch_size=None)
    found = fit(make_trainer, tmp_path, module, TokenThroughputMonitor(1), max_steps=4)
    assert ("target_tokens_per_second" in found) == is_encoder_decoder
    assert len(found["tokens_per_second"]) == 3
    if is_encoder_decoder:  # fetching takes no time here
        assert values_of(found, "target_tokens_per_second") == [12 / COMPUTING] * 3


@pytest.mark.parametrize("batch", [torch.zeros(2, 3), (1, 2), {"pixels": torch.zeros(2)}, None])
def test_no_token_ids(batch):
    assert count_tokens(batch) is None


def test_batches_without_tokens_are_timed(make_trainer, tmp_path, caplog):
    with caplog.at_level("INFO"):
        found = fit(make_trainer, tmp_path, BoringModel(), TokenThroughputMonitor(2), max_steps=5)
    assert set(found) == {"step_seconds", "data_wait_share", "memory_gib"}
    assert [step for step, _ in found["step_seconds"]] == [2, 4]
    lines = [line for line in caplog.messages if line.startswith("throughput")]
    assert lines == ["throughput: batches have no `input_ids`; only times and memory are logged."]


class Blank(Callback):
    """Leaves no token in two of the micro-batches."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in (2, 3):
            batch["attention_mask"].zero_()


def test_steps_without_any_token_belong_to_the_next_interval(make_trainer, tmp_path, clock):
    module = Foreign(clock, Rows(clock, 6))
    monitor = TokenThroughputMonitor(1)
    found = fit(make_trainer, tmp_path, module, Blank(), monitor, max_steps=6)
    assert [step for step, _ in found["tokens_per_second"]] == [1, 4, 5]
    assert values_of(found, "tokens_per_second")[1] == pytest.approx(tokens_of([4]) / 7.5)
    assert values_of(found, "step_seconds") == [2.5] * 3


def test_every_batch_of_manual_optimization_is_a_step(make_trainer, tmp_path):
    found = fit(
        make_trainer, tmp_path, ManualOptimBoringModel(), TokenThroughputMonitor(2),
        max_epochs=1, limit_train_batches=7,
    )  # fmt: skip
    assert [step for step, _ in found["step_seconds"]] == [2, 4, 6]


def test_a_second_fit_starts_anew(make_trainer, tmp_path, clock):
    monitor = TokenThroughputMonitor(1)
    for name in "ab":
        module = Foreign(clock, Rows(clock, 3))
        found = fit(make_trainer, tmp_path / name, module, monitor, max_steps=3)
        assert [step for step, _ in found["tokens_per_second"]] == [1, 2]
        assert values_of(found, "step_seconds") == [2.5, 2.5]
        clock.now += 1000


class Watched(Callback):
    """Lets a monitor run, and counts how often it waits for the device."""

    def __init__(self, monitor, monkeypatch):
        self.monitor, self.waits, self.counting = monitor, [], False
        self.on_train_start = monitor.on_train_start
        self.on_train_batch_start = monitor.on_train_batch_start
        for name in ("tolist", "item", "cpu", "numpy", "__int__", "__float__", "__bool__"):
            self.watch(name, monkeypatch)

    def watch(self, name, monkeypatch):
        plain = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            if self.counting:
                self.waits[-1] += 1
            return plain(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def on_train_batch_end(self, *args):
        self.waits.append(0)
        self.counting = True
        self.monitor.on_train_batch_end(*args)
        self.counting = False


def test_only_steps_that_log_wait_for_the_device(make_trainer, tmp_path, clock, monkeypatch):
    watched = Watched(TokenThroughputMonitor(3), monkeypatch)
    found = fit(
        make_trainer, tmp_path, Foreign(clock, Rows(clock, 14)), watched,
        max_steps=7, accumulate_grad_batches=2,
    )  # fmt: skip
    assert len(found["tokens_per_second"]) == 2
    assert watched.waits == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]  # steps 0, 3 and 6


def test_maps_of_adapters_in_the_order_of_the_model(tiny_llama):
    from rslightning.rslora import inject_adapters

    inject_adapters(tiny_llama, AdapterSpec(rank=5, targets=["q_proj", "up_proj"]))
    first = list(linear_maps(tiny_llama.model.layers[0].self_attn))
    assert first[:2] == [
        LayerShape(24, 24, 5, 0, input_gradient=False),
        LinearMap(24, 12, weight_gradient=False, input_gradient=True),
    ]
    maps = list(linear_maps(tiny_llama))
    assert len(maps) == 2 * 7 + 1
    assert maps[7] == LayerShape(24, 24, 5, 0, input_gradient=True)
    assert maps[-1] == LinearMap(24, 53, weight_gradient=False, input_gradient=True)


def test_a_llamas_operations_are_logged_with_its_attention(
    make_trainer, make_module, make_data, tmp_path, monkeypatch
):
    module = make_module()
    seen = []
    monkeypatch.setattr(
        "rslightning.callbacks.throughput.training_flops",
        lambda *args: seen.append(args) or training_flops(*args),
    )
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    trainer = make_trainer(max_steps=2, logger=logger, callbacks=[TokenThroughputMonitor(1)])
    trainer.fit(module, make_data(packing=True, max_length=200))
    ((maps, tokens, squares, width, calls),) = seen
    assert len(maps) == 2 * 7 + 1
    assert calls == 1
    assert width == 2 * 24
    assert tokens < squares < tokens * 200  # examples, not blocks
    (seconds,) = values_of(read_scalars(tmp_path), "step_seconds")
    (rate,) = values_of(read_scalars(tmp_path), "tflops_per_second")
    assert rate * seconds * 1e12 == pytest.approx(training_flops(*seen[0]), rel=1e-5)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Embedding(5, 3), nn.Conv1d(3, 3, 2))


def test_what_cannot_be_counted_is_named(tiny_llama, make_gpt2):
    assert uncountable(tiny_llama) is None
    assert uncountable(make_gpt2()) is None
    assert uncountable(Convolution()) == "inner.1 multiplies by more than linear maps"
    assert "in_proj" not in (reason := uncountable(LightningTransformer(vocab_size=7)))
    assert reason.endswith("multiplies by more than linear maps")
    tiny_llama.config.is_encoder_decoder = True
    assert uncountable(tiny_llama) == "encoder and decoder see different tokens"


def test_no_operations_are_logged_where_they_cannot_be_counted(
    make_trainer, tmp_path, clock, caplog
):
    module = Foreign(clock, Rows(clock, 3))
    module.extra = Convolution()
    module.extra.requires_grad_(False)
    with caplog.at_level("INFO"):
        found = fit(make_trainer, tmp_path, module, TokenThroughputMonitor(1), max_steps=3)
    assert "tokens_per_second" in found
    assert "tflops_per_second" not in found
    assert any(
        line == "throughput: no TFLOP/s are logged, since extra.inner.1 multiplies by more than "
        "linear maps."
        for line in caplog.messages
    )


def test_the_peak_memory_of_this_process():
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(2**28, dtype=torch.uint8)
    grown = peak_memory_bytes(torch.device("cpu"))
    assert before > 2**26
    assert grown >= before
    assert grown < before + 2**29
    del block
    assert peak_memory_bytes(torch.device("cpu")) >= grown
    assert grown < 64 * GIB


def test_arguments():
    with pytest.raises(UserError, match=r"throughput\.every_n_steps is 0; at least 1\."):
        TokenThroughputMonitor(every_n_steps=0)
    with pytest.raises(UserError, match=r"throughput\.peak_tflops is -1; positive, or null\."):
        TokenThroughputMonitor(peak_tflops=-1)
