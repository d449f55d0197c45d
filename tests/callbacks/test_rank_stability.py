import copy
import math
import random
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn, optim
from torch.utils.data import DataLoader

from rslightning import CausalLMModule
from rslightning.callbacks import RankStabilityReport, TrainableCheckpoint
from rslightning.callbacks import rank_stability as under_test
from rslightning.callbacks.rank_stability import draw_points, fresh_adapters
from rslightning.data import GSM8K
from rslightning.errors import UserError
from rslightning.hf import load_causal_lm
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.spec import AdapterSpec
from rslightning.stats.stability import RankPoint

SEED = 11
SPEC = AdapterSpec(rank=3, alpha=5.0, dropout=0.3)

STREAM = {"streaming": True, "shuffle_buffer": 6, "held_out_examples": 2}

OPTIMIZERS = {
    "sgd": partial(optim.SGD, lr=1e-3),
    "adamw": partial(optim.AdamW, lr=1e-5),
    # Times eps2 = 1e-3 where a weight is 0, as B is: less is lost in the rounding of the logits.
    "adafactor": partial(optim.Adafactor, lr=1e-2),
}


class Recorder(Callback):
    """Keeps the loss of each batch and the ids that were in it."""

    def __init__(self):
        self.losses, self.ids = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.ids.append(batch.input_ids.flatten().tolist())


def fit(make_trainer, module, data, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    options = {"max_steps": 1, "limit_val_batches": 0} | options
    trainer = make_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def measure(make_trainer, module, data, ranks=(4, 32, 256), scalings=("lora", "rslora"), **options):
    report = RankStabilityReport(ranks, scalings)
    fit(make_trainer, module, data, report, **options)
    return report


def first_batch(data):
    """Return the first rows that the data gives to a trainer, without one."""
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def forward(model, batch):
    """Run a model without our module: one example per row, as the data is not packed."""
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


def by_hand(folder, batch, rank, scaling, optimizer, dtype=torch.float32, clip=None, **spec):
    """Return gradient norm and output change of a model of its own, in plain torch."""
    torch.manual_seed(SEED)
    model = load_causal_lm(folder, dtype)
    inject_adapters(model, AdapterSpec(rank=rank, alpha=5.0, scaling=scaling, **spec))
    before = copy.deepcopy(model).float().eval()
    rows = slice(0, 4)
    batch = type(batch)(*(None if t is None or t.ndim == 0 else t[rows] for t in batch))
    model.eval()
    scores = forward(model, batch)[:, :-1].float()
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), batch.labels[:, 1:].flatten())
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = sum(float(p.grad.norm()) for p in parameters) / len(parameters)
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer(parameters).step()
    with torch.no_grad():
        change = forward(model.float(), batch) - forward(before, batch)
    return norm, float(change[batch.attention_mask == 1].square().mean().sqrt())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("scaling", "rank"), [("lora", 6), ("rslora", 50)])
def test_a_model_of_its_own_says_the_same(
    make_trainer, make_module, make_data, model_folder, optimizer, scaling, rank
):
    make = OPTIMIZERS[optimizer]
    report = measure(
        make_trainer,
        make_module(adapter=SPEC, optimizer=make),
        make_data(batch_size=5),
        ranks=(6, 50),
    )
    (point,) = (p for p in report.points if (p.scaling, p.rank) == (scaling, rank))
    batch = first_batch(make_data(batch_size=5))
    assert len(batch.input_ids) == 5  # of which four are used
    assert not batch.attention_mask.all()
    norm, change = by_hand(model_folder, batch, rank, scaling, make)
    assert point.gradient_norm == pytest.approx(norm, rel=1e-5)
    # Changes are small differences of logits: of the size 1e-6 relative to them.
    assert point.output_change == pytest.approx(change, rel=1e-3, abs=1e-7)


