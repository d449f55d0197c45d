"""AdaLoRA in a fit: when ranks are allocated, that runs go on, and what they leave."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rslightning.callbacks import (
    GradientNormMonitor,
    MergeAdapters,
    RankStabilityReport,
    RunSummary,
    TrainableCheckpoint,
    gradient_norm,
)
from rslightning.checkpoint import load_adapter
from rslightning.errors import UserError
from rslightning.losses import token_nats
from rslightning.plan import read_plan
from rslightning.rslora import AdapterSpec, RankAllocation, adapter_layers, adapter_parameters
from rslightning.rslora.adalora import RankAllocator
from rslightning.strategies import FSDP2Strategy
from rslightning.strategies.sharing import refuse_shared_gradients

RANK, MODULES = 6, 14
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def spec(rank=RANK, **plan):
    plan = {"target_rank": 2, "warmup_steps": 1, "final_steps": 1} | plan
    return AdapterSpec(rank=rank, alpha=5.0, allocation=RankAllocation(**plan))


def fit(make_trainer, module, data, ckpt_path=None, **options):
    torch.manual_seed(7)
    trainer = make_trainer(**({"max_steps": 6, "limit_val_batches": 0} | options))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def state_of(module):
    return {name: p.detach().clone() for name, p in adapter_parameters(module.model).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def kept_ranks(module):
    return [int(layer.lora_e.count_nonzero()) for _, layer in adapter_layers(module.model)]


class Watch(Callback):
    """Notes what is logged with each step."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        names = ("train/loss", "allocation/budget", "allocation/kept_ranks")
        if len(self.logged) < trainer.global_step:
            self.logged.append([trainer.callback_metrics[name].item() for name in names])


# --- steps ----------------------------------------------------------------------------------------


def dense_penalty(model):
    gaps = []
    for _, layer in adapter_layers(model):
        for gram in (layer.lora_a @ layer.lora_a.T, layer.lora_b.T @ layer.lora_b):
            gaps.append((gram - torch.eye(RANK)).square().sum().sqrt())
    return 0.5 * sum(gaps) / len(gaps)


def test_a_fit_is_the_plain_loop(make_trainer, make_module, make_data):
    """12 micro-batches in steps of 5, 5 and 2, with gradients that are clipped."""
    adapter = spec(warmup_steps=0, final_steps=0)
    data, module = make_data(batch_size=2), make_module(adapter=adapter)
    data.setup("fit")
    batches = list(data.train_dataloader())
    torch.manual_seed(7)
    module.configure_model()
    parameters = list(adapter_parameters(module.model).values())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    allocator = RankAllocator(module.model, adapter.allocation, 3)
    expected = []
    for step, part in enumerate((batches[:5], batches[5:10], batches[10:]), 1):
        optimizer.zero_grad()
        pairs = [token_nats(module(batch), batch.labels) for batch in part]
        loss = sum(nats for nats, _ in pairs) / sum(targets for _, targets in pairs)
        (loss + dense_penalty(module.model)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        expected.append([loss.item(), allocator.update(step), sum(kept_ranks(module))])
    watch, own = Watch(), make_module(adapter=adapter, optimizer=partial(torch.optim.SGD, lr=0.5))
    options = {"accumulate_grad_batches": 5, "gradient_clip_val": 0.3, "max_epochs": 1}
    fit(make_trainer, own, make_data(batch_size=2), max_steps=-1, callbacks=[watch], **options)
    for found, values in zip(watch.logged, expected, strict=True):
        assert found == pytest.approx(values, rel=1e-5)
    assert [budget for _, budget, _ in watch.logged] == [44, 30, 28]
    for name, parameter in adapter_parameters(own.model).items():
        truth = adapter_parameters(module.model)[name]
        torch.testing.assert_close(parameter, truth, rtol=1e-4, atol=1e-6)
    assert kept_ranks(own) == kept_ranks(module)
    assert len(set(kept_ranks(own))) > 1


def test_two_processes_train_as_one(make_trainer, make_module, make_data, run_processes, tmp_path):
    options = {"max_steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.3}

    def train(rank):
        module = make_module(adapter=spec(), optimizer=ADAMW)
        two = {"strategy": "ddp", "devices": 2}
        fit(make_trainer, module, make_data(batch_size=2), **options, **two)
        torch.save(state_of(module), tmp_path / f"{rank}.pt")

    assert run_processes(2, train) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)
    module = make_module(adapter=spec(), optimizer=ADAMW)
    fit(make_trainer, module, make_data(batch_size=4), **options)
    assert sum(kept_ranks(module)) == 2 * MODULES
    for name, tensor in state_of(module).items():
        assert torch.equal(first[name] == 0, tensor == 0), name
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-4)


