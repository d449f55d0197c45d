"""The small Figure 2 again with PEFT, in a bare loop.

    python benchmarks/paper_peft.py --sweep runs/figure2_small --model FOLDER --data FOLDER
    python benchmarks/paper_peft.py --running-text --model FOLDER --data FOLDER

The first takes the sweep's blocks in their order, and prints the held-out loss of both at each rank
and scaling, the sweep's as its mean over seeds with their range. The second trains both in this
very loop on running text: question, answer and the next example, cut every 256 tokens wherever that
is, so that the model reads on from one example into the next; it prints the mean training loss of
the last ten steps over three seeds. What differs is the initialization, so that the two should
differ as seeds do.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rslightning import CausalLMModule
from rslightning.batch import Batch
from rslightning.data import GSM8K
from rslightning.experiments.event_files import read_events
from rslightning.losses import token_nats
from rslightning.rslora import AdapterSpec

RANKS, SCALINGS = (4, 32, 256), ("lora", "rslora")
ALPHA, RATE, STEPS = 16.0, 5e-5, 100
ROWS, LENGTH = 8, 256
SEEDS, LAST_STEPS = (0, 1, 2), 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_data(folder: str, tokenizer: str) -> GSM8K:
    """Return the data of `recipes/llama_gsm8k_paper.yaml`."""
    data = GSM8K(
        folder,
        tokenizer,
        max_length=LENGTH,
        batch_size=ROWS,
        held_out_examples=128,
        train_on_prompt=True,
    )
    data.setup("fit")
    return data


def running_text(folder: str, tokenizer_folder: str) -> Iterator[Batch]:
    """Yield a batch per step of the training file's text in its order."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids: list[int] = []
    with (Path(folder) / "train.jsonl").open() as lines:
        for row in map(json.loads, lines):
            ids += tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"]
            if len(ids) >= STEPS * ROWS * LENGTH:
                break
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    for block in torch.tensor(ids[: STEPS * ROWS * LENGTH]).reshape(STEPS, ROWS, LENGTH):
        yield Batch(block, block, torch.ones_like(block), positions)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits [B, T, V] of a batch, padded or packed."""
    where = (
        {"attention_mask": batch.attention_mask}
        if batch.position_ids is None
        else {"position_ids": batch.position_ids}  # which say where an example begins
    )
    logits: Tensor = model(input_ids=batch.input_ids, use_cache=False, **where).logits
    return logits


def mean_nats(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Return the loss of `batches` together, in nats per target token."""
    pairs = [token_nats(logits_of(model, batch), batch.labels) for batch in batches]
    return sum(nats for nats, _ in pairs) / sum(targets for _, targets in pairs)  # type: ignore[return-value]


def peft_model(model_folder: str, rank: int, scaling: str, seed: int) -> nn.Module:
    """Return the model with PEFT's adapters."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA, use_rslora=scaling == "rslora", target_modules=TARGETS
    )
    return get_peft_model(base, config)


def our_model(model_folder: str, rank: int, scaling: str, seed: int) -> nn.Module:
    """Return the model with this package's adapters."""
    torch.manual_seed(seed)
    spec = AdapterSpec(rank, ALPHA, scaling)  # type: ignore[arg-type]
    module = CausalLMModule(model_folder, spec, partial(torch.optim.AdamW), dtype="float32")
    module.configure_model()
    return module.model


def train(model: nn.Module, batches: Iterable[Batch]) -> list[float]:
    """Make a step per batch, and return their losses, in nats per target token."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()
    losses = []
    for batch in batches:
        loss = mean_nats(model, [batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def held_out(model_folder: str, data: GSM8K, rank: int, scaling: str) -> float:
    """Return PEFT's held-out loss after the steps on the sweep's blocks."""
    model = peft_model(model_folder, rank, scaling, seed=0)
    train(model, islice(data.train_dataloader(), STEPS))
    model.eval()
    with torch.no_grad():
        return mean_nats(model, data.val_dataloader()).item()


def swept(sweep: Path, rank: int, scaling: str) -> list[float]:
    """Return the last held-out losses of a sweep's cells, one for each seed."""
    cells = sorted(sweep.glob(f"{scaling}_rank{rank}_seed*"))
    return [float(read_events(cell).curves["val/loss"].values[-1]) for cell in cells]


def spread(losses: list[float]) -> str:
    """Return mean and range."""
    return f"{mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def print_table(theirs: Callable[[int, str], str], ours: Callable[[int, str], str]) -> None:
    """Print a row per scaling and rank."""
    print("| scaling | rank | PEFT, bare loop | rslightning |")
    print("| --- | --- | --- | --- |")
    for scaling in SCALINGS:
        for rank in RANKS:
            row = f"| `{scaling}` | {rank} | {theirs(rank, scaling)} | {ours(rank, scaling)} |"
            print(row, flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--sweep", type=Path)
    which.add_argument("--running-text", action="store_true")
    arguments = parser.parse_args()
    if arguments.sweep:
        data = read_data(arguments.data, arguments.model)
        print_table(
            lambda rank, scaling: f"{held_out(arguments.model, data, rank, scaling):.4f}",
            lambda rank, scaling: spread(swept(arguments.sweep, rank, scaling)),
        )
        return
    batches = list(running_text(arguments.data, arguments.model))

    def last_losses(build: Callable[..., nn.Module], rank: int, scaling: str) -> str:
        models = (build(arguments.model, rank, scaling, seed) for seed in SEEDS)
        return spread([mean(train(model, batches)[-LAST_STEPS:]) for model in models])

    print_table(partial(last_losses, peft_model), partial(last_losses, our_model))


if __name__ == "__main__":
    main()
