"""A long run: does memory grow, do files stay open, does the disk fill?

    python benchmarks/soak.py --model FOLDER --data FOLDER [--steps 2000] [--json FILE]

One fit by the command, with all monitors at short intervals, a checkpoint at every 50th step of
which three are kept, and validation at every 200th. At every 50th step are noted: resident memory
(after a garbage collection, and after malloc has given back what is free), open files, and the
bytes of the run folder, event files apart: those grow with what is logged.

The growth of memory is that of a straight line through what was noted after step 200, up to the
end, as a share of what was noted at step 200.
"""

import argparse
import ctypes
import gc
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from side_by_side import machine, write_json

from rslightning.__main__ import main as rslightning

EVERY, WARM = 50, 200


class Watch(Callback):
    """Notes what the process holds, in the order (step, memory, files, disk)."""

    notes: list[tuple[int, int, int, int]] = []  # noqa: RUF012 (of the one run)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *batch: Any) -> None:
        """Note it."""
        step = trainer.global_step
        if step % EVERY or (self.notes and self.notes[-1][0] == step):
            return
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.notes.append(
            (step, resident(), len(list(Path("/proc/self/fd").iterdir())), disk(trainer))
        )


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def disk(trainer: Trainer) -> int:
    files = [path for path in Path(str(trainer.log_dir)).rglob("*") if path.is_file()]
    logged = [path for path in files if path.name.startswith("events.out.tfevents")]
    return sum(path.lstat().st_size for path in files) - sum(p.stat().st_size for p in logged)


def growth(notes: list[tuple[int, int, int, int]]) -> float:
    """Return by what share of its first value memory grows over the notes."""
    steps, memory = [note[0] for note in notes], [note[1] for note in notes]
    slope = statistics.linear_regression(steps, memory).slope
    return slope * (steps[-1] - steps[0]) / memory[0]


def options(arguments: argparse.Namespace, folder: str) -> list[str]:
    recipe = {
        "config": "recipes/llama_gsm8k.yaml",
        "model.base_model": str(arguments.model),
        "data.path": str(arguments.data),
        "data.batch_size": "4",
        "data.max_length": "128",
        "gradient_norm": "{every_n_steps: 1, per_layer: true}",
        "activation_moments": "{every_n_steps: 5, per_layer: true}",
        "throughput": "{every_n_steps: 5}",
        "rank_stability": "{}",
        "non_finite_guard": "{}",
        "checkpoint": f"{{every_n_steps: {EVERY}, keep_last: 3}}",
        "trainer.max_steps": str(arguments.steps),
        "trainer.max_epochs": "-1",
        "trainer.val_check_interval": str(WARM),
        "trainer.limit_val_batches": "4",
        "trainer.log_every_n_steps": "1",
        "trainer.logger.init_args.save_dir": folder,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": "soak.Watch",
    }
    return ["fit", *(word for key, value in recipe.items() for word in (f"--{key}", value))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder of a small Llama")
    parser.add_argument("--data", type=Path, required=True, help="folder of GSM8K")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    where = machine("transformers", "lightning")
    with tempfile.TemporaryDirectory() as folder:
        status = rslightning(options(arguments, folder))
    import soak  # where the command found the callback, which is not this module

    notes = soak.Watch.notes
    if status or not notes:
        sys.exit(f"the run ended with {status}; nothing was noted.")
    late = [note for note in notes if note[0] >= WARM]
    print(f"{where}\n  step   MiB  files  disk MiB")
    for step, memory, files, size in notes[:: max(1, len(notes) // 10)]:
        print(f"{step:>6}{memory / 2**20:>6.0f}{files:>7}{size / 2**20:>10.2f}")
    print(f"memory after step {WARM}: {growth(late):+.2%} over {late[-1][0] - WARM} steps")
    print(f"open files after step {WARM}: {min(n[2] for n in late)} to {max(n[2] for n in late)}")
    sizes = [note[3] / 2**20 for note in late]
    print(f"disk, event files apart: {min(sizes):.2f} to {max(sizes):.2f} MiB")
    write_json(arguments.json, {"machine": where, "notes": notes, "growth": growth(late)})


if __name__ == "__main__":
    main()
