import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.demos.boring_classes import RandomDataset
from torch import nn
from torch.utils.data import DataLoader

from rslightning.__main__ import main
from rslightning.callbacks import NonFiniteGuard, TrainableCheckpoint
from rslightning.callbacks.non_finite_guard import NonFiniteError
from rslightning.errors import RunError
from rslightning.rslora import adapter_state_dict
from rslightning.strategies import FSDP2Strategy


class Poison(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def spoil(module, path, when, value=float("inf"), gradient=False):
    """Let a module's output be `value` (or its gradient NaN) in the forward passes `when`."""
    passes, is_spoiled = iter(range(10**6)), False

    def hook(_, inputs, output):
        nonlocal is_spoiled
        if not torch.is_grad_enabled():  # the second look: the culprit is still there
            return output * value if is_spoiled and not gradient else output
        if next(passes) not in when:
            return output
        is_spoiled = True
        return Poison.apply(output) if gradient else output * value

    torch.manual_seed(0)  # as `fit` does for a module that is not spoiled
    module.configure_model()
    module.get_submodule(path).register_forward_hook(hook)


PLACE = "model.model.layers.1.mlp.up_proj"


def fit(make_trainer, module, data, **options):
    options = {"limit_val_batches": 0, "max_steps": 5} | options
    torch.manual_seed(0)
    make_trainer(**options).fit(module, data)


def weights(module):
    return {name: tensor.clone() for name, tensor in adapter_state_dict(module.model).items()}


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, make_module, make_data, packing):
    reference = make_module()
    fit(make_trainer, reference, make_data(packing=packing), max_steps=2)
    module = make_module()
    spoil(module, PLACE, {2})
    with pytest.raises(RunError) as caught:
        fit(make_trainer, module, make_data(packing=packing), callbacks=[NonFiniteGuard()])
    message = str(caught.value)
    assert message.startswith(
        f"Step 3 was not taken: the loss is nan; the first such value is an output of {PLACE}. A"
    )
    assert module.trainer.global_step == 2
    expected = weights(reference)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(module).items())


def test_a_gradient_that_is_not_finite_stops_the_run(make_trainer, make_module, make_data):
    module = make_module()
    spoil(module, PLACE, {1}, gradient=True)
    with pytest.raises(RunError) as caught:
        fit(make_trainer, module, make_data(), callbacks=[NonFiniteGuard()])
    assert str(caught.value).startswith(
        "Step 2 was not taken: a gradient is not finite; the first such value is in the gradient "
        f"of {PLACE}.lora_b."
    )


def test_the_last_micro_batches_are_searched(make_trainer, make_module, make_data):
    module = make_module()
    spoil(module, PLACE, {4})  # the second of three micro-batches of step 2
    options = {"accumulate_grad_batches": 3, "callbacks": [NonFiniteGuard()]}
    with pytest.raises(RunError, match=rf"^Step 2 was not taken: .* an output of {PLACE}\."):
        fit(make_trainer, module, make_data(), **options)


def test_the_last_good_state_is_kept_as_last(make_trainer, make_module, make_data, tmp_path):
    module = make_module()
    spoil(module, PLACE, {3})
    callbacks = [TrainableCheckpoint(every_n_steps=2), NonFiniteGuard()]
    options = {"callbacks": callbacks, "enable_checkpointing": True}
    with pytest.raises(RunError, match=f"The weights of step 3 are kept in {tmp_path}/checkpoints"):
        fit(make_trainer, module, make_data(), **options)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    kept = {name.removeprefix("model."): tensor for name, tensor in last["state_dict"].items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(module).items())
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    fit(make_trainer, again := make_module(), make_data(), max_steps=4)
    assert all(bool(tensor.isfinite().all()) for tensor in weights(again).values())


