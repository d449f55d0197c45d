"""The whole optimizer step of a whole model: this package against others, side by side.

    pip install peft trl litgpt
    python benchmarks/step.py --setting a|b|c|d [--ranks 4 512] [--rounds 5] [--memory]
    python benchmarks/step.py --setting 7b [--checkpointing]        # one GPU

All have the same Llama of random weights, the same adapters in all linear maps of attention and MLP
(B not zero), the same batches, AdamW without weight decay at a constant rate and no clipping. In
turn each makes a few steps and goes on from there in the next round; tokens per second are given
relative to a bare loop around PEFT's model, as the median over the rounds. The losses of the first
round are compared: where they differ by more than rounding there is no ratio.

    PEFT            get_peft_model, model(input_ids, labels).loss, backward, torch.optim.AdamW
    PEFT compiled   the same with each decoder layer under torch.compile
    PEFT autocast   the first under bfloat16 autocast; `PEFT autocast compiled` is both
    PEFT bfloat16   the first with adapters in bfloat16, whose small updates are lost
    ours            CausalLMModule's training_step and its optimizer in a bare loop
    ours compiled   the same with `compile: true`
    ours fit        the same module in a Lightning Trainer without logger
    HF Trainer      PEFT's model in transformers' Trainer, bfloat16 settings with `bf16`
    TRL             PEFT's model in SFTTrainer as it comes, which checkpoints activations
    LitGPT          its GPT and its loss in a bare loop, weights converted
    full            every parameter trained, no adapter
    frozen          forward and backward to the embeddings, no adapter, no optimizer: the bound

In settings d and 7b the base is in bfloat16 and the adapters in float32. `ours` multiplies under
autocast; `PEFT` is what a user gets who does not think of it. `full` and `frozen` are bfloat16
throughout. LitGPT has no such setting.

On a GPU each contender is built anew for each round, so that it has the memory to itself. Its peak
is given, and the MFU: the operations of `rslightning.cost.training_flops`, which are the same for
all who train these adapters, by what the fastest of three square products of matrices reaches on
that GPU. Ratios refer to PEFT under autocast there. Who runs out of memory is listed as such.

With --memory each contender runs in a process of its own, and the peak of its resident memory is
given instead, above what the process had after the same steps of a toy model (Linux only).
"""

import argparse
import gc
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender, Run, Setting, Work, make_base, prepare
from side_by_side import machine, ratio, turns, write_json

from rslightning.cost import GIB, LayerShape, LinearMap, training_flops

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 5e-4}  # relative, of a loss
PACKAGES = ("transformers", "lightning", "peft", "trl", "litgpt")
NOT_THE_SAME = ("full", "frozen", "PEFT bfloat16")  # whose losses are their own

TOY = Setting(64, 128, 2, 101, 2, 8, (4,))
SETTINGS = {
    "toy": TOY,
    "a": Setting(768, 2048, 6, 32_000, 4, 256, (4, 32, 128, 512)),
    "b": Setting(512, 1408, 6, 16_000, 8, 256, (4, 64, 256)),
    "c": Setting(512, 1408, 6, 16_000, 8, 256, (4, 512), masked=0.5),
    "d": Setting(512, 1408, 6, 16_000, 8, 256, (256, 512), dtype=torch.bfloat16),
    "7b": Setting(
        *(4096, 11_008, 32, 32_000, 32, 512, (4, 64, 256, 1024, 2048)),
        dtype=torch.bfloat16,
        head=128,
        device="cuda",
        rate=1e-5,  # else differences in rounding grow: a model of this size learns fast
    ),
}
GPU_CONTENDERS = ("PEFT autocast", "ours", "ours compiled", "TRL")


def reference_of(setting: Setting) -> str:
    """Return the contender that ratios and losses refer to."""
    return "PEFT" if setting.device == "cpu" else "PEFT autocast"


def names_for(setting: Setting, wanted: list[str] | None) -> Iterator[str]:
    """Yield the contenders that a setting has; the reference is there always."""
    absent = {"LitGPT"}
    if setting.dtype == torch.float32:
        absent = {"PEFT autocast", "PEFT autocast compiled", "PEFT bfloat16"}
    if setting.device != "cpu":
        wanted = wanted or list(GPU_CONTENDERS)
    for name in CONTENDERS:
        if name not in absent and (not wanted or name in wanted or name == reference_of(setting)):
            yield name


def build(work: Work, names: Iterable[str]) -> dict[str, Contender]:
    """Return the contenders whose packages are there."""
    built = {}
    for name in names:
        try:
            built[name] = CONTENDERS[name](work)
        except ImportError as error:
            print(f"{name}: not installed ({error})")
    return built


def build_and_run(work: Work, name: str) -> Run:
    """Return a contender's run on a GPU that it has for itself."""
    torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()  # else it would give up after so many ranks and models
    run: Run = CONTENDERS[name](work)()
    run.peak = torch.cuda.max_memory_allocated()
    return run


def run_in_turn(work: Work, names: list[str], rounds: int) -> dict[str, list[Run]]:
    """Return each contender's runs; of one that lacks a package or memory none."""
    on_gpu = work.setting.device != "cpu"
    built = {name: partial(build_and_run, work, name) for name in names}
    contenders: dict[str, Contender] = built if on_gpu else build(work, names)
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for name in turns(list(contenders), rounds):
        if name not in runs:
            continue
        try:
            runs[name].append(contenders[name]())
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            del runs[name]
        gc.collect()  # what it left
        if on_gpu:
            torch.cuda.empty_cache()
    return runs


