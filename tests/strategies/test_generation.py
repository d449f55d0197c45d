"""Answers of processes that share the weights out, where the last one runs out of rows."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from strategy_fits import SHARING, Fit, ignoring_deepspeed, make_fit_module, make_strategy

from rslightning.callbacks import ScoreAnswers
from rslightning.callbacks.predictions import WritePredictions
from rslightning.data import GSM8K

ROWS = 5  # two processes with 2 rows each: the second has none in the second round
LENGTHS = (1, 9, 4, 2, 6)  # how often a sentence is said


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    rows = [
        {"question": "Count them. " * length + f"{index}?", "answer": f"#### {index}"}
        for index, length in enumerate(LENGTHS)
    ]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def answered(run, fork, places, questions, tmp_path_factory):
    """Return a function that runs test and predict; (results, file -> lines) are returned."""
    done = {}

    def answers(strategy):
        if strategy not in done:
            folder = tmp_path_factory.mktemp(f"answers-{strategy}")
            # Trained, so that adapters count.
            trained = run(Fit(steps=4, optimizer="SGD", clip=None)).folder / "adapter"
            fit = replace(Fit(), options=(("start_from", str(trained)),)).under(strategy)
            make_strategy(fit)

            def rank(number):
                for verb, callback in (("test", ScoreAnswers()), ("predict", WritePredictions())):
                    result = evaluate(fit, verb, callback, folder, places, questions)
                    if number == 0 and verb == "test":
                        (folder / "results.json").write_text(json.dumps(result[0]))

            assert fork(fit.processes, rank) == [0] * fit.processes
            done[strategy] = folder
        return done[strategy]

    return answers


def evaluate(fit, verb, callback, folder, places, questions):
    torch.manual_seed(1)
    with ignoring_deepspeed(fit):
        trainer = Trainer(
            accelerator="cpu",
            devices=fit.processes,
            strategy=make_strategy(fit),
            callbacks=[callback],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        data = GSM8K(
            str(questions),
            str(places.bases / "llama"),
            batch_size=4 // fit.processes,
            max_length=256,
            packing=False,
            held_out_examples=None,
        )
        return getattr(trainer, verb)(make_fit_module(fit, places), data)


def lines(folder, name):
    """Return the lines of all processes' files, in the order of the questions."""
    files = sorted(folder.glob(f"*{name}"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["reference"])


@pytest.mark.parametrize("name", ["test_answers.jsonl", "predictions.jsonl"])
@pytest.mark.parametrize("strategy", ["ddp", *SHARING])
def test_the_answers_are_those_of_one_process(answered, strategy, name):
    truth, found = lines(answered("single"), name), lines(answered(strategy), name)
    assert found == truth
    assert len({row["answer"] for row in truth}) == ROWS
    second = (answered(strategy) / f"1.{name}").read_text().splitlines()
    assert len(second) == 2  # the other three are the first process's


@pytest.mark.parametrize("strategy", ["ddp", *SHARING])
def test_the_numbers_are_those_of_one_process(answered, strategy):
    truth, found = (
        json.loads((answered(name) / "results.json").read_text()) for name in ("single", strategy)
    )
    assert found == pytest.approx(truth, rel=1e-5)
    assert truth["test/rows"] == ROWS
