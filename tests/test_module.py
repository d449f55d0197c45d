import copy
import csv
import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import optim
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from rslightning import CausalLMModule
from rslightning.batch import IGNORED, Batch
from rslightning.callbacks import TrainableCheckpoint
from rslightning.errors import UserError
from rslightning.losses import token_nats
from rslightning.rslora import AdapterSpec, adapter_parameters

STEPS = 4


def start(module):
    """Build the module's model from a fixed seed, as a fit would."""
    torch.manual_seed(7)
    module.configure_model()
    return module


def clone(state):
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def batches_of(data):
    """Return the micro-batches that a fit of a fresh DataModule sees, in order."""
    data.setup("fit")
    return list(data.train_dataloader())


def targets_of(batch):
    return int((batch.labels[:, 1:] != IGNORED).sum())


def mean_nats(model, batch):
    nats, targets = token_nats(
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, batch.labels
    )
    return nats / targets


def plain_loop(module, batches, optimizer, scheduler=None, max_norm=None):
    """Train with torch alone; return the trainable state and the losses."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    steps = optimizer(trainable)
    schedule = scheduler(steps) if scheduler else None
    losses = []
    for batch in batches:
        steps.zero_grad()
        loss = mean_nats(module.model, batch)
        loss.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(trainable, max_norm)
        steps.step()
        if schedule:
            schedule.step()
        losses.append(loss.item())
    return clone(module.trainable_state()), losses


class LogLosses(Callback):
    """Keep what the module logs after each step."""

    def __init__(self):
        self.losses, self.perplexities = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.perplexities.append(trainer.callback_metrics["train/perplexity"].item())


def fit(make_trainer, module, data, **options):
    torch.manual_seed(7)
    options = {"max_steps": STEPS, "limit_val_batches": 0, **options}
    trainer = make_trainer(**options)
    trainer.fit(module, data)
    return trainer


# --- loss ---------------------------------------------------------------------------------------


class GradientsAtForward(Callback):
    """Notes, for each micro-batch, whether any gradient is there before its forward pass."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(any(p.grad is not None for p in pl_module.parameters()))


