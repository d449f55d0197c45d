"""Merging adapters into a model folder, against reading and writing its weights once.

    python benchmarks/merge.py [--layers 22] [--rank 64] [--dtype bfloat16] [--repeats 3]

The base is a Llama in bfloat16 with the shape of one of 1.1 billion parameters (width 2048, 22
layers), of which --layers are made: 4 need 1.3 GB of disk and 3 GB of memory, all 22 need 4.7 GB
and 9 GB. Adapters are on all linear maps. `copy` reads every tensor of the same files and writes it
again, shard by shard and flushed to the disk, as a merge does; both alternate. What is timed is
what `rslightning merge` does once the adapter is in memory. One merged weight is checked.

`write` is the flushed writing alone, without a look at the tensors: the disk's share of `copy`.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from side_by_side import machine, ratio, turns, update_share, write_json

from rslightning.model_folder import INDEX_FILE, ModelFolder
from rslightning.rslora.adapters import Adapter, LayerAdapter
from rslightning.rslora.merge_folder import merge_folder
from rslightning.rslora.spec import ResolvedAdapter
from rslightning.storage import new_folder, open_tensors, save_tensors

WIDTH, INNER, KEYS, WORDS = 2048, 5632, 256, 32_000
LAYERS_PER_SHARD = 6
ALPHA, UPDATE = 16.0, 0.05

LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
"""Name in a layer -> shape [out, in]."""


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul_(0.02).bfloat16()


def layer_tensors(number: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{number}"
    tensors = {f"{prefix}.{name}.weight": draw(*shape) for name, shape in LINEARS.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    return tensors


def write_base(folder: Path, layers: int) -> None:
    """Write random weights in shards, with their index and a configuration."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    starts = range(0, layers, LAYERS_PER_SHARD)
    weight_map = {}
    for shard, start in enumerate(starts, 1):
        tensors = {} if start else {"model.embed_tokens.weight": draw(WORDS, WIDTH)}
        for number in range(start, min(start + LAYERS_PER_SHARD, layers)):
            tensors |= layer_tensors(number)
        if start == starts[-1]:
            tensors |= {"model.norm.weight": draw(WIDTH), "lm_head.weight": draw(WORDS, WIDTH)}
        file = f"model-{shard:05}-of-{len(starts):05}.safetensors"
        save_tensors(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def draw_adapter(base: ModelFolder, rank: int) -> Adapter:
    """Return adapters of all linear maps, with updates of 5 % of their weights."""
    numbers = ResolvedAdapter(rank, ALPHA, "rslora")
    layers = {}
    for file, names in base.shards.items():
        with open_tensors(base.path / file) as tensors:
            for name in names:
                path = name.removesuffix(".weight")
                if path.endswith(tuple(LINEARS)):
                    weight = tensors.get_tensor(name)
                    lora_a = torch.randn(rank, weight.shape[1]) * weight.shape[1] ** -0.5
                    lora_b = torch.randn(weight.shape[0], rank)
                    lora_b *= UPDATE / update_share(weight, lora_a, lora_b, numbers.gamma)
                    layers[path] = LayerAdapter(lora_a, lora_b, numbers)
    return Adapter(layers)


def merge(base: ModelFolder, adapter: Adapter, dtype: torch.dtype | None, output: Path) -> None:
    """Do what `rslightning merge` does."""
    with new_folder(output) as aside:
        merge_folder(base, adapter, aside, dtype).write(aside)


def copy(base: ModelFolder, dtype: torch.dtype, output: Path) -> None:
    """Read and write every tensor."""
    with new_folder(output) as aside:
        for file, names in base.shards.items():
            with open_tensors(base.path / file) as tensors:
                shard = {name: tensors.get_tensor(name).to(dtype) for name in names}
                save_tensors(shard, aside / file)


def write(base: ModelFolder, output: Path) -> None:
    """Write the bytes of the files."""
    with new_folder(output) as aside:
        for file in base.shards:
            shutil.copyfile(base.path / file, aside / file)


def check(base: ModelFolder, adapter: Adapter, dtype: torch.dtype, output: Path) -> None:
    """Stop the program unless the last adapted weight is W + gamma B A, rounded once."""
    path, layer = list(adapter.layers.items())[-1]
    weights = []
    for folder in (base, ModelFolder(output)):
        file = next(f for f, names in folder.shards.items() if f"{path}.weight" in names)
        with open_tensors(folder.path / file) as tensors:
            weights.append(tensors.get_tensor(f"{path}.weight"))
    before, after = weights
    delta = layer.numbers.gamma * layer.lora_b.double() @ layer.lora_a.double()
    exact = before.double() + delta
    error = float((after.double() - exact).norm() / exact.norm())
    if after.dtype != dtype or not error < torch.finfo(dtype).eps:
        raise SystemExit(f"{path} is off by {error:.1e} in {after.dtype}; nothing was compared.")


def take_memory(size: int) -> None:
    """Write into fresh memory, and let go of it.

    A virtual machine that hands free memory back to its host gets it anew, page by page: before
    the clock runs, and not within whichever run comes first.
    """
    torch.ones(size, dtype=torch.uint8)


def time_all(
    runs: dict[str, Callable[[Path], None]], output: Path, repeats: int, size: int
) -> dict[str, list[float]]:
    """Return name -> seconds, a number per round; the output is removed each time.

    Under `name CPU` are the seconds of all threads together: what other jobs on the machine take
    from the disk and the clock is not in them.
    """
    times: dict[str, list[float]] = {f"{name}{kind}": [] for name in runs for kind in ("", " CPU")}
    for name in turns(list(runs), repeats):
        take_memory(4 * size)  # base and output as files, and in memory
        start, start_cpu = time.perf_counter(), time.process_time()
        runs[name](output)
        times[name].append(time.perf_counter() - start)
        times[f"{name} CPU"].append(time.process_time() - start_cpu)
        shutil.rmtree(output)
    return times


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder else")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    where = machine("safetensors")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_base(folder / "base", options.layers)
        base = ModelFolder(folder / "base")
        adapter = draw_adapter(base, options.rank)
        merge(base, adapter, dtype, folder / "output")
        check(base, adapter, dtype, folder / "output")
        shutil.rmtree(folder / "output")
        runs = {
            "copy": partial(copy, base, dtype),
            "merge": partial(merge, base, adapter, dtype),
            "write": partial(write, base),
        }
        size = sum((base.path / file).stat().st_size for file in base.shards)
        times = time_all(runs, folder / "output", options.repeats, size)
    print(f"{where}\n{options.layers} layers, {size / 2**30:.2f} GiB, rank {options.rank}, {dtype}")
    for name in runs:
        seconds = statistics.median(times[name])
        cpu = statistics.median(times[f"{name} CPU"])
        share = ratio(times, name, "copy")
        print(f"{name:<6} {seconds:7.2f} s   {share:.2f} of copy   {cpu:7.2f} s of CPU")
    write_json(options.json, {"machine": where, "layers": options.layers, "seconds": times})


if __name__ == "__main__":
    main()
