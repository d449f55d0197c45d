"""Logged gradient norms against float64 autograd, under every strategy."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from rslightning.callbacks import GradientNormMonitor
from rslightning.errors import UserError
from rslightning.rslora import AdapterSpec, adapter_state_dict
from rslightning.rslora.linear import LoRALinear
from rslightning.rslora.spec import ResolvedAdapter
from rslightning.stats.distributed import is_sharded

SIZES = ((7, 11), (11, 5))  # in, out of the two layers; nothing divides evenly over two processes
RANKS = (3, 2)
STEPS = 3
LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Case:
    """How a run is split; each run sees the same STEPS x 4 micro-batches per process."""

    world_size: int = 1
    accumulate: int = 1
    clip: float | None = None

    @property
    def id(self):
        return f"{self.world_size}x{self.accumulate}" + ("-clip" if self.clip else "")


def adapted_layers():
    """Return two LoRALinear whose B has left zero, so that A has a gradient."""
    torch.manual_seed(1)
    layers = []
    for (features_in, features_out), rank in zip(SIZES, RANKS, strict=True):
        base = nn.Linear(features_in, features_out)
        base.requires_grad_(False)
        layer = LoRALinear(base, ResolvedAdapter(rank, alpha=4.0, scaling="rslora"))
        for matrix in (layer.lora_a, layer.lora_b):
            nn.init.normal_(matrix, std=0.3)
        layers.append(layer)
    return layers


def micro_batch(rank: int, index: int):
    """Return input [B, 7] and target [B, 5] of one process's micro-batch."""
    generator = torch.Generator().manual_seed(100 * rank + index)
    return torch.randn(6, 7, generator=generator), torch.randn(6, 5, generator=generator)


class AdaptedModule(LightningModule):
    """Two adapted layers; sharded by FSDP2 where there is a mesh for it."""

    def __init__(self, accumulate=1, optimizer=torch.optim.SGD):
        super().__init__()
        self.accumulate, self.optimizer = accumulate, optimizer
        # Here, not in configure_model, where ZeRO-3 takes each weight away as soon as it is there.
        first, second = adapted_layers()
        self.net = nn.ModuleDict({"first": first, "second": second})

    def configure_model(self):
        if self.device_mesh is not None and not is_sharded(self.net["first"].lora_a):
            from torch.distributed.fsdp import fully_shard

            for layer in self.net.values():
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x, target = batch
        loss = nn.functional.mse_loss(self.net["second"](self.net["first"](x).tanh()), target)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        return self.optimizer(trainable, lr=LEARNING_RATE)

    def train_dataloader(self):
        rank, count = self.trainer.global_rank, STEPS * self.accumulate
        return DataLoader([micro_batch(rank, i) for i in range(count)], batch_size=None)


def expected_norms(case: Case):
    """Return tag -> values per step, by dense float64 autograd and a loop of its own."""
    layers = adapted_layers()
    weights = [(layer.base.weight.double(), layer.base.bias.double()) for layer in layers]
    matrices = [m.detach().double() for layer in layers for m in (layer.lora_a, layer.lora_b)]
    gammas = [4.0 / rank**0.5 for rank in RANKS]
    norms = {tag: [] for tag in ("mean", "total", "a", "b", "net.first", "net.second")}
    for step in range(STEPS):
        matrices = [m.detach().requires_grad_() for m in matrices]
        losses = []
        for rank in range(case.world_size):
            for micro in range(case.accumulate):
                x, target = (t.double() for t in micro_batch(rank, step * case.accumulate + micro))
                for i, (weight, bias) in enumerate(weights):
                    dense = weight + gammas[i] * matrices[2 * i + 1] @ matrices[2 * i]
                    x = (x.tanh() if i else x) @ dense.T + bias
                losses.append((x - target).square().mean())
        gradients = torch.autograd.grad(torch.stack(losses).mean(), matrices)
        sizes = torch.stack([g.norm() for g in gradients])
        total = sizes.norm()
        for tag, value in {
            "mean": sizes.mean(),
            "total": total,
            "a": sizes[::2].norm(),
            "b": sizes[1::2].norm(),
            "net.first": sizes[:2].norm(),
            "net.second": sizes[2:].norm(),
        }.items():
            norms[tag].append(value.item())
        factor = min(1.0, case.clip / (total.item() + 1e-6)) if case.clip else 1.0
        matrices = [
            m - LEARNING_RATE * factor * g for m, g in zip(matrices, gradients, strict=True)
        ]
    return norms