@pytest.mark.parametrize(("micro", "seen"), [(1, [False] * 4), (2, [False, True] * 2)])
def test_gradients_of_a_step_are_gone_before_the_next(
    make_trainer, make_module, make_data, micro, seen
):
    watch = GradientsAtForward()
    options = {"max_steps": 4 // micro, "accumulate_grad_batches": micro, "callbacks": [watch]}
    fit(make_trainer, make_module(), make_data(), **options)
    assert watch.seen == seen


def test_the_loss_is_the_mean_cross_entropy_of_the_targets(make_module, model_folder):
    module = start(make_module())
    long, short = [1, 40, 41, 42, 43, 2], [1, 50, 2]
    batch = Batch(
        input_ids=torch.tensor([long, [*short, 0, 0, 0]]),
        labels=torch.tensor([[IGNORED] * 3 + long[3:], [IGNORED, *short[1:]] + [IGNORED] * 3]),
        attention_mask=torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
    )
    loss = module.training_step(batch, 0)
    base = LlamaForCausalLM.from_pretrained(model_folder)  # at B = 0 the adapters do nothing
    nats = 0.0
    for ids, targets in ((long, 3), (short, 2)):
        scores = base(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= sum(scores[t - 1, ids[t]].item() for t in range(len(ids) - targets, len(ids)))
    assert loss.item() == pytest.approx(nats / 5, rel=1e-6)


def test_logged_losses_are_those_of_the_steps(make_trainer, make_module, make_data):
    _, losses = plain_loop(
        start(make_module()), batches_of(make_data())[:STEPS], partial(optim.AdamW, lr=1e-2)
    )
    log = LogLosses()
    fit(make_trainer, make_module(), make_data(), callbacks=[log])
    assert log.losses == pytest.approx(losses, rel=1e-5)
    assert log.perplexities == pytest.approx(torch.tensor(losses).exp().tolist(), rel=1e-5)


def test_a_fit_that_failed_leaves_nothing_of_a_step_behind(make_trainer, make_module, make_data):
    class Fail(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("the device is lost")

    module, options = make_module(), {"max_steps": 1, "accumulate_grad_batches": 3}
    with pytest.raises(RuntimeError, match="the device is lost"):
        fit(make_trainer, module, make_data(), callbacks=[Fail()], **options)
    again = fit(make_trainer, module, make_data(), **options)
    alone = fit(make_trainer, make_module(), make_data(), **options)
    assert again.callback_metrics["train/loss"] == alone.callback_metrics["train/loss"]


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_pass_before_a_fit_leaves_nothing_behind(make_trainer, make_module, make_data, verb):
    module, data = make_module(), make_data()
    torch.manual_seed(7)
    getattr(make_trainer(), verb)(module, data)
    trainer = fit(
        make_trainer, module, data, max_steps=2, val_check_interval=2, limit_val_batches=3
    )
    single = fit(
        make_trainer,
        make_module(),
        make_data(),
        max_steps=2,
        val_check_interval=2,
        limit_val_batches=3,
    )
    assert trainer.callback_metrics["val/loss"] == single.callback_metrics["val/loss"]


def test_the_logged_loss_of_a_step_covers_its_micro_batches(make_trainer, make_module, make_data):
    module = start(make_module())
    batches = batches_of(make_data())[:3]
    with torch.no_grad():
        parts = [module.nats(batch) for batch in batches]
    trainer = fit(make_trainer, make_module(), make_data(), max_steps=1, accumulate_grad_batches=3)
    expected = sum(float(nats) for nats, _ in parts) / sum(int(n) for _, n in parts)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)


# --- what is trained ----------------------------------------------------------------------------


def test_only_adapters_change(make_trainer, make_module, make_data):
    module = start(make_module())
    before = clone(module.state_dict())
    fit(make_trainer, module, make_data())
    adapters = {f"model.{name}" for name in adapter_parameters(module.model)}
    changed = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == adapters
    assert len(adapters) == 2 * 7 * 2


def test_without_adapter_everything_is_trained(make_trainer, make_module, make_data):
    module = start(make_module(adapter=None))
    before = clone(module.state_dict())
    fit(make_trainer, module, make_data())
    assert all(not torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert set(module.trainable_state()) == set(dict(module.named_parameters()))


def test_a_second_configure_model_changes_nothing(make_module):
    module = start(make_module())
    model = module.model
    module.configure_model()
    assert module.model is model


def test_drawn_weights_differ_from_the_folder_s(make_module):
    loaded, drawn = start(make_module()), start(make_module(pretrained=False))
    names = dict(loaded.named_parameters()).keys()
    assert names == dict(drawn.named_parameters()).keys()
    embed = "model.model.embed_tokens.weight"
    assert not torch.equal(loaded.get_parameter(embed), drawn.get_parameter(embed))


def test_what_adapters_cannot_reach_is_warned_about(make_module, tmp_path):
    config = MixtralConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    with pytest.warns(UserWarning, match="bare parameters, which adapters on linear modules"):
        make_module(tmp_path / "mixtral").configure_model()


# --- optimizers and schedules --------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": partial(optim.AdamW, lr=1e-2, weight_decay=0.1),
    "SGD": partial(optim.SGD, lr=0.5, momentum=0.9),
    "Adafactor": partial(optim.Adafactor, lr=1e-2),
}
SCHEDULES = {
    "constant": None,
    "LinearLR": partial(optim.lr_scheduler.LinearLR, start_factor=0.25, total_iters=3),
    "CosineAnnealingLR": partial(optim.lr_scheduler.CosineAnnealingLR, T_max=5),
}


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        ("AdamW", "constant"),
        ("AdamW", "LinearLR"),
        ("AdamW", "CosineAnnealingLR"),
        ("SGD", "LinearLR"),
        ("Adafactor", "constant"),
    ],
)
def test_a_fit_is_the_plain_loop(make_trainer, make_module, make_data, optimizer, schedule):
    chosen = {"optimizer": OPTIMIZERS[optimizer], "lr_scheduler": SCHEDULES[schedule]}
    module = start(make_module())
    before = clone(module.trainable_state())
    batches = batches_of(make_data())[:STEPS]
    expected, _ = plain_loop(module, batches, chosen["optimizer"], chosen["lr_scheduler"])
    module = make_module(**chosen)
    fit(make_trainer, module, make_data())
    assert module.trainable_state().keys() == expected.keys()
    for name, tensor in module.trainable_state().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
        assert not torch.equal(tensor, before[name]), name


