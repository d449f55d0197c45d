import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import optim
from transformers import AutoTokenizer

from rslightning.callbacks import ScoreAnswers
from rslightning.callbacks.score_answers import limited, up_to_end
from rslightning.data import GSM8K, OpenOrca
from rslightning.errors import UserError

KEYS = {"test/exact_match", "test/answers_cut", "test/rows"}


@pytest.fixture(scope="module")
def folder(gsm8k_folder, tmp_path_factory):
    """Five rows under test, the first three trained on; prompts and answers differ in length."""
    rows = [json.loads(line) for line in (gsm8k_folder / "test.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["question"] = "Listen well. " * (number % 3) + row["question"]
        row["answer"] = "Count them. " * (number % 3) + row["answer"]
    folder = tmp_path_factory.mktemp("data") / "memory"
    folder.mkdir()
    for name, part in (("train", rows[:3]), ("test", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def make_gsm8k(folder, model_folder):
    def make(**options):
        defaults = {"batch_size": 2, "max_length": 128, "packing": False}
        return GSM8K(str(folder), str(model_folder), **(defaults | options))

    return make


@pytest.fixture(scope="module")
def weights(make_module, make_gsm8k, tmp_path_factory):
    """The weights of a model that has learned three answers by heart."""
    torch.manual_seed(3)
    optimizer = partial(optim.AdamW, lr=1e-2, weight_decay=0.0)
    module = make_module(adapter=None, optimizer=optimizer)
    Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=60,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path_factory.mktemp("runs"),
    ).fit(module, make_gsm8k(batch_size=3))
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.fixture
def trained(make_module, weights):
    def make(max_new_tokens=60):
        module = make_module(adapter=None, max_new_tokens=max_new_tokens)
        module.configure_model()
        module.load_state_dict(weights)
        return module

    return make


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dense_score(line) -> bool:
    """Return whether an answer is right, by another way than GSM8K's."""
    numbers = [line[name].split("####")[1:] for name in ("answer", "reference")]
    return bool(numbers[0]) and float(numbers[0][-1].split()[0]) == float(numbers[1][-1])


def one_by_one(module, data, tokenizer):
    """Return the answer to each row under test, without batches, padding or our collation."""
    answers = []
    for prompt, _ in data.held_out_rows:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = module.model.generate(ids, max_new_tokens=module.max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def test_answers_are_those_of_one_row_at_a_time(
    make_trainer, trained, make_gsm8k, model_folder, tmp_path
):
    module, data = trained(), make_gsm8k(batch_size=3)
    (results,) = make_trainer(callbacks=[ScoreAnswers()]).test(module, data, verbose=False)
    lines = read(tmp_path / "test_answers.jsonl")
    assert [(line["prompt"], line["reference"]) for line in lines] == data.held_out_rows
    assert len({len(line["prompt"]) for line in lines}) > 1  # padding was needed
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert [line["answer"] for line in lines] == one_by_one(module, data, tokenizer)
    assert [line["right"] for line in lines] == [dense_score(line) for line in lines]
    right = sum(line["right"] for line in lines)
    assert 0 < right < len(lines)  # a score of all or nothing would prove little
    assert results["test/exact_match"] == pytest.approx(right / 5)
    assert results["test/rows"] == 5
    assert results["test/answers_cut"] == 0
    assert results["test/loss"] > 0


@pytest.mark.parametrize("batch_size", [1, 2])  # of 1, the last share of two is empty
def test_processes_share_the_rows(
    make_trainer, trained, make_gsm8k, run_processes, tmp_path, batch_size
):
    module = trained()
    (alone,) = make_trainer(callbacks=[ScoreAnswers()]).test(module, make_gsm8k(), verbose=False)
    whole = read(tmp_path / "test_answers.jsonl")

    def rank(number):
        trainer = make_trainer(
            callbacks=[ScoreAnswers()], strategy="ddp", devices=2, use_distributed_sampler=False
        )
        (results,) = trainer.test(trained(), make_gsm8k(batch_size=batch_size), verbose=False)
        (tmp_path / f"{number}.json").write_text(json.dumps(results))

    assert run_processes(2, rank) == [0, 0]
    shares = [read(tmp_path / f"{number}.test_answers.jsonl") for number in range(2)]
    turns = [i // batch_size % 2 for i in range(5)]
    for number, share in enumerate(shares):
        assert share == [whole[row] for row in range(5) if turns[row] == number]
    for number in range(2):
        results = json.loads((tmp_path / f"{number}.json").read_text())
        assert {key: results[key] for key in KEYS} == {key: alone[key] for key in KEYS}


def test_nothing_is_generated_for_data_that_cannot_score(
    make_trainer, make_module, make_data, tmp_path
):
    module = make_module()
    module.configure_model()
    module.predict_step = module.generate = None  # calling either would raise
    assert not hasattr(OpenOrca, "score_answer")
    (results,) = make_trainer(callbacks=[ScoreAnswers()]).test(module, make_data(), verbose=False)
    assert not KEYS & results.keys()
    assert not (tmp_path / "test_answers.jsonl").exists()


def test_only_test_asks_for_answers(make_trainer, trained, make_gsm8k, tmp_path):
    trainer = make_trainer(callbacks=[ScoreAnswers()], max_steps=1, limit_val_batches=1)
    trainer.validate(trained(), make_gsm8k(), verbose=False)
    trainer.fit(trained(), make_gsm8k())
    trainer.predict(trained(), make_gsm8k())
    assert not (tmp_path / "test_answers.jsonl").exists()


def test_tensorboard_has_the_numbers_and_the_first_answers(
    make_trainer, trained, make_gsm8k, tmp_path
):
    logger = TensorBoardLogger(tmp_path, name="answers", default_hp_metric=False)
    trainer = make_trainer(callbacks=[ScoreAnswers(examples=3)], logger=logger)
    (results,) = trainer.test(trained(), make_gsm8k(), verbose=False)
    lines = read(tmp_path / "answers" / "version_0" / "test_answers.jsonl")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for key in KEYS:
        assert [event.value for event in events.Scalars(key)] == [pytest.approx(results[key])]
    (event,) = events.Tensors("test/answers/text_summary")
    (text,) = event.tensor_proto.string_val
    shown = text.decode().split("\n\n---\n\n")
    assert len(shown) == 3  # of 5, over two batches
    for line, part in zip(lines, shown, strict=False):
        assert part.startswith("**right**" if line["right"] else "**wrong**")
        for name in ("prompt", "answer", "reference"):
            indented = "\n".join(f"    {row}" for row in line[name].splitlines())
            assert f"{name}:\n\n{indented}" in part


def test_no_example_is_shown_on_request(make_trainer, trained, make_gsm8k, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="answers", default_hp_metric=False)
    trainer = make_trainer(callbacks=[ScoreAnswers(examples=0)], logger=logger)
    trainer.test(trained(), make_gsm8k(), verbose=False)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["tensors"] == []
    assert "test/exact_match" in events.Tags()["scalars"]


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_weights_modes_and_random_states_are_as_before(make_trainer, trained, make_gsm8k):
    seen = {}

    class Around(ScoreAnswers):
        """Looks before and after; generation itself draws random numbers here."""

        def on_test_epoch_end(self, trainer, pl_module):
            plain = pl_module.predict_step

            def drawing(batch, index):
                assert not pl_module.model.training
                torch.rand(1), random.random(), np.random.rand()
                seen["drawn"] = states()
                return plain(batch, index)

            pl_module.predict_step = drawing
            pl_module.model.train()
            pl_module.model.lm_head.eval()
            seen["before"] = (states(), modes(pl_module))
            super().on_test_epoch_end(trainer, pl_module)
            seen["after"] = (states(), modes(pl_module))

    def modes(module):
        return [child.training for child in module.modules()]

    module = trained()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    make_trainer(callbacks=[Around()]).test(module, make_gsm8k(), verbose=False)
    assert len(set(seen["before"][1])) == 2  # some in training, some not
    assert seen["after"] == seen["before"]
    assert all(drawn != was for drawn, was in zip(seen["drawn"], seen["before"][0], strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_answers_that_the_limit_cuts_are_counted(make_trainer, trained, make_gsm8k, tmp_path):
    whole, data = trained(), make_gsm8k()
    make_trainer(callbacks=[ScoreAnswers()]).test(whole, data, verbose=False)
    lengths = [
        len(data.tokenizer(line["answer"], add_special_tokens=False)["input_ids"]) + 1  # the end
        for line in read(tmp_path / "test_answers.jsonl")
    ]
    limit = sorted(lengths)[2]
    trainer = make_trainer(callbacks=[ScoreAnswers()])
    (results,) = trainer.test(trained(max_new_tokens=limit), make_gsm8k(), verbose=False)
    cut = sum(length > limit for length in lengths)
    assert 0 < cut < 5
    assert results["test/answers_cut"] == pytest.approx(cut / 5)


@pytest.mark.parametrize(("limit", "rows"), [(1, 2), (2, 4), (0.7, 4), (9, 5)])
def test_limit_test_batches_limits_answers(
    make_trainer, trained, make_gsm8k, tmp_path, limit, rows
):
    trainer = make_trainer(callbacks=[ScoreAnswers()], limit_test_batches=limit)
    (results,) = trainer.test(trained(), make_gsm8k(), verbose=False)
    assert results["test/rows"] == rows
    assert len(read(tmp_path / "test_answers.jsonl")) == rows


def test_limits_are_numbers_or_shares():
    assert [limited(10, limit) for limit in (1, 1.0, 0.25, 20, 0.0)] == [1, 10, 2, 10, 0]


def test_what_fills_up_a_batch_is_no_answer():
    ids = torch.tensor([[5, 6, 2, 0, 7], [2, 5, 5, 5, 5], [3, 4, 5, 6, 7]])
    assert [row.tolist() for row in up_to_end(ids, 2)] == [[5, 6], [], [3, 4, 5, 6, 7]]
    assert [row.tolist() for row in up_to_end(ids, None)] == ids.tolist()
    assert up_to_end(torch.zeros(0, 1, dtype=torch.long), 2) == []


def test_an_answer_ends_where_the_tokenizer_says(make_trainer, trained, make_gsm8k, tmp_path):
    """A base whose configuration names another end than the tokenizer writes on and on."""
    module, data = trained(), make_gsm8k()
    make_trainer(callbacks=[ScoreAnswers()]).test(module, data, verbose=False)
    expected = read(tmp_path / "test_answers.jsonl")
    module.model.generation_config.eos_token_id = 299
    module.model.generation_config.pad_token_id = 10  # an ordinary token
    make_trainer(callbacks=[ScoreAnswers()]).test(module, data, verbose=False)
    assert read(tmp_path / "test_answers.jsonl") == expected


@pytest.mark.parametrize("bar", [True, False])
def test_progress_is_shown_where_bars_are(make_trainer, trained, make_gsm8k, capsys, bar):
    callbacks = [ScoreAnswers(), *([TQDMProgressBar()] if bar else [])]
    trainer = make_trainer(callbacks=callbacks, enable_progress_bar=bar)
    trainer.test(trained(), make_gsm8k(), verbose=False)
    assert ("answers: 100%" in capsys.readouterr().err) is bar


class Silent(LightningModule):
    """Is tested, and cannot answer."""

    def test_step(self, batch, batch_idx):
        """Do nothing."""


class Bare(LightningDataModule):
    """Can score, and has no prompts."""

    def score_answer(self, answer, reference):
        """Return whether both are the same."""
        return answer == reference

    def test_dataloader(self):
        """Return a batch that nobody looks at."""
        return [torch.zeros(1)]


def test_a_module_or_data_that_cannot_answer_is_named(make_trainer, trained, make_gsm8k, tmp_path):
    for module, data in ((Silent(), make_gsm8k()), (trained(), Bare())):
        with pytest.raises(UserError) as caught:
            make_trainer(callbacks=[ScoreAnswers()]).test(module, data, verbose=False)
        assert str(caught.value) == (
            "score_answers needs a CausalLMModule and one of rslightning.data, or null."
        )
    make_trainer(callbacks=[ScoreAnswers()]).test(Silent(), [torch.zeros(1)], verbose=False)
    assert not (tmp_path / "test_answers.jsonl").exists()


def test_a_negative_number_of_examples():
    with pytest.raises(UserError) as caught:
        ScoreAnswers(examples=-1)
    assert str(caught.value) == "score_answers.examples must not be negative, got -1."