def read_scalars(folder: Path, prefix: str = "grad_norm/"):
    """Return tag -> [(step, value)] of the event files of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(prefix)]
    return {
        tag.removeprefix(prefix): [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags
    }


def fit(make_trainer, folder, case: Case, module=None, monitor=True, data=None, **options):
    callbacks = [GradientNormMonitor(every_n_steps=1, per_layer=True)] if monitor else []
    module = module or AdaptedModule(case.accumulate)
    trainer = make_trainer(
        max_steps=STEPS,
        devices=case.world_size,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        callbacks=callbacks,
        logger=TensorBoardLogger(str(folder), name="", version=""),
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, data)
    return module


def assert_exact(folder, case: Case, rel=1e-6):
    found, expected = read_scalars(folder), expected_norms(case)
    assert set(found) == set(expected)
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == list(range(STEPS))
        assert [value for _, value in found[tag]] == pytest.approx(values, rel=rel), tag
    if case.clip:  # else what clipping leaves would look the same
        assert min(expected["total"]) > 1.5 * case.clip


CLIP = 0.1
SINGLE = [Case(1, 1), Case(1, 4), Case(1, 1, CLIP), Case(1, 4, CLIP)]
DOUBLE = [Case(2, 1), Case(2, 4), Case(2, 1, CLIP), Case(2, 4, CLIP)]


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.id)
def test_one_process(make_trainer, tmp_path, case):
    fit(make_trainer, tmp_path, case)
    assert_exact(tmp_path, case)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", DOUBLE, ids=lambda case: case.id)
def test_two_processes(make_trainer, run_processes, tmp_path, case, strategy):
    def rank(_):
        chosen = ModelParallelStrategy(2, 1) if strategy == "fsdp2" else "ddp"
        fit(make_trainer, tmp_path, case, strategy=chosen)

    assert run_processes(2, rank) == [0, 0]
    assert_exact(tmp_path, case)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("cases", [SINGLE[-1:], DOUBLE], ids=["1", "2"])
def test_deepspeed(make_trainer, run_processes, tmp_path, cases, stage):
    cpu = pytest.importorskip("deepspeed_cpu")

    def rank(_):
        for case in cases:
            strategy = cpu.CPUDeepSpeedStrategy(stage=stage, logging_batch_size_per_gpu=1)
            plugins = [cpu.OnceScaledDeepSpeedPrecision("32-true")]
            fit(make_trainer, tmp_path / case.id, case, strategy=strategy, plugins=plugins)

    world_size = cases[0].world_size
    assert run_processes(world_size, rank) == [0] * world_size
    for case in cases:
        assert_exact(tmp_path / case.id, case)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_in_bfloat16(make_trainer, run_processes, tmp_path, stage):
    cpu = pytest.importorskip("deepspeed_cpu")

    def rank(_):
        strategy = cpu.CPUDeepSpeedStrategy(stage=stage, logging_batch_size_per_gpu=1)
        plugins = [cpu.OnceScaledDeepSpeedPrecision("bf16-mixed")]
        fit(make_trainer, tmp_path, DOUBLE[-1], strategy=strategy, plugins=plugins)

    assert run_processes(2, rank) == [0, 0]
    assert_exact(tmp_path, DOUBLE[-1], rel=0.1)  # of bfloat16 weights and gradients


def test_bfloat16_autocast(make_trainer, tmp_path):
    fit(make_trainer, tmp_path, SINGLE[-1], precision="bf16-mixed")
    assert_exact(tmp_path, SINGLE[-1], rel=0.05)


def scaled_precision(scale: float):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


def test_float16_without_its_loss_scale(make_trainer, tmp_path):
    fit(make_trainer, tmp_path, SINGLE[-1], plugins=[scaled_precision(2.0**9)])
    assert_exact(tmp_path, SINGLE[-1], rel=0.01)


@pytest.mark.parametrize("fused", [False, True])
def test_float16_where_the_optimizer_unscales(make_trainer, tmp_path, fused):
    case = Case(1, 4)  # clipping is refused for such optimizers

    def optimizer(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, fused=fused)

    module = AdaptedModule(case.accumulate, optimizer)
    fit(make_trainer, tmp_path, case, module, plugins=[scaled_precision(2.0**9)])
    assert module.optimizers().param_groups[0]["fused"] is fused
    assert_exact(tmp_path, case, rel=0.01)


def test_every_n_steps(make_trainer, tmp_path):
    monitor = GradientNormMonitor(every_n_steps=2)
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    module = AdaptedModule(accumulate=2)
    trainer = make_trainer(
        max_epochs=2, accumulate_grad_batches=2, logger=logger, callbacks=[monitor]
    )
    trainer.fit(module)
    found = read_scalars(tmp_path)
    assert set(found) == {"mean", "total", "a", "b"}
    assert [step for step, _ in found["mean"]] == [0, 2, 4]


def test_a_monitored_run_is_the_same_run(make_trainer, make_module, make_data, tmp_path):
    runs = []
    for monitor in (False, True):
        torch.manual_seed(0)
        folder = tmp_path / str(monitor)
        module = make_module(adapter=AdapterSpec(rank=3, alpha=5.0, dropout=0.1))
        fit(make_trainer, folder, Case(1, 2, CLIP), module, monitor, data=make_data())
        runs.append((read_scalars(folder, "train/"), adapter_state_dict(module)))
    (plain_loss, plain), (monitored_loss, monitored) = runs
    assert plain_loss == monitored_loss
    assert len(plain_loss["loss"]) == STEPS
    assert all(torch.equal(monitored[name], tensor) for name, tensor in plain.items())
    found = read_scalars(tmp_path / "True")
    assert found["a"][0] == (0, 0.0)  # B is zero
    assert found["total"][0] == found["b"][0]
    assert found["a"][1][1] > 0
    assert len(found) == 4 + 14  # seven linear modules in each of two layers


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed"])
def test_monitored_processes_do_the_same(make_trainer, run_processes, tmp_path, strategy):
    cpu = pytest.importorskip("deepspeed_cpu") if strategy == "deepspeed" else None

    def chosen():
        if cpu is not None:
            return cpu.CPUDeepSpeedStrategy(stage=3, logging_batch_size_per_gpu=1)
        return ModelParallelStrategy(2, 1) if strategy == "fsdp2" else "ddp"

    def rank(_):
        for monitor in (False, True):
            folder = tmp_path / str(monitor)
            fit(make_trainer, folder, Case(2, 2), None, monitor, strategy=chosen())

    assert run_processes(2, rank) == [0, 0]
    plain = read_scalars(tmp_path / "False", "loss")
    assert plain == read_scalars(tmp_path / "True", "loss")
    assert len({value for _, value in plain[""]}) == STEPS


class Wrapped(LightningModule):
    """Somebody else's module around a model whose forward returns a loss."""

    def __init__(self, model, batches):
        super().__init__()
        self.model, self.batches = model, batches

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], LEARNING_RATE)

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