def test_gradients_are_clipped_as_by_torch(make_trainer, make_module, make_data):
    optimizer = partial(optim.SGD, lr=0.5)
    batches = batches_of(make_data())[:STEPS]
    free, _ = plain_loop(start(make_module()), batches, optimizer)
    expected, _ = plain_loop(start(make_module()), batches, optimizer, max_norm=0.05)
    module = make_module(optimizer=optimizer)
    fit(make_trainer, module, make_data(), gradient_clip_val=0.05)
    for name, tensor in module.trainable_state().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert any((free[name] - expected[name]).abs().max() > 1e-2 for name in free)


def test_accumulated_gradients_are_those_of_the_one_big_batch(make_trainer, make_module, make_data):
    """Six uneven micro-batches in steps of four: the last step has the two that are left."""
    module = start(make_module())
    optimizer = optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    batches = batches_of(make_data())
    targets = [targets_of(batch) for batch in batches]
    assert len(batches) == 6
    assert len(set(targets)) > 3
    for step in (slice(0, 4), slice(4, 6)):
        optimizer.zero_grad()
        for batch in batches[step]:
            (mean_nats(module.model, batch) * targets_of(batch) / sum(targets[step])).backward()
        optimizer.step()
    expected = clone(module.trainable_state())
    module = make_module(optimizer=partial(optim.SGD, lr=0.5))
    trainer = fit(make_trainer, module, make_data(), max_steps=2, accumulate_grad_batches=4)
    assert trainer.global_step == 2
    for name, tensor in module.trainable_state().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient(make_module, make_data):
    batch = batches_of(make_data())[0]
    gradients = []
    for activation_checkpointing in (False, True):
        module = start(make_module(activation_checkpointing=activation_checkpointing))
        for parameter in adapter_parameters(module.model).values():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        assert module.model.is_gradient_checkpointing is activation_checkpointing
        module.training_step(batch, 0).backward()
        gradients.append({k: p.grad for k, p in module.named_parameters() if p.requires_grad})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7)
        assert gradient.abs().max() > 0


def test_mixed_precision_keeps_adapters_and_their_moments_wide(
    make_trainer, make_module, make_data
):
    module = make_module(dtype="bfloat16")
    seen = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["gradients"] = {p.grad.dtype for p in module.parameters() if p.requires_grad}

    log = LogLosses()
    trainer = fit(
        make_trainer, module, make_data(), precision="bf16-mixed", callbacks=[Watch(), log]
    )
    trainable = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    moments = {trainer.optimizers[0].state[p]["exp_avg"].dtype for p in trainable}
    assert moments | seen["gradients"] == {torch.float32}
    _, wide = plain_loop(
        start(make_module()), batches_of(make_data())[:STEPS], partial(optim.AdamW, lr=1e-2)
    )
    assert log.losses == pytest.approx(wide, rel=0.02)


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_weighs_targets_not_batches(make_trainer, make_module, make_data, stage):
    module, data = make_module(), make_data(batch_size=3)
    metrics = getattr(make_trainer(), stage)(module, data, verbose=False)[0]
    whole = make_data(batch_size=100)
    whole.setup("validate")
    (batch,) = whole.val_dataloader()
    module.eval()
    with torch.no_grad():
        nats, targets = token_nats(module(batch), batch.labels)
        means = [float(mean_nats(module.model, part)) for part in data.val_dataloader()]
    prefix = "val" if stage == "validate" else "test"
    expected = float(nats) / int(targets)
    assert metrics == {
        f"{prefix}/loss": pytest.approx(expected, rel=1e-6),
        f"{prefix}/perplexity": pytest.approx(torch.tensor(expected).exp().item(), rel=1e-5),
    }
    assert expected != pytest.approx(sum(means) / len(means), rel=1e-3)  # the batches are uneven


def test_two_passes_do_not_mix(make_trainer, make_module, make_data):
    module, trainer = make_module(), make_trainer()
    first = trainer.validate(module, make_data(), verbose=False)
    assert trainer.validate(module, make_data(), verbose=False) == first


