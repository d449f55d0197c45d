"""Tokenize, mask and pack GSM8K: this package against TRL's SFTTrainer, and against its own cache.

    pip install trl
    python benchmarks/data.py --data FOLDER --tokenizer FOLDER [--repeats 3]

Both prepare the same rows in one process, blocks of 512, loss on the completion only. Runs
alternate; the medians and their ratio are printed. What is timed is what a start waits for: from
the rows on disk to a packed data set, the loading of the tokenizer left out.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

BLOCK = 512


def ours(data: Path, tokenizer: Path, cache: str) -> tuple[float, int]:
    """Return seconds and blocks of a start with the given cache folder."""
    from rslightning.data import GSM8K
    from rslightning.data.tokenizer import load_tokenizer

    os.environ["RSLIGHTNING_CACHE"] = cache
    module = GSM8K(str(data), str(tokenizer), max_length=BLOCK, held_out_examples=1)
    module.tokenizer = load_tokenizer(str(tokenizer))
    start = time.perf_counter()
    module.setup("fit")
    return time.perf_counter() - start, len(module.train)


def trl(data: Path, tokenizer: Path) -> tuple[float, int]:
    """Return seconds and blocks of an SFTTrainer's preparation, nothing cached."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(loaded), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(
            folder, packing=True, max_length=BLOCK, completion_only_loss=True, report_to=[],
            use_cpu=True, bf16=False,
        )  # fmt: skip
        start = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(data / "train.jsonl"), split="train")
        rows = rows.map(
            lambda row: {
                "prompt": f"Question: {row['question']}\nAnswer:\n",
                "completion": row["answer"],
            },
            remove_columns=rows.column_names,
        )
        trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=loaded)
        return time.perf_counter() - start, len(trainer.train_dataset)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"ours": [], "ours, cached": [], "TRL": []}
    blocks: dict[str, int] = {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for name, run in (
                ("ours", lambda cache=cache: ours(options.data, options.tokenizer, cache)),
                ("ours, cached", lambda cache=cache: ours(options.data, options.tokenizer, cache)),
                ("TRL", lambda: trl(options.data, options.tokenizer)),
            ):
                seconds, blocks[name] = run()
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        ratio = seconds / medians["ours"]
        print(f"{name:<14} {seconds:8.2f} s   {ratio:6.3f} of ours   {blocks[name]} blocks")


if __name__ == "__main__":
    main()