def test_of_a_large_step_every_digit_is_right(make_trainer, make_module, make_data, model_folder):
    make = partial(optim.SGD, lr=0.5)
    module = make_module(adapter=SPEC, optimizer=make)
    report = measure(make_trainer, module, make_data(), ranks=(6, 50))
    for point in report.points:
        norm, change = by_hand(
            model_folder, first_batch(make_data()), point.rank, point.scaling, make
        )
        assert point.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert point.output_change == pytest.approx(change, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_change_is_measured_through_the_rounding_of_a_short_base(
    make_trainer, make_module, make_data, model_folder, dtype
):
    make = OPTIMIZERS["sgd"]
    module = make_module(adapter=SPEC, optimizer=make, dtype=dtype)
    report = measure(make_trainer, module, make_data(), ranks=(6, 50))
    for p in report.points:
        norm, change = by_hand(
            model_folder,
            first_batch(make_data()),
            p.rank,
            p.scaling,
            make,
            dtype=getattr(torch, dtype),
        )
        # Gradients that are summed in another order differ by the rounding of the base's dtype.
        assert p.gradient_norm == pytest.approx(norm, rel=1e-2)
        assert p.output_change == pytest.approx(change, rel=2e-2)


def test_gradients_are_clipped_as_in_the_run(make_trainer, make_module, make_data, model_folder):
    make = partial(optim.SGD, lr=0.5)
    module = make_module(adapter=SPEC, optimizer=make)
    report = measure(make_trainer, module, make_data(), ranks=(6, 50), gradient_clip_val=0.03)
    for p in report.points:
        norm, change = by_hand(
            model_folder, first_batch(make_data()), p.rank, p.scaling, make, clip=0.03
        )
        assert norm > 0.03
        assert p.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert p.output_change == pytest.approx(change, rel=1e-4)


THEORY = {  # gradient norm, output change; of Adam's kind, and of SGD
    ("sgd", "lora"): (-0.5, -1.0),
    ("sgd", "rslora"): (0.0, 0.0),
    ("adamw", "lora"): (-0.5, 0.0),
    ("adamw", "rslora"): (0.0, 0.5),
    ("adafactor", "lora"): (-0.5, 0.0),
    ("adafactor", "rslora"): (0.0, 0.5),
}


def assert_theory(report, optimizer, tolerance):
    for slopes in report.slopes:
        gradient_norm, output_change = THEORY[optimizer, slopes.scaling]
        assert slopes.gradient_norm == pytest.approx(gradient_norm, abs=tolerance)
        assert slopes.output_change == pytest.approx(output_change, abs=tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_slopes_on_a_random_model(make_trainer, make_module, make_data, tmp_path, optimizer):
    module = make_module(adapter=SPEC, optimizer=OPTIMIZERS[optimizer])
    report = measure(make_trainer, module, make_data(), ranks=(8, 64, 512))
    assert_theory(report, optimizer, 0.1)
    name = OPTIMIZERS[optimizer].func.__name__
    flat, other = ("rslora", "lora") if optimizer == "sgd" else ("lora", "rslora")
    text = (tmp_path / "rank_stability.txt").read_text()
    rate = {"sgd": "0.001", "adamw": "1e-05", "adafactor": "0.01"}[optimizer]
    assert f"With {name} at learning rate {rate}, {flat} (slope " in text
    assert ") keeps the output's change constant over the rank; " + other in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_slopes_on_a_trained_model(make_trainer, stories260k, gsm8k, optimizer, dtype):
    module = CausalLMModule(str(stories260k), AdapterSpec(), OPTIMIZERS[optimizer], dtype=dtype)
    data = GSM8K(str(gsm8k), str(stories260k), max_length=128, num_examples=16, held_out_examples=4)
    precision = "32-true" if dtype == "float32" else "bf16-mixed"
    report = measure(make_trainer, module, data, precision=precision)
    assert_theory(report, optimizer, 0.08)


def test_with_the_rank_corrected_initialization(make_trainer, make_module, make_data):
    adapter = AdapterSpec(alpha=5.0, init="rank_corrected", scaling="unit")
    module = make_module(adapter=adapter, optimizer=OPTIMIZERS["sgd"])
    ranks = (8, 64, 512)
    report = measure(make_trainer, module, make_data(), ranks, scalings=("unit", "lora"))
    for slopes, gradient_norm in zip(report.slopes, (0.0, -1.0), strict=True):  # B.3 of the paper
        assert slopes.gradient_norm == pytest.approx(gradient_norm, abs=0.05)
        assert slopes.theory.gradient_norm == gradient_norm


def test_alphas_of_layers_and_dtype_of_adapters_are_kept(tiny_llama):
    spec = AdapterSpec(alpha=5.0, alpha_pattern={"q_proj": 7.0}, rank_pattern={"v_proj": 9})
    inject_adapters(tiny_llama, spec, dtype=torch.bfloat16)
    with fresh_adapters(tiny_llama, 16, "lora"):
        for path, layer in adapter_layers(tiny_llama):
            assert layer.gamma == (7.0 if path.endswith("q_proj") else 5.0) / 16
            assert layer.lora_a.shape[0] == layer.lora_b.shape[1] == 16
            assert layer.lora_a.dtype == torch.bfloat16


class Watch(Callback):
    """Takes a picture of everything that the report might disturb; stands on both sides of it."""

    def __init__(self):
        self.pictures = []

    def on_train_start(self, trainer, pl_module):
        modules = dict(pl_module.named_modules())
        parameters = dict(pl_module.named_parameters())
        self.pictures.append(
            {
                "modules": {name: id(m) for name, m in modules.items()},
                "modes": {name: m.training for name, m in modules.items()},
                "parameters": {name: id(p) for name, p in parameters.items()},
                "values": {name: p.detach().tolist() for name, p in parameters.items()},
                "versions": {name: p._version for name, p in parameters.items()},
                "trained": {name: p.requires_grad for name, p in parameters.items()},
                "gradients": {name: p.grad is None for name, p in parameters.items()},
                "buffers": {name: b.tolist() for name, b in pl_module.named_buffers()},
                "hooks": {name: len(m._forward_hooks) for name, m in modules.items()},
                "optimizer": str(trainer.optimizers[0].state_dict()),
                "torch": (torch.initial_seed(), torch.get_rng_state().tolist()),
                "numpy": str(np.random.get_state()),
                "python": random.getstate(),
                "loader": trainer.train_dataloader.state_dict(),
                "counts": {k: (id(v), str(v)) for k, v in trainer.datamodule.counts.items()},
                "grad mode": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
            }
        )


class Restless(CausalLMModule):
    """Draws from every generator where it is evaluated, and starts with one layer in eval mode."""

    def forward(self, batch):
        if not self.training:
            torch.rand(1), np.random.rand(), random.random()
        return super().forward(batch)

    def configure_model(self):
        super().configure_model()
        self.model.get_submodule("model.layers.1").eval()


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
@pytest.mark.parametrize("streaming", [False, True])
def test_everything_is_left_as_it_was(make_trainer, model_folder, make_data, streaming):
    module = Restless(str(model_folder), SPEC, OPTIMIZERS["adamw"], dtype="bfloat16")
    watch = Watch()
    data = make_data(streaming=streaming, shuffle_buffer=10, held_out_examples=2)
    fit(make_trainer, module, data, watch, RankStabilityReport(), watch)
    before, after = watch.pictures
    for name in before:
        assert before[name] == after[name], name
    assert set(before["modes"].values()) == {True, False}


def run_twice(make_trainer, make_module, make_data, tmp_path, data_options, **options):
    """Return for a fit without and one with the report: losses, ids and weights."""
    results = []
    for callbacks in ([], [RankStabilityReport(ranks=(2, 40))]):
        recorder = Recorder()
        module = make_module(adapter=SPEC, optimizer=partial(optim.AdamW, lr=1e-2))
        data = make_data(**data_options)
        trainer = fit(make_trainer, module, data, *callbacks, recorder, **options)
        weights = {name: p.tolist() for name, p in module.trainable_state().items()}
        counts = {name: str(count) for name, count in data.counts.items()}
        results.append((recorder.losses, recorder.ids, weights, counts))
        assert len(recorder.losses) == trainer.global_step * trainer.accumulate_grad_batches
    return results


@pytest.mark.parametrize(
    "data_options",
    [
        {},
        {"packing": True, "max_length": 64},
        {"num_workers": 1},
        STREAM,
        STREAM | {"num_workers": 1},
    ],
    ids=str,
)
def test_the_run_is_the_same_bit_for_bit(
    make_trainer, make_module, make_data, tmp_path, data_options
):
    options = {"max_steps": 5, "accumulate_grad_batches": 2}
    plain, reported = run_twice(
        make_trainer, make_module, make_data, tmp_path, data_options, **options
    )
    assert plain == reported
    assert len(set(map(str, plain[1]))) > 5  # batches differ, or the order could not be seen


@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_are_the_same_bit_for_bit(
    make_trainer, make_module, make_data, run_processes, tmp_path, streaming
):
    data_options = STREAM if streaming else {}

    def rank(number):
        plain, reported = run_twice(
            make_trainer,
            make_module,
            make_data,
            tmp_path,
            data_options,
            max_steps=4,
            devices=2,
            strategy="ddp",
        )
        assert plain == reported
        torch.save(plain, tmp_path / f"{number}.pt")

    assert run_processes(2, rank) == [0, 0]
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    assert first[1] != second[1]  # each process had rows of its own
    assert first[2] == second[2]
    assert "Rank stability" in (tmp_path / "rank_stability.txt").read_text()


def test_each_process_measures_its_own_rows(
    make_trainer, make_module, make_data, run_processes, tmp_path, model_folder
):
    def rank(number):
        module = make_module(adapter=SPEC, optimizer=partial(optim.SGD, lr=0.5))
        report, recorder = RankStabilityReport(ranks=(6, 50)), Recorder()
        data = make_data(batch_size=3)
        fit(make_trainer, module, data, report, recorder, devices=2, strategy="ddp")
        torch.save((report.points[0].gradient_norm, recorder.ids[0]), tmp_path / f"{number}.pt")

    assert run_processes(2, rank) == [0, 0]
    batch = first_batch(make_data(batch_size=6))
    for number in (0, 1):
        norm, ids = torch.load(tmp_path / f"{number}.pt")
        own = type(batch)(*(t if t is None else t[3 * number : 3 * number + 3] for t in batch[:4]))
        length = int(own.attention_mask.sum(1).max())
        own = type(batch)(*(t[:, :length] for t in own[:4]))
        assert ids == own.input_ids.flatten().tolist()
        expected, _ = by_hand(model_folder, own, 6, "lora", partial(optim.SGD, lr=0.5))
        assert norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_measures_fresh_adapters_and_goes_on(
    make_trainer, make_module, make_data, tmp_path
):
    def run(folder, max_steps, ckpt_path=None):
        report = RankStabilityReport(ranks=(2, 40))
        module = make_module(adapter=AdapterSpec(rank=3), optimizer=partial(optim.AdamW, lr=1e-2))
        fit(
            make_trainer,
            module,
            make_data(),
            report,
            TrainableCheckpoint(every_n_steps=3),
            max_steps=max_steps,
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
            default_root_dir=tmp_path / folder,
        )
        return report.points, module

    points, whole = run("whole", 5)
    run("first", 3)
    (checkpoint,) = (tmp_path / "first").rglob("step-*3.ckpt")
    resumed_points, resumed = run("second", 5, checkpoint)
    assert resumed_points == points
    for name, p in whole.trainable_state().items():
        assert p.any()
        assert torch.equal(p, resumed.trainable_state()[name])


def test_activations_are_recomputed_as_in_the_run(make_trainer, make_module, make_data):
    calls = {}

    class Counting(Callback):
        def __init__(self, name):
            self.name = name

        def setup(self, trainer, pl_module, stage):
            pl_module.configure_model()
            mlp = pl_module.model.get_submodule("model.layers.0.mlp")
            mlp.register_forward_pre_hook(
                lambda *_: calls.update({self.name: calls[self.name] + 1})
            )

        def on_train_start(self, trainer, pl_module):
            calls[self.name] = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            calls[f"{self.name} report"] = calls[self.name]

    points = []
    for name, checkpointing in (("kept", False), ("recomputed", True)):
        module = make_module(adapter=SPEC, activation_checkpointing=checkpointing)
        report = RankStabilityReport(ranks=(2, 40))
        fit(make_trainer, module, make_data(), Counting(name), report)
        points.append(report.points)
    assert calls["kept report"] == 1 + 4 * 2  # before; then gradient and output of four points
    assert calls["recomputed report"] == 1 + 4 * 3
    assert points[0] == points[1]


class Forgetful(CausalLMModule):
    """A base with dropout of its own."""

    def configure_model(self):
        super().configure_model()
        for layer in self.model.model.layers:
            layer.self_attn.attention_dropout = 0.5


def test_the_dropout_of_the_base_is_off(make_trainer, model_folder, make_data):
    options = {"adapter": SPEC, "optimizer": OPTIMIZERS["adamw"], "dtype": "float32"}
    points = [
        measure(make_trainer, kind(str(model_folder), **options), make_data()).points
        for kind in (CausalLMModule, Forgetful)
    ]
    assert points[0] == points[1]


def test_a_schedule_is_left_out(make_trainer, make_module, make_data, tmp_path):
    points = []
    for schedule in (None, partial(optim.lr_scheduler.LinearLR, start_factor=1e-3)):
        module = make_module(adapter=SPEC, lr_scheduler=schedule)
        points.append(measure(make_trainer, module, make_data()).points)
    assert points[0] == points[1]
    text = (tmp_path / "rank_stability.txt").read_text()
    assert "AdamW at learning rate 0.01, its schedule left out." in text


def test_nothing_is_claimed_where_nothing_moves(make_trainer, make_module, make_data, tmp_path):
    module = make_module(adapter=SPEC, optimizer=partial(optim.SGD, lr=0.0))
    report = measure(make_trainer, module, make_data())
    assert all(math.isnan(slopes.output_change) for slopes in report.slopes)
    assert all(math.isfinite(slopes.gradient_norm) for slopes in report.slopes)
    assert "nothing can be said of lora and rslora" in (tmp_path / "rank_stability.txt").read_text()


def test_what_is_logged(make_trainer, make_module, make_data, tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    module = make_module(adapter=SPEC)
    report = measure(make_trainer, module, make_data(), logger=logger)
    events = EventAccumulator(str(tmp_path), {"tensors": 0, "images": 0})
    events.Reload()
    expected = {
        f"rank_stability/{slopes.scaling}/{name}_slope": getattr(slopes, name)
        for slopes in report.slopes
        for name in ("gradient_norm", "output_change")
    }
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("rank_stability/")]
    assert set(tags) == set(expected)
    for tag, value in expected.items():
        (point,) = events.Scalars(tag)
        assert (point.step, point.value) == (0, pytest.approx(value))
    (text,) = events.Tensors("rank_stability/report/text_summary")
    written = (tmp_path / "rank_stability.txt").read_text().splitlines()
    logged = text.tensor_proto.string_val[0].decode().splitlines()
    assert logged == [f"    {line}" for line in written]  # Markdown changes nothing in it
    figures = ["rank_stability/slopes"] if find_spec("matplotlib") else []
    assert events.Tags()["images"] == figures


def test_the_text_alone_without_matplotlib(make_trainer, make_module, make_data, tmp_path, caplog):
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "find_spec", lambda name: None)
        with caplog.at_level("INFO"):
            measure(make_trainer, make_module(adapter=SPEC), make_data(), logger=logger)
    assert "matplotlib is not installed" in caplog.text
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == []


def test_the_figure():
    pytest.importorskip("matplotlib")
    points = [RankPoint(s, r, 2.0 * r, 3.0 * r) for s in ("lora", "rslora") for r in (4, 8)]
    for axes, factor in zip(draw_points(points).axes, (2.0, 3.0), strict=True):
        assert [line.get_label() for line in axes.lines] == ["lora", "rslora"]
        for line in axes.lines:
            assert line.get_xydata().tolist() == [[4, 4 * factor], [8, 8 * factor]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (4,)}, "needs two different ranks"),
        ({"ranks": (4, 4)}, r"got ranks \[4, 4\]"),
        ({"ranks": (4, 0)}, "rank_stability.ranks must be a positive integer, got 0"),
        ({"scalings": ()}, "one scaling"),
        ({"scalings": ("rs_lora",)}, "scaling must be one of lora, rslora"),
        ({"max_rows": 0}, "max_rows 0"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        RankStabilityReport(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": None}, r"model.adapter is null \(full fine-tuning\)"),
        ({"attention": "flash_attention_2"}, "set model.attention to sdpa"),
    ],
)
def test_modules_that_are_refused(make_trainer, make_module, make_data, options, message):
    with pytest.raises(UserError, match=message):
        measure(make_trainer, make_module(**options), make_data())


def test_fsdp2_is_refused_by_name(make_trainer, make_module, make_data, run_processes):
    def rank(_):
        with pytest.raises(UserError, match="which ModelParallelStrategy does not keep"):
            measure(make_trainer, make_module(), make_data(), strategy=ModelParallelStrategy(1, 1))

    assert run_processes(1, rank) == [0]


@pytest.mark.filterwarnings("ignore:.*no .val_dataloader")
def test_loaders_without_a_datamodule_are_refused(make_trainer, make_module, make_data):
    loader = DataLoader([first_batch(make_data())], batch_size=None)
    with pytest.raises(UserError, match="takes a batch of a DataModule"):
        measure(make_trainer, make_module(), loader)