def test_answers_are_those_of_a_greedy_loop(make_trainer, make_module, make_data):
    module, data = make_module(), make_data(batch_size=3)
    answers = [row for part in make_trainer().predict(module, data) for row in part.tolist()]
    assert len(answers) == 7
    module.eval()
    for (prompt, _), answer in zip(data.held_out_rows, answers, strict=True):
        ids = data.tokenizer.encode(prompt)
        written: list[int] = []
        while len(written) < 6 and written[-1:] != [data.tokenizer.eos_token_id]:
            with torch.no_grad():
                scores = module.model(torch.tensor([ids + written])).logits[0, -1]
            written.append(int(scores.argmax()))
        assert answer == written + [data.pad_id] * (len(answer) - len(written))


# --- checkpoints and resume -----------------------------------------------------------------------


@pytest.fixture
def saved(make_trainer, make_module, make_data, tmp_path):
    """Return a module after two steps and the checkpoint of it."""
    module = make_module()
    trainer = fit(make_trainer, module, make_data(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt", weights_only=False)
    return module, tmp_path / "two.ckpt"


def test_a_checkpoint_holds_the_trainable_state_in_plain_values(saved):
    module, path = saved
    content = torch.load(path, weights_only=True)
    assert_same(content["state_dict"], module.trainable_state())
    moments = content["optimizer_states"][0]["state"]
    assert len(moments) == len(content["state_dict"]) == 28
    assert content["hyper_parameters"] == {
        "base_model": module.base_model,
        "adapter": {
            "rank": 3,
            "alpha": 5.0,
            "scaling": "rslora",
            "targets": "all_linear",
            "dropout": 0.0,
            "init": "kaiming_uniform",
            "rank_pattern": {},
            "alpha_pattern": {},
            "allocation": None,
        },
        "dtype": "float32",
        "attention": None,
        "pretrained": True,
        "quantization": None,
    }


def test_resuming_restores_adapters_and_moments(saved, make_trainer, make_module, make_data):
    module, path = saved
    restored = make_module()
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(restored, make_data(), ckpt_path=path)
    assert trainer.global_step == 2
    assert_same(clone(restored.state_dict()), clone(module.state_dict()))
    before = module.trainer.optimizers[0].state_dict()["state"]
    after = trainer.optimizers[0].state_dict()["state"]
    for key, moments in before.items():
        assert_same(clone(moments), clone(after[key]))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_a_checkpoint_evaluates_what_was_trained(
    saved, make_trainer, make_module, make_data, stage
):
    module, path = saved
    run = getattr(make_trainer(), stage)
    untrained = run(make_module(), make_data(), verbose=False)
    trained = run(make_module(), make_data(), ckpt_path=path, verbose=False)
    assert trained == run(copy.deepcopy(module), make_data(), verbose=False)
    assert trained != untrained


# Lightning says that the base is not in the checkpoint, where it need not be.
@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict:UserWarning")
def test_a_module_is_loaded_from_a_checkpoint_alone(saved, make_module):
    module, path = saved
    loaded = CausalLMModule.load_from_checkpoint(path, optimizer=optim.AdamW)
    assert_same(clone(loaded.state_dict()), clone(module.state_dict()))
    assert loaded.adapter == module.adapter


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, "adapter.rank 3, this run 4"),
        ({"alpha": 6.0}, "adapter.alpha 5.0, this run 6.0"),
        ({"scaling": "lora"}, "adapter.scaling 'rslora', this run 'lora'"),
        ({"targets": "mlp"}, "adapter.targets 'all_linear', this run 'mlp'"),
        ({"rank_pattern": {"q_proj": 2}}, "adapter.rank_pattern {}, this run {'q_proj': 2}"),
    ],
)
def test_resuming_another_adapter_is_refused(
    saved, make_trainer, make_module, make_data, change, message
):
    spec = AdapterSpec(**({"rank": 3, "alpha": 5.0} | change))
    with pytest.raises(UserError) as caught:
        make_trainer(max_steps=3).fit(make_module(adapter=spec), make_data(), ckpt_path=saved[1])
    assert str(caught.value) == (
        f"The checkpoint has {message}; set it to the checkpoint's, or start a new run."
    )