def test_a_run_that_is_finite_is_left_alone(make_trainer, make_module, make_data):
    plain, guarded = make_module(), make_module()
    fit(make_trainer, plain, make_data(), accumulate_grad_batches=2)
    guard = NonFiniteGuard()
    fit(make_trainer, guarded, make_data(), accumulate_grad_batches=2, callbacks=[guard])
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(guarded).items())
    assert guard._batches == guard._losses == []


def test_processes_stop_together(make_trainer, make_module, make_data, run_processes, tmp_path):
    make_data().setup("fit")  # the cache is there before the fork

    def rank(number):
        module = make_module()
        spoil(module, PLACE, {2} if number == 1 else set())
        options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        with pytest.raises(RunError, match=r"^Step 3 was not taken: "):
            fit(make_trainer, module, make_data(), callbacks=[NonFiniteGuard()], **options)

    assert run_processes(2, rank) == [0, 0]


class SpoilFirstMicroBatch(Callback):
    """Let one process overflow at step 3, whenever it sees the first of its two micro-batches."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank != 0 or batch_idx != 4:
            return
        is_hit = False

        def look(module, args, kwargs):
            nonlocal is_hit
            is_hit = torch.equal(kwargs["input_ids"], batch.input_ids)

        pl_module.model.register_forward_pre_hook(look, with_kwargs=True)
        pl_module.get_submodule(PLACE).register_forward_hook(
            lambda module, inputs, output: output * float("inf") if is_hit else output
        )


@pytest.mark.parametrize("shared_out", [False, True])
def test_processes_stop_together_whoever_overflows(
    make_trainer, make_module, make_data, run_processes, tmp_path, shared_out
):
    make_data().setup("fit")

    def rank(number):
        signal.alarm(60)  # a process that waits for the other one would wait for ever
        strategy = FSDP2Strategy() if shared_out else "ddp"
        callbacks = [SpoilFirstMicroBatch(), TrainableCheckpoint(every_n_steps=500)]
        options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
        options |= {"accumulate_grad_batches": 2, "enable_checkpointing": True}
        options["callbacks"] = [*callbacks, NonFiniteGuard()]
        with pytest.raises(RunError, match=r"^Step 3 was not taken: ") as caught:
            fit(make_trainer, make_module(), make_data(batch_size=2), **options)
        assert number == 1 or f"an output of {PLACE}." in str(caught.value)

    assert run_processes(2, rank) == [0, 0]
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in last["state_dict"].values())


class Foreign(LightningModule):
    """A module of somebody else, which logs as it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 7), nn.Linear(7, 2)

    def training_step(self, batch):
        hidden = self.first(batch)
        if self.global_step == 2:
            hidden = hidden / 0.0
        loss = self.second(hidden).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 20), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_module_that_is_not_ours(make_trainer):
    module = Foreign()
    with pytest.raises(RunError) as caught:
        make_trainer(max_epochs=1, callbacks=[NonFiniteGuard()]).fit(module)
    assert str(caught.value).startswith(
        "Step 3 was not taken: the loss is nan; the first such value"
    )
    assert "an output of second" in str(caught.value)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert not module.second._forward_hooks
    assert "log" not in vars(module)


class TakesItsBatchApart(Foreign):
    def training_step(self, batch):
        return super().training_step(batch.pop("x"))

    def train_dataloader(self):
        return DataLoader([{"x": row, "y": row} for row in RandomDataset(32, 20)], batch_size=4)


class TakesWhatComes(Foreign):
    """Lightning gives the index of the batch to a step like this one."""

    def training_step(self, *args):
        batch, _ = args
        return super().training_step(batch)


