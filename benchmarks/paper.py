"""What the sweeps of `recipes/paper/` take on one GPU of 141 GB, counted: hours and memory.

    python benchmarks/paper.py

Prints the table of `docs/paper.md`. Nothing is measured here: operations and bytes are those of
`rslightning plan`, at a share of the GPU's peak that is assumed.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rslightning.cli import read_config
from rslightning.cost import GIB
from rslightning.experiments.grid import Cell, Sweep, read_sweep
from rslightning.memory import estimate_memory
from rslightning.plan import Plan, read_plan
from rslightning.recipes import find_config, packaged_names
from rslightning.training_step import step_operations

PEAK: Final = 989e12
"""Operations per second of an H100 or H200 in bfloat16, dense, as its data sheet says."""

SHARE: Final = 0.4
"""Of the peak that a step reaches: assumed."""

CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "EleutherAI/gpt-j-6b": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_inner": None,
        "n_layer": 28,
        "n_head": 16,
        "vocab_size": 50400,
    },
}

EXAMPLES: Final = {"OpenOrca": 20_000, "GSM8K": 7_473}


def sweeps() -> Iterator[Sweep]:
    """Yield the sweeps of the paper's own size."""
    for name in packaged_names():
        if name.startswith("recipes/paper/") and "/small/" not in name:
            yield read_sweep(find_config(name))


def plan_of(sweep: Sweep, cell: Cell, folder: Path) -> tuple[Plan, int]:
    """Return the plan of a cell, and its optimizer steps."""
    options = folder / "options.yaml"
    options.write_text(json.dumps(sweep.options))
    bases = [word for name in sweep.base for word in ("--config", str(find_config(name)))]
    config = read_config(["fit", *bases, "--config", str(options), *cell.arguments()])
    data = config["data"]
    if config["model"]["adapter"] is not None:  # counted with the ranks that it begins with
        config["model"]["adapter"]["allocation"] = None
    (folder / "config.json").write_text(json.dumps(CONFIGS[config["model"]["base_model"]]))
    config["model"]["base_model"] = str(folder)
    batch = data["init_args"]["batch_size"] * config["trainer"]["accumulate_grad_batches"]
    return read_plan(config, 1), EXAMPLES[data["class_path"].rpartition(".")[2]] // batch


def measure(sweep: Sweep) -> tuple[int, float, float]:
    """Return a sweep's cells, hours of one GPU, and the GiB of its largest cell."""
    hours, largest, plans = 0.0, 0.0, {}
    cells = sweep.cells()
    for cell in cells:
        kind = tuple(cell.values)  # of one grid: they differ in the rank alone, as far as it counts
        if kind not in plans:
            with tempfile.TemporaryDirectory() as folder:
                plans[kind] = plan_of(sweep, cell, Path(folder))
        plan, steps = plans[kind]
        step = plan.at(cell.values["rank"]) if plan.adapted else plan.step
        operations = step_operations(plan.shape, step) * plan.accumulation * steps
        hours += operations / (PEAK * SHARE) / 3600
        largest = max(largest, estimate_memory(plan.shape, step).total / GIB)
    return len(cells), hours, largest


def main() -> None:
    """Print the table."""
    print("| sweep | cells | hours of one GPU | memory of the largest cell |")
    print("| --- | --- | --- | --- |")
    for sweep in sweeps():
        cells, hours, memory = measure(sweep)
        print(f"| `recipes/paper/{sweep.name}.yaml` | {cells} | {hours:.0f} | {memory:.0f} GiB |")


if __name__ == "__main__":
    main()
