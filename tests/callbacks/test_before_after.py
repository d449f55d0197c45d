import re
from functools import partial

import pytest
import torch
from torch import optim

from rslightning.callbacks import BeforeAfter, MergeAdapters, RunSummary, TrainableCheckpoint
from rslightning.errors import UserError
from rslightning.rslora import AdapterSpec


@pytest.fixture
def said(caplog):
    """Return the function that gives what was told to the user, as one text."""
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_losses_and_answers_are_those_of_validate_and_predict(
    make_trainer, make_module, make_data, said
):
    def look(module):
        trainer, data = make_trainer(), make_data(batch_size=3)
        loss = trainer.validate(module, data, verbose=False)[0]["val/loss"]
        answers = [row for part in trainer.predict(module, data) for row in part]
        return loss, data.tokenizer.decode(answers[4], skip_special_tokens=True).strip()

    module = make_module()
    torch.manual_seed(7)
    module.configure_model()
    before = look(module)
    trainer = make_trainer(max_steps=8, limit_val_batches=0, callbacks=[BeforeAfter(example=4)])
    trainer.fit(module, make_data())
    text = said()
    after = look(module)
    losses = re.search(r"held-out loss before ([\d.]+), after ([\d.]+) nats per token", text)
    assert [float(x) for x in losses.groups()] == pytest.approx([before[0], after[0]], abs=6e-5)
    assert after[0] < before[0]
    answers = re.search(r"answer before:\n(.*)\nanswer after:\n(.*)\nreference:", text, re.DOTALL)
    for (_, expected), shown in zip((before, after), answers.groups(), strict=True):
        assert [line[4:] for line in shown.splitlines()] == (expected.splitlines() or ["(nothing)"])
    data = make_data()
    data.setup("validate")
    prompt, reference = data.held_out_rows[4]
    assert "\n".join(f"    {line}" for line in prompt.strip().splitlines()) in text
    assert f"reference:\n    {reference}" in text


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_observers_do_not_disturb(make_trainer, make_module, make_data, dropout):
    def train(callbacks, checkpointing):
        spec = AdapterSpec(rank=3, alpha=5.0, dropout=dropout)
        module = make_module(adapter=spec, optimizer=partial(optim.AdamW, lr=1e-2))
        torch.manual_seed(7)
        trainer = make_trainer(
            max_steps=5,
            limit_val_batches=2,
            val_check_interval=2,
            callbacks=callbacks,
            enable_checkpointing=checkpointing,
        )
        trainer.fit(module, make_data())
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}

    observers = [MergeAdapters(), BeforeAfter(), TrainableCheckpoint(2), RunSummary()]
    alone, watched = train([], False), train(observers, True)
    assert alone.keys() == watched.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, watched[name]), name


# What Lightning says about the frozen layer is what this test is about.
@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode:UserWarning")
def test_modes_of_submodules_come_back(make_trainer, make_module, make_data):
    module = make_module()
    module.configure_model()
    module.model.lm_head.eval()
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[BeforeAfter()])
    trainer.fit(module, make_data())
    assert module.training
    assert not module.model.lm_head.training


def test_a_row_that_there_is_not(make_trainer, make_module, make_data):
    with pytest.raises(UserError) as caught:
        make_trainer(max_steps=1, callbacks=[BeforeAfter(example=7)]).fit(
            make_module(), make_data()
        )
    assert str(caught.value) == "before_after.example is 7, but there are 7 held-out rows."


def test_data_of_another_kind(make_trainer, make_module, make_data):
    data = make_data()
    data.setup("fit")
    trainer = make_trainer(max_steps=1, callbacks=[BeforeAfter()])
    with pytest.raises(UserError) as caught:
        trainer.fit(make_module(), data.train_dataloader(), data.val_dataloader())
    assert str(caught.value) == ("before_after needs a CausalLMModule and one of rslightning.data.")
