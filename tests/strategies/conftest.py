"""Fits that several tests read; each is run once."""

import json
import signal

import pytest
from strategy_fits import ROWS, Fit, Left, Places, make_strategy, train

LONGEST_SECONDS = 150
"""Processes that wait for each other for ever are ended, so that their test fails."""


def row(index: int) -> dict[str, str]:
    """Return a row whose number of targets is between 1 and 6 sentences' of one word more."""
    answer = " ".join(f"It has {index % 9} pens." for _ in range(1 + index * index % 7))
    return {"id": f"{index}", "system_prompt": "", "question": f"Row {index}?", "response": answer}


@pytest.fixture(scope="session")
def places(tmp_path_factory, model_folder, make_llama, make_gpt2) -> Places:
    """Base models (the tokenizer lies beside each) and data."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("strategies")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    size = len(tokenizer)
    models = {
        "llama": make_llama(size),
        "tied": make_llama(size, tie_word_embeddings=True),
        "gpt2": make_gpt2(
            vocab_size=size,
            n_positions=128,
            initializer_range=0.2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
    }
    for name, model in models.items():
        model.save_pretrained(root / "bases" / name)
        tokenizer.save_pretrained(root / "bases" / name)
    for name, numbers in {"train": range(ROWS), "held_out": range(100, 107)}.items():
        path = root / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row(i)) + "\n" for i in numbers), encoding="utf-8")
    return Places(root / "bases", root / "data")


@pytest.fixture(scope="session")
def fork(places, run_processes, tmp_path_factory):
    """Return the function that forks processes of one group, all imports done before."""
    train(Fit(steps=1), tmp_path_factory.mktemp("warm"), places)

    def forked(processes, function, nodes=1):
        def limited(rank):
            signal.alarm(LONGEST_SECONDS)
            function(rank)

        return run_processes(processes, limited, nodes)

    return forked


@pytest.fixture(scope="session")
def run(places, fork, tmp_path_factory):
    """Return the function that runs a fit, once, and returns what it left."""
    done: dict[Fit, Left] = {}

    def left(fit: Fit) -> Left:
        if fit not in done:
            make_strategy(fit)  # skips here, not in the processes
            folder = tmp_path_factory.mktemp(f"{fit.strategy}-{fit.processes}-")
            # Another seed after a resume: what is restored must not be what is drawn.
            seed = 7 if fit.resume is None else 8
            codes = fork(fit.processes, lambda _: train(fit, folder, places, seed), fit.nodes)
            assert codes == [0] * fit.processes
            done[fit] = Left(fit, folder)
        return done[fit]

    return left