def test_a_step_that_float16_skips_leaves_the_scores_alone(make_trainer, make_module, make_data):
    """A loss scale of 2^60 overflows once; then it is 2^10."""
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            means = pl_module._allocator.means.values()
            seen.append(sum(float(mean.sum()) for mean in means))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    module = make_module(adapter=spec())
    fit(make_trainer, module, make_data(), max_steps=4, plugins=plugins, callbacks=[Look()])
    assert seen[0] == 0 < seen[1] < 1
    assert sum(kept_ranks(module)) == 2 * MODULES


def test_the_norm_of_gradients_includes_those_of_e(
    make_trainer, make_module, make_data, monkeypatch
):
    norms, written = [], []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in adapter_parameters(pl_module.model).values()]
            norms.append(sum(float(g.norm()) for g in gradients) / (3 * MODULES))

    monkeypatch.setattr(
        gradient_norm, "write_scalars", lambda trainer, values, step: written.append(values)
    )
    callbacks = [Look(), GradientNormMonitor(1)]
    fit(make_trainer, make_module(adapter=spec()), make_data(), max_steps=3, callbacks=callbacks)
    assert [values["grad_norm/mean"] for values in written] == pytest.approx(norms, rel=1e-5)


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 5])  # amid the allocation, and when it is final
def test_a_resumed_run_is_the_uninterrupted_one(
    make_trainer, make_module, make_data, tmp_path, stop
):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == stop and trainer.fit_loop._should_accumulate() is False:
                trainer.save_checkpoint(tmp_path / "stop.ckpt", weights_only=False)

    straight, resumed = make_module(adapter=spec()), make_module(adapter=spec())
    options = {"accumulate_grad_batches": 2}
    fit(make_trainer, straight, make_data(), callbacks=[Save()], **options)
    content = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    assert sum(name.endswith("lora_e") for name in content["state_dict"]) == MODULES
    assert len(content["allocation"]["means"]) == (3 * MODULES if stop == 3 else 0)
    fit(make_trainer, resumed, make_data(), ckpt_path=tmp_path / "stop.ckpt", **options)
    assert_same(state_of(resumed), state_of(straight))
    assert sum(kept_ranks(straight)) == 2 * MODULES