def float64_norms(model, losses, trainable):
    """Return per step the norms of `trainable`'s gradients, by SGD in float64."""
    steps = []
    optimizer = torch.optim.SGD(trainable, LEARNING_RATE)
    for loss in losses:
        optimizer.zero_grad()
        loss(model).backward()
        steps.append(torch.stack([p.grad.norm() for p in trainable]))
        optimizer.step()
    return torch.stack(steps)


def test_a_module_around_a_peft_model(make_trainer, tmp_path, tiny_llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(tiny_llama, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batches = [torch.randint(53, (2, 9)) for _ in range(STEPS)]
    oracle = copy.deepcopy(model).double()
    fit(make_trainer, tmp_path, Case(), Wrapped(model, batches))
    losses = [lambda net, ids=ids: net(input_ids=ids, labels=ids).loss for ids in batches]
    trainable = [p for p in oracle.parameters() if p.requires_grad]
    norms = float64_norms(oracle, losses, trainable)
    found = {tag: [value for _, value in pairs] for tag, pairs in read_scalars(tmp_path).items()}
    assert norms.shape[1] == 8
    assert found["mean"] == pytest.approx(norms.mean(1).tolist(), rel=1e-5)
    assert found["total"] == pytest.approx(norms.norm(dim=1).tolist(), rel=1e-5)
    assert found["a"] == pytest.approx(norms[:, ::2].norm(dim=1).tolist(), rel=1e-5)
    path = "model.base_model.model.model.layers.1.self_attn.q_proj"
    assert found[path] == pytest.approx(norms[:, 4:6].norm(dim=1).tolist(), rel=1e-5)
    assert len(found) == 4 + 4


class FreezeSecond(Callback):
    """Freezes a layer after the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            pl_module.net["second"].requires_grad_(False)


def test_what_is_trained_may_change(make_trainer, tmp_path):
    module, monitor = AdaptedModule(), GradientNormMonitor(every_n_steps=1, per_layer=True)
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    make_trainer(max_steps=3, callbacks=[FreezeSecond(), monitor], logger=logger).fit(module)
    found = read_scalars(tmp_path)
    assert [step for step, _ in found["net.first"]] == [0, 1, 2]
    assert [step for step, _ in found["net.second"]] == [0]
    assert found["total"][1:] == found["net.first"][1:]


def test_a_compiled_part_keeps_its_name(make_trainer, tmp_path):
    module = AdaptedModule()
    module.net["first"] = torch.compile(module.net["first"], backend="eager")
    assert any("_orig_mod" in name for name, _ in module.named_parameters())
    fit(make_trainer, tmp_path, Case(), module)
    assert_exact(tmp_path, Case())


def test_lightnings_demo_transformer(make_trainer, tmp_path):
    torch.manual_seed(0)
    demo = LightningTransformer(vocab_size=19)
    for module in demo.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    tokens = torch.randint(19, (STEPS, 2, 3, 7))  # input and target [3, 7] of each step
    batches = [(tokens[step, 0], tokens[step, 1]) for step in range(STEPS)]
    demo.prepare_data = lambda: None  # it would download
    demo.train_dataloader = lambda: DataLoader(batches, batch_size=None)
    oracle = copy.deepcopy(demo.model).double()
    fit(make_trainer, tmp_path, Case(), demo)
    x, target = batches[0]
    loss = nn.functional.nll_loss(oracle(x, target), target.view(-1))
    gradients = torch.autograd.grad(loss, list(oracle.parameters()))
    norms = torch.stack([gradient.norm() for gradient in gradients])
    found = read_scalars(tmp_path)
    # The float32 gradients of this model's first layers are themselves off by 2e-5.
    assert found["mean"][0][1] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert found["total"][0][1] == pytest.approx(norms.norm().item(), rel=1e-4)
    assert {"a", "b"}.isdisjoint(found)
    assert len(found["mean"]) == STEPS


class Adversaries(LightningModule):
    """Two networks with an optimizer each; the second steps on every third batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = adapted_layers()[0], nn.Linear(11, 5)

    def loss(self, number, batch):
        out = self.second(self.first(batch[0]))
        return (out - batch[1]).square().mean() if number == 0 else out.square().mean()

    def training_step(self, batch, batch_idx):
        for number, optimizer in enumerate(self.optimizers()):
            if number == 0 or batch_idx % 3 == 2:
                optimizer.zero_grad()
                self.manual_backward(self.loss(number, batch))
                optimizer.step()

    def configure_optimizers(self):
        first = [p for p in self.first.parameters() if p.requires_grad]
        return [
            torch.optim.SGD(parameters, lr=LEARNING_RATE)
            for parameters in (first, self.second.parameters())
        ]

    def train_dataloader(self):
        return DataLoader([micro_batch(0, i) for i in range(7)], batch_size=None)


def test_several_optimizers(make_trainer, tmp_path):
    module = Adversaries()
    oracle = copy.deepcopy(module).double()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    monitor = GradientNormMonitor(every_n_steps=2)
    trainer = make_trainer(max_epochs=1, callbacks=[monitor], logger=logger)
    trainer.fit(module)
    expected = {0: [], 1: []}
    parameters = [[p for p in net.parameters() if p.requires_grad] for net in oracle.children()]
    for index in range(7):
        batch = [tensor.double() for tensor in micro_batch(0, index)]
        for number in (0, 1) if index % 3 == 2 else (0,):
            gradients = torch.autograd.grad(oracle.loss(number, batch), parameters[number])
            expected[number].append(torch.stack([g.norm() for g in gradients]))
            with torch.no_grad():
                for parameter, gradient in zip(parameters[number], gradients, strict=True):
                    parameter -= LEARNING_RATE * gradient
    found = read_scalars(tmp_path, "grad_norm/optimizer_")
    assert set(found) == {"0/mean", "0/total", "0/a", "0/b", "1/mean", "1/total"}
    assert [step for step, _ in found["0/mean"]] == [0, 2, 4, 6]
    assert [step for step, _ in found["1/mean"]] == [2]  # of its steps at 2 and 5 the first
    for number, norms in expected.items():
        logged = norms[::2]
        means = [value for _, value in found[f"{number}/mean"]]
        totals = [value for _, value in found[f"{number}/total"]]
        assert means == pytest.approx([n.mean().item() for n in logged], rel=1e-6)
        assert totals == pytest.approx([n.norm().item() for n in logged], rel=1e-6)
    assert monitor.state_dict() == {"manual_steps": {0: 7, 1: 2}}


class HeadOnly(Adversaries):
    """The backbone gets gradients, too; no optimizer takes or resets them."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        return self.loss(0, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.second.parameters(), lr=LEARNING_RATE)


def test_gradients_that_no_optimizer_takes_are_left_out(make_trainer, tmp_path):
    module = HeadOnly()
    oracle = copy.deepcopy(module).double()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    trainer = make_trainer(max_epochs=1, callbacks=[GradientNormMonitor(1)], logger=logger)
    trainer.fit(module)
    assert module.first.lora_a.grad is not None
    head, totals = list(oracle.second.parameters()), []
    for index in range(7):
        batch = [tensor.double() for tensor in micro_batch(0, index)]
        gradients = torch.autograd.grad(oracle.loss(0, batch), head)
        totals.append(torch.stack([g.norm() for g in gradients]).norm().item())
        with torch.no_grad():
            for parameter, gradient in zip(head, gradients, strict=True):
                parameter -= LEARNING_RATE * gradient
    found = read_scalars(tmp_path)
    assert set(found) == {"mean", "total"}
    assert found["total"] == [(i, pytest.approx(x, rel=1e-6)) for i, x in enumerate(totals)]


def test_an_optimizer_that_holds_other_tensors_takes_all(make_trainer, tmp_path):
    """As an engine's does, which steps on copies in float32."""

    class Copies(HeadOnly):
        def configure_optimizers(self):
            copies = [p.detach().clone().requires_grad_() for p in self.second.parameters()]
            return torch.optim.SGD(copies, lr=LEARNING_RATE)

    module = Copies()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    trainer = make_trainer(max_steps=1, callbacks=[GradientNormMonitor(1)], logger=logger)
    trainer.fit(module)
    gradients = [p.grad for p in module.first.parameters() if p.requires_grad]
    total = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert read_scalars(tmp_path)["total"] == [(0, pytest.approx(total, rel=1e-5))]


def test_a_step_of_several_evaluations_is_read_once(make_trainer, tmp_path):
    class Evaluates(HeadOnly):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.second.parameters(), lr=0.1, max_iter=4)

    module = Evaluates()
    oracle = copy.deepcopy(module).double()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    monitor = GradientNormMonitor(1)
    make_trainer(max_steps=3, callbacks=[monitor], logger=logger).fit(module)
    found = read_scalars(tmp_path)["total"]
    assert [step for step, _ in found] == [0, 1, 2]
    batch = [tensor.double() for tensor in micro_batch(0, 0)]
    gradients = torch.autograd.grad(oracle.loss(0, batch), list(oracle.second.parameters()))
    total = torch.stack([g.norm() for g in gradients]).norm().item()
    assert found[0][1] == pytest.approx(total, rel=1e-6)  # where the step began
    again = make_trainer(max_steps=1, callbacks=[monitor], logger=logger)
    again.fit(HeadOnly())
    assert len(read_scalars(tmp_path)["total"]) == 4


def test_counting_goes_on_after_resuming():
    monitor = GradientNormMonitor()
    assert monitor.state_dict() == {}  # under automatic optimization the Trainer counts
    monitor.load_state_dict({"manual_steps": {0: 7, 1: 2}})
    assert monitor.state_dict() == {"manual_steps": {0: 7, 1: 2}}


def bare(strategy_class):
    """Return an object of the class that was never set up: its own package is not here."""
    return type(strategy_class.__name__, (strategy_class,), {"__init__": lambda self: None})()


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (
            FSDPStrategy(),
            r"under FSDPStrategy: FSDP1 .* use FSDP2 \(ModelParallelStrategy\); or leave it out, "
            r"with gradient_norm: null\.$",
        ),
        (bare(SingleDeviceXLAStrategy), "under SingleDeviceXLAStrategy: it is none of"),
        (bare(XLAStrategy), "under XLAStrategy: it is none of"),
        (SimpleNamespace(), "under SimpleNamespace: it is none of single device, DDP, FSDP2"),
        (DDPStrategy(model_averaging_period=2), "under DDPStrategy: with local SGD each process"),
    ],
)
def test_unreadable_strategies_are_refused_by_name(strategy, reason):
    with pytest.raises(UserError, match=reason):
        GradientNormMonitor().setup(SimpleNamespace(strategy=strategy), None, "fit")
    GradientNormMonitor().setup(SimpleNamespace(strategy=strategy), None, "test")


def test_mics_is_refused():
    cpu = pytest.importorskip("deepspeed_cpu")
    config = {"zero_optimization": {"stage": 3, "mics_shard_size": 2}}
    strategy = cpu.CPUDeepSpeedStrategy(config=config)
    with pytest.raises(UserError, match="MiCS shards within groups"):
        GradientNormMonitor().setup(SimpleNamespace(strategy=strategy), None, "fit")


class HalfSharded(AdaptedModule):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net["first"], mesh=self.device_mesh["data_parallel"])


def test_parameters_beside_the_shards_are_refused(make_trainer, run_processes, tmp_path):
    def rank(_):
        options = {"strategy": ModelParallelStrategy(2, 1)}
        with pytest.raises(UserError, match=r"a parameter of net\.second is not sharded"):
            fit(make_trainer, tmp_path, Case(2), HalfSharded(), **options)

    assert run_processes(2, rank) == [0, 0]


def test_the_interval_must_be_positive():
    with pytest.raises(UserError, match="every_n_steps is 0; it must be positive"):
        GradientNormMonitor(every_n_steps=0)
