"""What is changed on the command line of a run that goes on takes effect."""

from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from rslightning.callbacks import TrainableCheckpoint
from rslightning.errors import UserError
from rslightning.hyperparameters import keep_changes, plain_settings, refuse_other_structure

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning"
)


def warm_cosine(optimizer, total):
    parts = [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, total)]
    return SequentialLR(optimizer, parts, [3])


SCHEDULES = {
    "constant": (None, None),
    "lambda": (lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),) * 2,
    "linear": (partial(LinearLR, total_iters=8), partial(LinearLR, total_iters=12)),
    "cosine": (partial(CosineAnnealingLR, T_max=8), partial(CosineAnnealingLR, T_max=12)),
    "steps": (partial(MultiStepLR, milestones=[2, 4]), partial(MultiStepLR, milestones=[2, 9])),
    "sequence": (partial(warm_cosine, total=8), partial(warm_cosine, total=12)),
}


def make(schedule, lr=0.1, weight_decay=0.0):
    optimizer = optim.AdamW([nn.Parameter(torch.ones(3))], lr=lr, weight_decay=weight_decay)
    return optimizer, schedule(optimizer) if schedule else None


def rates(optimizer, scheduler, steps):
    """Return the rate of each step."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return found


def go_on(old, new, steps=5):
    """Train with the old settings, restore that into the new ones; return these and sentences."""
    begun = plain_settings(*old)
    rates(*old, steps)
    now = plain_settings(*new)
    new[0].load_state_dict(old[0].state_dict())
    if new[1]:
        new[1].load_state_dict(old[1].state_dict())
    return keep_changes(begun, now, *new)


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_changed_changes_nothing(name):
    schedule, _ = SCHEDULES[name]
    old, new, whole = (make(schedule) for _ in range(3))
    assert go_on(old, new) == []
    assert rates(*new, 5) == rates(*whole, 10)[5:]


@pytest.mark.parametrize("name", SCHEDULES)
def test_another_rate_scales_what_is_left_of_the_schedule(name):
    schedule, _ = SCHEDULES[name]
    old, new, whole = make(schedule), make(schedule, lr=0.2), make(schedule, lr=0.2)
    assert go_on(old, new)[0] == "lr is 0.2, and was 0.1"
    assert rates(*new, 5) == pytest.approx(rates(*whole, 10)[5:])


def test_other_options_of_the_optimizer():
    old, new = make(None), make(None, weight_decay=0.3)
    assert go_on(old, new) == ["weight_decay is 0.3, and was 0.0"]
    assert new[0].param_groups[0]["weight_decay"] == 0.3
    assert new[0].param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("linear", "total_iters is 12, and was 8"),
        ("cosine", "T_max is 12, and was 8"),
        ("steps", "milestones"),
        ("sequence", "T_max is 12, and was 8"),
    ],
)
def test_other_options_of_the_schedule(name, sentence):
    before, after = SCHEDULES[name]
    old, new = make(before), make(after)
    (said,) = go_on(old, new)
    assert said.startswith(sentence)
    expected = after(make(None)[0])
    restored = new[1]
    if name == "sequence":
        restored, expected = restored._schedulers[1], expected._schedulers[1]
    for key in ("total_iters", "T_max", "milestones"):
        assert getattr(restored, key, None) == getattr(expected, key, None)
    assert new[1].last_epoch == 5


def test_a_schedule_that_was_not_there_before_begins_where_the_run_is():
    old, new = make(None), make(SCHEDULES["linear"][0])
    begun = plain_settings(*old)
    rates(*old, 5)
    now = plain_settings(*new)
    new[0].load_state_dict(old[0].state_dict())
    keep_changes(begun, now, *new)
    assert new[0].param_groups[0]["initial_lr"] == 0.1


def test_settings_are_plain():
    def check(value):
        assert isinstance(value, (dict, list, tuple, int, float, bool, str, type(None)))
        inside = value.values() if isinstance(value, dict) else value
        for inner in inside if isinstance(value, (dict, list, tuple)) else ():
            check(inner)

    schedules = [s for s, _ in SCHEDULES.values()]
    for schedule in [*schedules, partial(OneCycleLR, max_lr=1.0, total_steps=9)]:
        settings = plain_settings(*make(schedule))
        for part in settings.values():
            assert part is not None
        check(settings)


@pytest.mark.parametrize("base", ["asset:toy_llama", "/elsewhere/toy_llama"])
def test_a_base_that_has_moved_is_the_same(base):
    hparams = {"base_model": "/here/toy_llama", "adapter": None}
    refuse_other_structure(hparams, {**hparams, "base_model": base})
    with pytest.raises(UserError, match=r"^The checkpoint has base_model 'other', this run 'toy_"):
        refuse_other_structure({**hparams, "base_model": "other"}, {**hparams, "base_model": base})


def rate_of(path):
    return torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"]


def test_a_run_that_goes_on_takes_the_rate_that_it_is_given(
    make_trainer, make_module, make_data, tmp_path, caplog
):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")

    def fit(lr, steps, ckpt_path=None):
        options = {"max_steps": steps, "limit_val_batches": 0, "enable_checkpointing": True}
        trainer = make_trainer(callbacks=[TrainableCheckpoint(2)], **options)
        module = make_module(optimizer=partial(torch.optim.AdamW, lr=lr))
        trainer.fit(module, make_data(), ckpt_path=ckpt_path)
        return module.trainable_state()

    last = tmp_path / "checkpoints/last.ckpt"
    fit(1e-2, 2)
    assert rate_of(last) == 1e-2
    moved = fit(0.5, 4, last)
    assert rate_of(last) == 0.5
    assert "lr is 0.5, and was 0.01" in caplog.text
    assert max(tensor.abs().max() for tensor in moved.values()) > 0.4
    fit(0.5, 6, last)  # as before: nothing is told
    assert caplog.text.count("and was") == 1