def test_another_allocation_does_not_go_on(make_trainer, make_module, make_data, tmp_path):
    trainer = fit(make_trainer, make_module(adapter=spec()), make_data(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "three.ckpt", weights_only=False)
    other = make_module(adapter=spec(target_rank=3))
    with pytest.raises(UserError, match=r"adapter.allocation \{'target_rank': 2, .*, this run"):
        fit(make_trainer, other, make_data(), ckpt_path=tmp_path / "three.ckpt")


# --- what is left ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def allocated_run(tmp_path_factory, make_module, make_data):
    """A fit with everything that it leaves: its folder, module and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "adalora"
    callbacks = [TrainableCheckpoint(), MergeAdapters(), GradientNormMonitor(1)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_steps": 6}
    module = make_module(adapter=spec())
    torch.manual_seed(7)
    Trainer(**quiet, **options, callbacks=callbacks, limit_val_batches=0).fit(module, make_data())
    return folder, module.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 23).reshape(2, 10)).logits


# PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_folders_compute_what_was_trained(allocated_run, model_folder):
    folder, module = allocated_run
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    trained, before = logits(module.model), logits(base)
    assert (trained - before).abs().max() > 0.01
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)
    theirs = logits(PeftModel.from_pretrained(base, folder / "adapter"))
    torch.testing.assert_close(theirs, trained, rtol=0, atol=1e-4)


def test_a_checkpoint_s_adapter_is_the_folder_s(allocated_run):
    folder, module = allocated_run
    exported = load_adapter(folder / "adapter")
    saved = load_adapter(folder / "checkpoints/last.ckpt")
    assert exported.layers.keys() == saved.layers.keys()
    for path, layer in adapter_layers(module.model):
        one, other = exported.layers[path], saved.layers[path]
        assert torch.equal(one.lora_a, other.lora_a)
        assert torch.equal(one.lora_b, other.lora_b)
        kept = int(layer.lora_e.count_nonzero())
        assert one.numbers.rank == other.numbers.rank == max(kept, 1)
        assert one.numbers.gamma == pytest.approx(layer.gamma)
        update = layer.gamma * layer.lora_b @ layer.lora_e.diag() @ layer.lora_a
        torch.testing.assert_close(layer.gamma * one.lora_b @ one.lora_a, update)


@pytest.mark.parametrize("place", ["checkpoints/last.ckpt", "adapter"])
def test_a_module_starts_from_what_a_run_left(allocated_run, make_module, place):
    folder, module = allocated_run
    other = make_module(adapter=spec(), start_from=str(folder / place))
    other.configure_model()
    torch.testing.assert_close(logits(other.model), logits(module.model), rtol=0, atol=1e-5)
    assert kept_ranks(other) == [max(kept, 1) for kept in kept_ranks(module)]


def test_the_start_says_what_is_allocated(make_trainer, make_module, make_data, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    module = make_module(adapter=spec())
    fit(make_trainer, module, make_data(), max_steps=3, callbacks=[RunSummary()])
    said = "\n".join(record.getMessage() for record in caplog.records)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert f"base       {module.base_model}, {frozen:,} parameters" in said
    assert f"train      {trained:,} parameters" in said
    assert "adalora (rslora) on 14 linear modules: rank 6 -> 2 on average, gamma 2.041" in said
    assert "memory     not estimated" in said


# --- refusals -------------------------------------------------------------------------------------


def test_a_strategy_that_shares_gradients_out_is_refused(make_module):
    module = make_module(adapter=spec())
    module.trainer = Trainer(accelerator="cpu", strategy=FSDP2Strategy(), barebones=True)
    with pytest.raises(UserError) as error:
        module.configure_model()
    assert str(error.value) == (
        "model.adapter.allocation needs whole gradients, of which FSDP2Strategy leaves each "
        "process a part: take configs/strategy/ddp.yaml, or leave allocation out."
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_stage_of_zero_has_whole_gradients(stage):
    cpu = pytest.importorskip("deepspeed_cpu")
    with pytest.raises(UserError, match="of which CPUZeroStrategy leaves each process a part"):
        refuse_shared_gradients(cpu.CPUZeroStrategy(stage=stage))


@pytest.mark.filterwarnings("ignore:.*max_epochs")
def test_a_run_without_end_is_refused(make_trainer, make_module, make_data):
    with pytest.raises(UserError, match=r"its trainer says inf\): set trainer.max_steps"):
        fit(make_trainer, make_module(adapter=spec()), make_data(), max_steps=-1, max_epochs=-1)


def test_a_run_too_short_is_refused(make_trainer, make_module, make_data):
    with pytest.raises(UserError, match="leave none of the run's 2 steps"):
        fit(make_trainer, make_module(adapter=spec()), make_data(), max_steps=2)


def test_a_report_on_ranks_that_stay_is_refused(make_trainer, make_module, make_data):
    with pytest.raises(UserError, match=r"leave model\.adapter\.allocation out, or set rank_stab"):
        fit(
            make_trainer,
            make_module(adapter=spec()),
            make_data(),
            callbacks=[RankStabilityReport(ranks=(2, 4))],
        )


def test_a_plan_is_refused(model_folder):
    adapter = {"rank": 4, "targets": "mlp", "rank_pattern": {}, "allocation": {"target_rank": 2}}
    with pytest.raises(UserError, match="A plan is for ranks that stay"):
        read_plan({"model": {"base_model": str(model_folder), "adapter": adapter}, "trainer": {}})