def compare(work: Work, names: Iterable[str], rounds: int) -> list[dict[str, Any]]:
    """Return a row per contender."""
    runs = run_in_turn(work, list(names), rounds)
    times = {name: [run.seconds for run in each] for name, each in runs.items()}
    losses = {name: [float(loss) for loss in each[0].losses] for name, each in runs.items()}
    tokens = work.setting.rows * work.setting.length
    tolerance = TOLERANCE[work.setting.dtype]
    reference = reference_of(work.setting)
    if reference not in runs:  # it ran out of memory
        reference = next(iter(runs))
    peak = matrix_peak() if work.setting.device == "cuda" else None
    return [
        {
            "rank": work.rank,
            "name": name,
            "reference": reference,
            "seconds": statistics.median(times[name]),
            "tokens_per_second": tokens / statistics.median(times[name]),
            "relative": ratio(times, reference, name),
            "losses": losses[name],
            "difference": largest_difference(losses[name], losses[reference]),
            "tolerance": None if name in NOT_THE_SAME else tolerance,
            "peak": max(run.peak for run in runs[name]),
            "mfu": peak and step_flops(work) / statistics.median(times[name]) / peak,
        }
        for name in runs
    ]


def step_flops(work: Work) -> int:
    """Return the operations of a step, those of the adapters in their cheapest order."""
    setting = work.setting
    maps: list[LayerShape | LinearMap] = [
        LayerShape(weight.shape[1], weight.shape[0], work.rank, 0)
        for weight in work.adapters.weights.values()
    ]
    maps.append(LinearMap(setting.width, setting.words, False, True))
    tokens = setting.rows * setting.length
    return training_flops(
        maps, tokens, setting.rows * setting.length**2, setting.layers * setting.width
    )


def matrix_peak() -> float:
    """Return the operations per second of the fastest bfloat16 product of square matrices."""
    best = 0.0
    for width in (4096, 8192, 16384):
        a, b = (torch.randn(width, width, dtype=torch.bfloat16, device="cuda") for _ in "ab")
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            for _ in range(5):
                a @ b
            end.record()
            end.synchronize()
            best = max(best, 5 * 2 * width**3 / (start.elapsed_time(end) / 1e3))
    return best


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of a loss."""
    pairs = zip(losses, expected, strict=True)
    return max(abs(mine - other) / other for mine, other in pairs)


def report(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one rank."""
    reference = rows[0]["reference"]
    head = f"{'ms':>9}{'tokens/s':>10}{'ratio':>9}   losses, and how far from those of {reference}"
    print(f"\nrank {rows[0]['rank']:<18}{head}")
    for row in rows:
        same = row["tolerance"] is None or row["difference"] <= row["tolerance"]
        relative = f"{row['relative']:.2f}" if same else "differs"
        print(
            f"{row['name']:<23}{1e3 * row['seconds']:>9.1f}{row['tokens_per_second']:>10.0f}"
            f"{relative:>9}   {row['losses'][0]:.5f} ... {row['losses'][-1]:.5f}"
            f"{row['difference']:>10.1e}{on_gpu(row)}",
            flush=True,
        )


def on_gpu(row: dict[str, Any]) -> str:
    """Return what a row says of a GPU, if anything."""
    return (
        "" if row["mfu"] is None else f"   MFU {row['mfu']:.2f}, peak {row['peak'] / GIB:.1f} GiB"
    )


def resident(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def peak_of(name: str, setting: Setting, folder: str, rank: int, threads: int) -> int:
    """Return the peak bytes of a contender's steps; for a process of its own."""
    torch.set_num_threads(threads)
    be_quiet()
    with tempfile.TemporaryDirectory() as toy_folder:
        toy = TOY._replace(dtype=setting.dtype)
        base = make_base(toy, toy_folder)
        CONTENDERS[name](prepare(toy, toy_folder, base, toy.ranks[0], steps=2))()
    gc.collect()
    before = resident("VmRSS")
    base = make_base(setting, folder)
    run = CONTENDERS[name](prepare(setting, folder, base, rank, steps=3))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the loading
    run()
    return resident("VmHWM") - before


def compare_memory(
    setting: Setting, folder: str, rank: int, names: Iterable[str], threads: int
) -> list[dict[str, Any]]:
    """Return a row per contender."""
    # Else malloc keeps what the loading freed, and the next tensors hide in it.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    peaks = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                peaks[name] = pool.submit(peak_of, name, setting, folder, rank, threads).result()
            except ImportError as error:
                print(f"{name}: not installed ({error})")
    return [
        {"rank": rank, "name": name, "peak": peak, "relative": peak / peaks["PEFT"]}
        for name, peak in peaks.items()
    ]


def report_memory(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one rank."""
    print(f"\nrank {rows[0]['rank']:<14}{'peak MiB':>9}{'of PEFT':>9}")
    for row in rows:
        print(f"{row['name']:<19}{row['peak'] / 2**20:>9.0f}{row['relative']:>9.2f}", flush=True)


def be_quiet() -> None:
    """Leave the table alone on the screen."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting", choices=tuple(SETTINGS), required=True)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a round; the first is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    be_quiet()
    setting = SETTINGS[options.setting]._replace(checkpointing=options.checkpointing)
    where = machine(*PACKAGES, device=setting.device)
    print(f"{where}\nsetting {options.setting}: {setting}")
    rows: list[dict[str, Any]] = []
    names = list(names_for(setting, options.contenders))
    with tempfile.TemporaryDirectory() as folder:
        base = None if options.memory else make_base(setting, folder)
        for rank in options.ranks or setting.ranks:
            if options.memory:
                found = compare_memory(setting, folder, rank, names, options.threads)
                report_memory(found)
            else:
                work = prepare(setting, folder, base, rank, options.steps)
                found = compare(work, names, options.rounds)
                report(found)
            rows += found
            write_json(options.json, {"machine": where, "setting": options.setting, "rows": rows})


if __name__ == "__main__":
    main()