class CountsItsBatches(Foreign):
    """Keeps one buffer that is changed in place, and one that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("changed", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def training_step(self, batch):
        self.changed += 1
        self.replaced = self.replaced + 1
        return super().training_step(batch)


def stopped(make_trainer, module):
    with pytest.raises(NonFiniteError) as caught:
        make_trainer(max_epochs=1, callbacks=[NonFiniteGuard()]).fit(module)
    return str(caught.value)


def test_a_step_that_cannot_be_repeated_hides_nothing(make_trainer):
    assert stopped(make_trainer, module := TakesItsBatchApart()) == (
        "Step 3 was not taken: the loss is nan; where it began is unknown, since training_step "
        "could not be repeated (KeyError). A lower learning rate, warm-up or "
        "trainer.gradient_clip_val may help."
    )
    assert not module.second._forward_hooks
    assert "log" not in vars(module)


def test_a_step_is_repeated_as_lightning_takes_it(make_trainer):
    assert "the first such value is an output of second." in stopped(make_trainer, TakesWhatComes())


def test_buffers_do_not_see_the_second_pass(make_trainer):
    stopped(make_trainer, module := CountsItsBatches())
    assert (module.changed, module.replaced) == (3, 3)
    assert dict(module.named_buffers()).keys() == {"changed", "replaced"}


def test_a_buffer_that_a_validation_left_is_no_hindrance(make_trainer):
    """As of rotary embeddings whose frequencies depend on the length."""
    module = Foreign()
    with torch.inference_mode():
        module.register_buffer("frequencies", torch.ones(3))
    assert "the first such value is an output of second." in stopped(make_trainer, module)


class Stops(Foreign):
    """Fails with an error of its own after a micro-batch whose loss is NaN."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise RuntimeError("out of memory")
        return self.second(self.first(batch)).square().mean() * float("nan")


def test_a_fit_that_failed_is_forgotten(make_trainer):
    guard = NonFiniteGuard()
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(max_epochs=1, callbacks=[guard], accumulate_grad_batches=2).fit(Stops())
    make_trainer(max_steps=2, callbacks=[guard], accumulate_grad_batches=2).fit(Foreign())


def test_a_loss_beyond_float32_is_finite_in_float64(make_trainer):
    class Huge(Foreign):
        def training_step(self, batch):
            return super().training_step(batch) * 1e45

    options = {"precision": "64-true", "callbacks": [NonFiniteGuard()]}
    make_trainer(max_steps=1, **options).fit(module := Huge())
    assert module.trainer.global_step == 1


class TwoOptimizers(Foreign):
    """Steps two optimizers by hand in every batch."""

    def __init__(self, bad_step) -> None:
        super().__init__()
        self.automatic_optimization, self.bad_step = False, bad_step

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = self.second(self.first(batch)).square().mean()
            if self.global_step == self.bad_step:
                loss = loss * float("nan")
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.first, self.second)]


def test_several_optimizers_that_step_by_hand(make_trainer):
    options = {"max_epochs": 1, "callbacks": [NonFiniteGuard()]}
    make_trainer(**options).fit(module := TwoOptimizers(bad_step=None))
    assert module.trainer.global_step == 10
    module = TwoOptimizers(bad_step=3)
    with pytest.raises(RunError) as caught:
        make_trainer(**options).fit(module)
    assert str(caught.value).startswith(
        "Step 4 was not taken: the loss is nan; the first such value is in the gradient of second"
    )
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_the_command_says_it_in_one_sentence(
    tmp_path, model_folder, orca_folder, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code = main(
        [
            "fit",
            f"--model.base_model={model_folder}",
            "--model.adapter.rank=2",
            "--model.dtype=float32",
            "--model.optimizer.class_path=torch.optim.SGD",
            "--model.optimizer.init_args.lr=1e38",
            "--data.class_path=rslightning.data.OpenOrca",
            f"--data.init_args.path={orca_folder}",
            "--data.init_args.max_length=64",
            "--trainer.max_steps=6",
            "--trainer.accelerator=cpu",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
            "--trainer.logger=false",
            "--trainer.default_root_dir=run",
        ]
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1
    assert error.startswith("rslightning: Step 2 was not taken: the loss is nan; the first such ")
    assert "The weights of step 1 are kept in " in error
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert not (tmp_path / "run" / "merged").exists()
