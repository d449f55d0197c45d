"""Logged moments against dense formulas in float64, on the weights and batches of the step."""

import contextlib
import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from rslightning.batch import Batch
from rslightning.callbacks.activation_moments import (
    ActivationMomentMonitor,
    adapted_layers,
    attention_mask,
)
from rslightning.errors import UserError
from rslightning.losses import token_nats
from rslightning.rslora import AdapterSpec, LoRALinear, adapter_state_dict
from rslightning.rslora.linear import adapter_layers

TAGS = [
    f"{quantity}/{order}"
    for quantity in ("activation", "adapter_output", "input_grad")
    for order in ("first_moment", "second_moment")
]


class KeepScalars(Logger):
    """Keeps what is logged under the monitor's tags: step -> tag -> value."""

    name, version = "kept", "0"

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        kept = {tag: value for tag, value in metrics.items() if tag.startswith(tuple(TAGS))}
        if kept:
            assert step not in self.steps
            self.steps[step] = kept


class KeepSteps(Callback):
    """Keeps weights and micro-batches of every optimizer step, and the hooks seen in it."""

    def __init__(self):
        self.states, self.batches, self.hooks, self.losses = {}, {}, {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = trainer.global_step
        state = {name: p.detach().clone() for name, p in trainable(pl_module).items()}
        self.states.setdefault(step, state)
        self.batches.setdefault(step, []).append(batch)

    def on_before_backward(self, trainer, pl_module, loss):
        hooks = sum(len(module._forward_hooks) for module in pl_module.modules())
        self.hooks.setdefault(trainer.global_step, []).append(hooks)
        self.losses.append(loss.detach().clone())


def trainable(module):
    """Return name -> trainable parameter, as if nothing were compiled."""
    named = module.named_parameters()
    return {name.replace("_orig_mod.", ""): p for name, p in named if p.requires_grad}


class DenseLinear(nn.Module):
    """A LoRALinear in float64, written out; keeps the adapter's input and both outputs."""

    def __init__(self, base, pairs):
        super().__init__()
        self.base, self.pairs = base, pairs

    def forward(self, x):
        # A node of its own, so that its gradient is that of the adapter's path.
        self.x = x.clone() if x.requires_grad else x.clone().requires_grad_()
        self.x.retain_grad()
        self.z = sum(gamma * (self.x @ a.T) @ b.T for a, b, gamma in self.pairs)
        self.y = self.base(x) + self.z
        return self.y


def dense_copy(module, state):
    """Return a float64 copy of `module` with the trainable weights of `state`, and its layers."""
    module = copy.deepcopy(module).double()
    module.load_state_dict({name: p.double() for name, p in state.items()}, strict=False)
    layers = {}
    for path, layer in adapter_layers(module):
        layers[path] = DenseLinear(layer.base, [(layer.lora_a, layer.lora_b, layer.gamma)])
    for path, dense in layers.items():
        module.set_submodule(path, dense)
    return module, layers


def moments_of(entries):
    """Return tag ending -> (value, size of the entries)."""
    entries = torch.cat([part.detach().flatten() for part in entries])
    second = entries.square().mean().item()
    return {
        "first_moment": (entries.mean().item(), math.sqrt(second)),
        "second_moment": (second, second),
    }


def dense_moments(module, state, batches):
    """Return tag -> (value, scale) over all micro-batches of all processes, layer by layer too.

    The loss is the mean over all targets of the step, as if it were one batch.
    """
    targets = sum(int((batch.labels[:, 1:] >= 0).sum()) for batch in batches)
    seen = {}
    for batch in batches:
        copied, layers = dense_copy(module, state)
        nats, _ = copied.nats(batch)
        (nats / targets).backward()
        kept = batch.attention_mask == 1
        for path, layer in layers.items():
            parts = {"activation": layer.y, "adapter_output": layer.z, "input_grad": layer.x.grad}
            for quantity, values in parts.items():
                seen.setdefault((quantity, path), []).append(values[kept])
    each = {}
    for (quantity, path), entries in seen.items():
        for order, value in moments_of(entries).items():
            each[f"{quantity}/{order}/{path}"] = value
    means = {}
    for tag in TAGS:
        values = [value for name, value in each.items() if name.startswith(f"{tag}/")]
        means[tag] = tuple(sum(part) / len(values) for part in zip(*values, strict=True))
    return means | each


def assert_logged(found, expected, rtol=1e-5):
    assert set(found) == set(expected)
    for tag, (value, scale) in expected.items():
        assert scale > 0, tag
        assert found[tag] == pytest.approx(value, rel=0, abs=rtol * scale), tag


def with_moved_b(module):
    """Return the module, its model built and B as if some steps had been made."""
    torch.manual_seed(3)
    module.configure_model()
    for _, layer in adapter_layers(module):
        nn.init.normal_(layer.lora_b, std=0.1)
    return module


def fit(make_trainer, module, data, monitor, **options):
    """Train two optimizer steps; return (what was logged, what the steps were)."""
    logger, kept = KeepScalars(), KeepSteps()
    torch.manual_seed(0)
    trainer = make_trainer(
        **({"max_steps": 2, "limit_val_batches": 0, "use_distributed_sampler": False} | options),
        logger=logger,
        callbacks=[monitor, kept] if monitor else [kept],
    )
    trainer.fit(module, data)
    return logger.steps, kept


SITUATIONS = {
    "padding": {},
    "packing": {"packing": True},
    "accumulation": {"micro_batches": 3},
    "checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_numbers_are_those_of_the_dense_formulas(make_trainer, make_module, make_data, situation):
    options = dict(SITUATIONS[situation])
    micro_batches = options.pop("micro_batches", 1)
    data = make_data(max_length=64, batch_size=3, packing=options.pop("packing", False))
    module = with_moved_b(make_module(**options))
    plain = with_moved_b(make_module())
    monitor = ActivationMomentMonitor(every_n_steps=1, per_layer=True)
    logged, kept = fit(make_trainer, module, data, monitor, accumulate_grad_batches=micro_batches)
    assert sorted(logged) == [0, 1]
    for step, values in logged.items():
        assert len(kept.batches[step]) == micro_batches
        padding = [bool((batch.attention_mask == 0).any()) for batch in kept.batches[step]]
        assert any(padding)
        assert_logged(values, dense_moments(plain, kept.states[step], kept.batches[step]))


def test_processes_are_combined_exactly(
    make_trainer, make_module, make_data, run_processes, tmp_path
):
    import torch.distributed  # before the fork

    module, data = with_moved_b(make_module()), make_data(max_length=64, batch_size=3)
    data.setup("fit")

    def rank(number):
        monitor = ActivationMomentMonitor(every_n_steps=2, per_layer=True)
        options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2, "max_steps": 1}
        logged, kept = fit(make_trainer, module, data, monitor, **options)
        batches = [tuple(batch) for batch in kept.batches[0]]
        torch.save((logged, kept.states[0], batches), tmp_path / f"{number}.pt")

    assert run_processes(2, rank) == [0, 0]
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert second[0] == {}  # one process writes
    batches = [Batch(*batch) for batch in first[2] + second[2]]
    assert len(batches) == 4
    assert_logged(first[0][0], dense_moments(with_moved_b(make_module()), first[1], batches))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_monitored_run_is_the_unmonitored_one(
    make_trainer, make_module, make_data, precision, checkpointing
):
    def train(monitor):
        adapter = AdapterSpec(rank=3, alpha=5.0, dropout=0.3)
        module = make_module(adapter=adapter, activation_checkpointing=checkpointing)
        options = {"max_steps": 3, "precision": precision, "accumulate_grad_batches": 2}
        data = make_data(max_length=64)
        logged, kept = fit(make_trainer, with_moved_b(module), data, monitor, **options)
        return logged, kept.losses, adapter_state_dict(module.model)

    _, plain_losses, plain = train(None)
    logged, losses, monitored = train(ActivationMomentMonitor(every_n_steps=2))
    assert sorted(logged) == [0, 2]
    assert len(losses) == 6
    assert torch.equal(torch.stack(losses), torch.stack(plain_losses))
    assert all(torch.equal(monitored[name], plain[name]) for name in plain)


def test_hooks_are_there_on_logged_steps_only(make_trainer, make_module, make_data):
    module, monitor = make_module(), ActivationMomentMonitor(every_n_steps=3)
    options = {"max_steps": 5, "accumulate_grad_batches": 2}
    logged, kept = fit(make_trainer, module, make_data(max_length=64), monitor, **options)
    layers = len(list(adapter_layers(module)))
    assert kept.hooks == {0: [layers] * 2, 1: [0, 0], 2: [0, 0], 3: [layers] * 2, 4: [0, 0]}
    assert sum(len(part._forward_hooks) for part in module.modules()) == 0
    assert sorted(logged) == [0, 3]
    assert set(logged[0]) == set(TAGS)
    # B is zero at first: the adapter says nothing, and nothing comes back through it.
    assert logged[0]["adapter_output/second_moment"] == logged[0]["input_grad/second_moment"] == 0
    assert logged[3]["adapter_output/second_moment"] > 0


def test_hooks_go_when_training_fails(make_trainer, make_module, make_data):
    class Fail(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            raise RuntimeError("out of memory")

    module = make_module()
    trainer = make_trainer(callbacks=[ActivationMomentMonitor(), Fail()], max_steps=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(module, make_data(max_length=64))
    assert sum(len(part._forward_hooks) for part in module.modules()) == 0


def test_a_fit_that_failed_is_forgotten(make_trainer):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("out of memory")

    monitor = ActivationMomentMonitor(every_n_steps=1, per_layer=True)
    trainer = make_trainer(callbacks=[Fail(), monitor], accumulate_grad_batches=2, max_steps=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(Toy(), toy_batches(4))
    logged, kept = fit(make_trainer, Toy(), toy_batches(1), monitor, max_steps=1)
    assert_logged(logged[0], dense_moments(Toy(), kept.states[0], kept.batches[0]))


def test_a_loss_scale_is_taken_out_again(make_trainer, make_module, make_data):
    from lightning.pytorch.plugins.precision import MixedPrecision

    class ScaledOnly(MixedPrecision):  # the loss scale of 16-bit floats, computing in 32
        def forward_context(self):
            return contextlib.nullcontext()

    module, data = with_moved_b(make_module()), make_data(max_length=64)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = ScaledOnly("16-mixed", "cpu", scaler)
    monitor = ActivationMomentMonitor(every_n_steps=1, per_layer=True)
    logged, kept = fit(make_trainer, module, data, monitor, plugins=[plugin], max_steps=1)
    plain = with_moved_b(make_module())
    assert_logged(logged[0], dense_moments(plain, kept.states[0], kept.batches[0]))


@pytest.mark.parametrize("wrong", [0, -3])
def test_an_interval_is_positive(wrong):
    with pytest.raises(UserError, match=f"every_n_steps is {wrong}; at least 1"):
        ActivationMomentMonitor(every_n_steps=wrong)


def test_without_adapters_a_line_says_so(make_trainer, make_module, make_data, caplog):
    module = make_module(adapter=None)
    monitor = ActivationMomentMonitor(every_n_steps=1)
    logged, kept = fit(make_trainer, module, make_data(max_length=64), monitor, max_steps=1)
    assert logged == {}
    assert kept.hooks == {0: [0]}
    assert "activation_moments: there are no adapters, nothing is measured" in caplog.text


class Toy(LightningModule):
    """Embedding, two adapted linear maps and a head: compiles in a second."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        spec = AdapterSpec(rank=3, alpha=5.0)
        self.model = nn.Sequential(
            nn.Embedding(53, 6),
            LoRALinear(nn.Linear(6, 10), spec.resolve("1"), dropout),
            nn.Tanh(),
            LoRALinear(nn.Linear(10, 7), spec.resolve("3"), dropout),
            nn.Linear(7, 53),
        )
        self.model.requires_grad_(False)
        for path, layer in adapter_layers(self.model):
            layer.reset_adapter(path)
            nn.init.normal_(layer.lora_b, std=0.1)
            layer.lora_a.requires_grad_(), layer.lora_b.requires_grad_()

    def nats(self, batch):
        return token_nats(self.model(batch.input_ids), batch.labels)

    def training_step(self, batch, batch_idx):
        nats, targets = self.nats(batch)
        return nats / targets

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def toy_batches(count):
    """Return batches of one shape with 15 targets each, with padding."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        ids = torch.randint(1, 53, (2, 11), generator=generator)
        mask = (torch.arange(11) < torch.tensor([[11], [6]])).long()
        batches.append(Batch(ids, ids.masked_fill(mask == 0, -100), mask))
    return DataLoader(batches, batch_size=None)


class ShardedToy(Toy):
    """In FSDP2: a unit around each of some parts, and one around the model."""

    def __init__(self, units):
        super().__init__()
        self.units = units

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for unit in self.units:
            part = self.model if unit is None else self.model[unit]
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def assert_two_processes_are_exact(run_processes, tmp_path, micro_batches, train):
    """Call `train(data, monitor)` in two processes; compare step 0 with one big batch."""
    loader = toy_batches(2 * micro_batches)

    def rank(number):
        monitor = ActivationMomentMonitor(every_n_steps=1, per_layer=True)
        data = DataLoader(list(loader)[number::2], batch_size=None)
        logged, _ = train(data, monitor)
        torch.save(logged, tmp_path / f"{number}.pt")

    assert run_processes(2, rank) == [0, 0]
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert second == {}  # one process writes
    state = {name: p.detach() for name, p in trainable(Toy()).items()}
    assert_logged(first[0], dense_moments(Toy(), state, list(loader)))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("units", [[None], [1, 3, None]], ids=["model", "layers"])
def test_fsdp2(make_trainer, run_processes, tmp_path, units):
    from lightning.pytorch.strategies import ModelParallelStrategy

    def train(data, monitor):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        options = {"strategy": strategy, "devices": 2, "max_steps": 1}
        return fit(make_trainer, ShardedToy(units), data, monitor, **options)

    assert_two_processes_are_exact(run_processes, tmp_path, 1, train)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(make_trainer, run_processes, tmp_path, stage):
    cpu = pytest.importorskip("deepspeed_cpu")

    def train(data, monitor):
        # Lightning and DeepSpeed both divide the loss by the number of micro-batches here.
        strategy = cpu.CPUDeepSpeedStrategy(stage=stage, logging_batch_size_per_gpu=1)
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        options = {"strategy": strategy, "devices": 2, "accumulate_grad_batches": 2}
        return fit(make_trainer, Toy(), data, monitor, max_steps=1, **options)

    assert_two_processes_are_exact(run_processes, tmp_path, 2, train)


COMPILES = []


def counting_backend(graph, inputs):
    from torch._dynamo.backends.debugging import aot_eager

    COMPILES.append(graph)
    return aot_eager(graph, inputs)


def compile_model(module):
    module.model = torch.compile(module.model, backend=counting_backend)
    return module


def compile_in_place(module):
    module.model.compile(backend=counting_backend)
    return module


def compile_layer(module):
    module.model[3].compile(backend=counting_backend)
    return module


def compile_module(module):
    return torch.compile(module, backend=counting_backend)


COMPILED = [compile_model, compile_in_place, compile_layer, compile_module]


# Dynamo looks whether an activation has a gradient, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("apply", COMPILED)
def test_compiled_models_are_measured(make_trainer, apply):
    def train(monitor):
        torch.compiler.reset()
        COMPILES.clear()
        return fit(make_trainer, apply(Toy()), toy_batches(5), monitor, max_steps=5)

    train(None)
    compiled = len(COMPILES)
    logged, kept = train(ActivationMomentMonitor(every_n_steps=2, per_layer=True))
    assert len(COMPILES) == compiled > 0  # of steps 1 and 3; hooks that come and go change nothing
    assert sorted(logged) == [0, 2, 4]
    for step, values in logged.items():
        assert_logged(values, dense_moments(Toy(), kept.states[step], kept.batches[step]))
    assert [hooks[0] for hooks in kept.hooks.values()] == [2, 0, 2, 0, 2]
    torch.compiler.reset()


def test_a_compiled_function_is_not_measured_silently(make_trainer):
    module = Toy()
    module.model.forward = torch.compile(module.model.forward, backend=counting_backend)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="saw no adapter run"):
        logged, _ = fit(make_trainer, module, toy_batches(2), ActivationMomentMonitor(1))
    assert logged == {}
    torch.compiler.reset()


def peft_toy(dropout):
    """Return a LightningModule around a PEFT model: rank 3, alpha 5, rank-stabilized."""
    import peft

    module = Toy()
    plain = nn.Sequential(*(getattr(layer, "base", layer) for layer in module.model))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["1", "3"], lora_dropout=dropout
    )
    module.model = peft.get_peft_model(plain, config)
    for index, own in enumerate(adapters_of(Toy())):
        layer = module.model.base_model.model[2 * index + 1]
        layer.lora_A["default"].weight.data = own.lora_a.data
        layer.lora_B["default"].weight.data = own.lora_b.data
    return module


def adapters_of(module):
    return [layer for _, layer in adapter_layers(module)]


def test_a_module_around_a_peft_model(make_trainer):
    monitor = ActivationMomentMonitor(every_n_steps=1, per_layer=True)
    logged, kept = fit(make_trainer, peft_toy(0.0), toy_batches(1), monitor, max_steps=1)
    own = {name: p.detach() for name, p in trainable(Toy()).items()}  # the same numbers
    expected = dense_moments(Toy(), own, kept.batches[0])
    assert_logged(
        {tag.replace("base_model.model.", ""): v for tag, v in logged[0].items()}, expected
    )

    _, plain = fit(make_trainer, peft_toy(0.4), toy_batches(3), None, max_steps=3)
    _, monitored = fit(make_trainer, peft_toy(0.4), toy_batches(3), monitor, max_steps=3)
    assert torch.equal(torch.stack(monitored.losses), torch.stack(plain.losses))


def test_disabled_adapters_of_peft_are_not_counted(make_trainer):
    class WithReference(type(peft_toy(0.0))):
        def training_step(self, batch, batch_idx):
            with torch.no_grad(), self.model.disable_adapter():
                self.nats(batch)
            return super().training_step(batch, batch_idx)

    module = peft_toy(0.0)
    monitor = ActivationMomentMonitor(every_n_steps=1)
    expected, _ = fit(make_trainer, module, toy_batches(1), monitor, max_steps=1)
    module = peft_toy(0.0)
    module.__class__ = WithReference
    found, _ = fit(make_trainer, module, toy_batches(1), monitor, max_steps=1)
    assert found == expected


def test_adapters_of_another_kind_are_refused(make_trainer):
    import peft

    module = Toy()
    plain = nn.Sequential(nn.Embedding(53, 6), nn.Linear(6, 53))
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["1"])
    module.model = peft.get_peft_model(plain, config)
    with pytest.raises(UserError, match=r"model\.1 has a PEFT adapter that is not gamma_r B A x"):
        fit(make_trainer, module, toy_batches(1), ActivationMomentMonitor())


def test_an_adapter_with_a_bias_is_refused(make_trainer):
    import peft

    module = Toy()
    plain = nn.Sequential(nn.Embedding(53, 6), nn.Linear(6, 53))
    module.model = peft.get_peft_model(plain, peft.LoraConfig(lora_bias=True, target_modules=["1"]))
    with pytest.raises(UserError) as caught:
        fit(make_trainer, module, toy_batches(1), ActivationMomentMonitor())
    assert str(caught.value) == (
        "model.base_model.model.1 has a PEFT adapter that is not gamma_r B A x (such as DoRA, or "
        "one with a bias); turn activation_moments off."
    )


def test_partitioned_matrices_are_refused(make_trainer):
    module = Toy()
    adapters_of(module)[1].lora_b.ds_numel = 999  # as ZeRO-3 notes it where it took one away
    with pytest.raises(UserError, match="ZeRO-3 has an adapter's matrix partitioned"):
        fit(make_trainer, module, toy_batches(1), ActivationMomentMonitor())


def test_embeddings_and_parameters_of_peft_are_no_linear_maps():
    import peft

    plain = nn.Sequential(nn.Embedding(53, 6), nn.Linear(6, 7), nn.Linear(7, 53))
    config = peft.LoraConfig(r=3, target_modules=["0", "1"], target_parameters=["2.weight"])
    model = peft.get_peft_model(plain, config)
    assert [path for path, _ in adapted_layers(model)] == ["base_model.model.1"]


def test_the_mask_of_a_batch():
    mask = torch.ones(2, 11)
    batch = Batch(mask, mask, mask)
    assert attention_mask(batch) is mask
    assert attention_mask({"attention_mask": mask}) is mask
    assert attention_mask({"attention_mask": mask[None, None]}) is None  # not [B, T]
    assert attention_mask((mask, mask)) is attention_mask(mask) is attention_mask({}) is None


class LooksAtGradients(Toy):
    """Takes gradients of its own, too, before those of the loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        first = adapters_of(self)[0].lora_b
        torch.autograd.grad(3 * loss, first, retain_graph=True)
        return loss


@pytest.mark.parametrize("by_hand", [False, True])
def test_other_gradients_than_the_losss_are_left_out(make_trainer, by_hand):
    class ByHand(LooksAtGradients):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))

    options = {"max_epochs": 1} if by_hand else {"accumulate_grad_batches": 2, "max_steps": 1}
    module = ByHand() if by_hand else LooksAtGradients()
    monitor = ActivationMomentMonitor(every_n_steps=1, per_layer=True)
    batches = toy_batches(1 if by_hand else 2)
    logged, kept = fit(make_trainer, module, batches, monitor, **options)
    assert_logged(logged[0], dense_moments(Toy(), kept.states[0], kept.batches[0]))


def test_a_backward_pass_that_lightning_does_not_see_is_measured(make_trainer):
    class OnItsOwn(Toy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx).backward()

    monitor = ActivationMomentMonitor(every_n_steps=1, per_layer=True)
    logged, kept = fit(make_trainer, OnItsOwn(), toy_batches(1), monitor, max_epochs=1)
    expected = dense_moments(Toy(), kept.states[0], list(toy_batches(1)))
    assert_logged(logged[0], expected)


def test_manual_optimization_logs_every_nth_batch(make_trainer):
    class Manual(Toy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    monitor = ActivationMomentMonitor(every_n_steps=2, per_layer=True)
    logged, kept = fit(make_trainer, Manual(), toy_batches(5), monitor, max_steps=5)
    assert sorted(logged) == [0, 2, 4]
    for step, values in logged.items():
        assert_logged(values, dense_moments(Toy(), kept.states[step], kept.batches[step]))
