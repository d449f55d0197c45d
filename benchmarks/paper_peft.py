"""The small Figure 2 again with PEFT, in a bare loop: the same blocks and order, PEFT's own A.

    python benchmarks/paper_peft.py --sweep runs/figure2_small --model FOLDER --data FOLDER

Prints the held-out loss of both at each rank and scaling, the sweep's as its mean over seeds with
their range. What differs is the initialization, so that they should differ as seeds do.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rslightning.batch import Batch
from rslightning.data import GSM8K
from rslightning.experiments.event_files import read_events
from rslightning.losses import token_nats

RANKS, SCALINGS = (4, 32, 256), ("lora", "rslora")
ALPHA, RATE, STEPS = 16.0, 5e-5, 100
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_data(folder: str, tokenizer: str) -> GSM8K:
    """Return the data of `recipes/llama_gsm8k_paper.yaml`."""
    data = GSM8K(
        folder,
        tokenizer,
        max_length=256,
        batch_size=8,
        held_out_examples=128,
        train_on_prompt=True,
    )
    data.setup("fit")
    return data


def logits_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits [B, T, V] of a batch, padded or packed."""
    where = (
        {"attention_mask": batch.attention_mask}
        if batch.position_ids is None
        else {"position_ids": batch.position_ids}  # which say where an example begins
    )
    logits: torch.Tensor = model(input_ids=batch.input_ids, use_cache=False, **where).logits
    return logits


def train(model_folder: str, data: GSM8K, rank: int, scaling: str) -> float:
    """Return the held-out loss after the steps, in nats per target token."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=ALPHA, use_rslora=scaling == "rslora", target_modules=TARGETS
    )
    model = get_peft_model(base, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()
    for _, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        nats, targets = token_nats(logits_of(model, batch), batch.labels)
        optimizer.zero_grad()
        (nats / targets).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        pairs = [
            token_nats(logits_of(model, batch), batch.labels) for batch in data.val_dataloader()
        ]
    return float(sum(nats for nats, _ in pairs) / sum(targets for _, targets in pairs))


def swept(sweep: Path, rank: int, scaling: str) -> list[float]:
    """Return the last held-out losses of a sweep's cells, one for each seed."""
    cells = sorted(sweep.glob(f"{scaling}_rank{rank}_seed*"))
    return [float(read_events(cell).curves["val/loss"].values[-1]) for cell in cells]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("sweep", "model", "data"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    data = read_data(arguments.data, arguments.model)
    print("| scaling | rank | PEFT, bare loop | rslightning: mean (lowest to highest seed) |")
    print("| --- | --- | --- | --- |")
    for scaling in SCALINGS:
        for rank in RANKS:
            theirs = train(arguments.model, data, rank, scaling)
            ours = swept(Path(arguments.sweep), rank, scaling)
            spread = f"{mean(ours):.4f} ({min(ours):.4f} to {max(ours):.4f})"
            print(f"| `{scaling}` | {rank} | {theirs:.4f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