def test_resuming_on_another_base_is_refused(
    saved, make_trainer, make_module, make_data, model_folder, tmp_path
):
    shutil.copytree(model_folder, tmp_path / "other-llama")
    other = make_module(tmp_path / "other-llama")
    with pytest.raises(UserError) as caught:
        make_trainer(max_steps=3).fit(other, make_data(), ckpt_path=saved[1])
    assert str(caught.value) == (
        "The checkpoint has base_model 'tiny-llama', this run 'other-llama'; set it to the "
        "checkpoint's, or start a new run."
    )


def test_resuming_on_a_base_that_moved_is_allowed(
    saved, make_trainer, make_module, make_data, model_folder, tmp_path
):
    moved = shutil.copytree(model_folder, tmp_path / "elsewhere" / "tiny-llama")
    module = make_module(moved)
    make_trainer(max_steps=2).fit(module, make_data(), ckpt_path=saved[1])
    assert_same(clone(module.trainable_state()), clone(saved[0].trainable_state()))


@pytest.mark.parametrize("full_first", [False, True])
def test_full_fine_tuning_and_adapters_do_not_resume_each_other(
    make_trainer, make_module, make_data, tmp_path, full_first
):
    kinds = [make_module(), make_module(adapter=None)]
    first, second = reversed(kinds) if full_first else kinds
    trainer = fit(make_trainer, first, make_data(), max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    with pytest.raises(UserError) as caught:
        make_trainer(max_steps=2).fit(second, make_data(), ckpt_path=tmp_path / "one.ckpt")
    methods = ["adapters", "full fine-tuning"]
    saved, wanted = reversed(methods) if full_first else methods
    assert str(caught.value) == (
        f"The checkpoint has method {saved!r}, this run {wanted!r}; set it to the checkpoint's, or "
        "start a new run."
    )


def test_full_fine_tuning_resumes(make_trainer, make_module, make_data, tmp_path):
    module = make_module(adapter=None)
    trainer = fit(make_trainer, module, make_data(), max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    restored = make_module(adapter=None)
    make_trainer(max_steps=1).fit(restored, make_data(), ckpt_path=tmp_path / "one.ckpt")
    assert_same(clone(restored.state_dict()), clone(module.state_dict()))


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def small_vocabulary(tmp_path):
    """A model that knows fewer token ids than the tokenizer of `make_data` gives."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_token_ids_out_of_the_vocabulary_are_refused(
    small_vocabulary, make_trainer, make_module, make_data, stage
):
    module, data = make_module(small_vocabulary), make_data()
    with pytest.raises(UserError) as caught:
        getattr(make_trainer(max_steps=1), stage)(module, data)
    examples = [*(data.train or []), *data.held_out]
    largest = max(int(example.input_ids.max()) for example in examples)
    assert str(caught.value) == (
        f"The data has token id {largest}, but {small_vocabulary} has a vocabulary of 100: "
        "tokenizer and model do not belong together."
    )


def test_batches_of_one_s_own_data_train_too(make_trainer, make_module):
    ids = torch.randint(3, 200, (5, 9), generator=torch.Generator().manual_seed(0))
    batches = [Batch(rows, rows, torch.ones_like(rows)) for rows in ids.split(2)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    module = make_module()
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, loader, loader)
    assert trainer.global_step == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_the_loss_after_a_pass_s_end_is_logged_where_it_belongs(
    make_trainer, make_module, make_data, tmp_path
):
    def fit(steps, folder, ckpt_path=None):
        logger = CSVLogger(tmp_path / folder, name="", version="")
        options = {"logger": logger, "log_every_n_steps": 1, "limit_val_batches": 1}
        saves = {"enable_checkpointing": True, "callbacks": [TrainableCheckpoint(100)]}
        trainer = make_trainer(max_steps=steps, default_root_dir=tmp_path, **options, **saves)
        trainer.fit(make_module(), make_data(), ckpt_path=ckpt_path)
        with (tmp_path / folder / "metrics.csv").open(encoding="utf-8") as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]

    assert fit(6, "first") == [0, 1, 2, 3, 4, 5]  # a pass: 24 rows in batches of 4
    assert fit(8, "second", tmp_path / "first/checkpoints/last.ckpt") == [6, 7]
