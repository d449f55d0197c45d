# ruff: noqa: E501 (a table, of which each row is one line)
"""What users get wrong: commands in a folder where all else is right.

Each case is run by `test_bad_inputs.py`, which also writes the table in `docs/errors.md`.
The folder has `tiny.yaml`, a recipe that works; `base`, its model; `data`, its rows; `run`, the
folder of a fit with it; `adapter`, what it trained; `lora`, the same adapter as PEFT would leave
it; `wide`, a model of another width; `small`, one of a smaller vocabulary than its tokenizer's.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

FIT = "fit --config tiny.yaml"
GO_ON = f"{FIT} --ckpt_path"
DATA = "--data.path bad.jsonl --data.held_out_examples 1"
MERGE = "merge --output merged --checkpoint"
FALCON = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 301,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "alibi": False,
}
GOOD_ROW = {"system_prompt": "", "question": "How many?", "response": "Two."}


class Case(NamedTuple):
    """A command that is refused, or fails."""

    wrong: str  # as a person would say it
    command: str
    status: int = 2
    prepare: Callable[[], object] = lambda: None  # in the folder
    environment: Mapping[str, str] = MappingProxyType({})


def write(name: str, content: str | bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(*lines: object, name: str = "bad.jsonl") -> None:
    """Write a file of rows; what is text already is written as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    write(name, "".join(f"{text}\n" for text in texts))


def change_json(name: str, **changes: object) -> None:
    path = Path(name)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(name: str, change: Callable[[dict], object]) -> None:
    tensors = load_file(name)
    change(tensors)
    save_file(tensors, name, metadata={"format": "pt"})


def cut(name: str, keep: int) -> None:
    path = Path(name)
    path.write_bytes(path.read_bytes()[:keep])


def flip(name: str, place: int) -> None:
    content = bytearray(Path(name).read_bytes())
    content[place] ^= 255
    Path(name).write_bytes(bytes(content))


def remove(*names: str) -> None:
    for name in names:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def as_pickle(name: str, pickle: str) -> None:
    torch.save(load_file(name), Path(name).parent / pickle)
    remove(name)


def index_elsewhere() -> None:
    remove("base/model.safetensors")
    weight_map = {"model.norm.weight": "../wide/model.safetensors"}
    write("base/model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


class Intruder:
    """An object whose pickle makes a folder when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def write_pickle(name: str) -> None:
    torch.save({"state_dict": Intruder()}, name)


def break_checkpoints(keep: int) -> None:
    for path in Path("run/checkpoints").glob("step-*.ckpt"):
        cut(str(path), keep)


CONFIGURATION = [
    Case("no recipe is given", "fit"),
    Case("the recipe is not there", "fit --config tini.yaml"),
    Case("a packaged recipe's name is misspelt", "fit --config recipes/quikstart.yaml"),
    Case("the recipe is not YAML", "fit --config bad.yaml", 2, partial(write, "bad.yaml", "a: [1")),
    Case("the recipe is a list", "fit --config bad.yaml", 2, partial(write, "bad.yaml", "- 1\n")),
    Case("the recipe is a sweep", "fit --config recipes/paper/figure2.yaml"),
    Case("an option is misspelt", f"{FIT} --model.adapter.rnak 8"),
    Case("an option of the Trainer is misspelt", f"{FIT} --trainer.max_step 8"),
    Case("an option stands under another group", f"{FIT} --model.rank 8"),
    Case("a number is a word", f"{FIT} --trainer.max_steps many"),
    Case("the rank is 0", f"{FIT} --model.adapter.rank 0"),
    Case("the rank is negative", f"{FIT} --model.adapter.rank -4"),
    Case("the rank is no whole number", f"{FIT} --model.adapter.rank 2.5"),
    Case("alpha is 0", f"{FIT} --model.adapter.alpha 0"),
    Case("alpha is not finite", f"{FIT} --model.adapter.alpha nan"),
    Case("there is no such scaling", f"{FIT} --model.adapter.scaling rs-lora"),
    Case("there is no such initialization", f"{FIT} --model.adapter.init pissa"),
    Case("dropout is 1", f"{FIT} --model.adapter.dropout 1.0"),
    Case("a target is misspelt", f"{FIT} --model.adapter.targets [q_prj]"),
    Case("targets are empty", f"{FIT} --model.adapter.targets []"),
    Case("targets are no regular expression", f"{FIT} --model.adapter.targets (q_proj"),
    Case(
        "a pattern matches no module",
        f'{FIT} --model.adapter.rank_pattern {{"qproj":4}}',
    ),
    Case("there is no such dtype", f"{FIT} --model.dtype fp8"),
    Case("there is no such optimizer", f"{FIT} --model.optimizer torch.optim.AdamV"),
    Case("an optimizer has no such argument", f"{FIT} --model.optimizer.beta 0.9"),
    Case("an optimizer refuses a number", f"{FIT} --model.optimizer.lr -1"),
    Case("a schedule cannot step", f"{FIT} --model.lr_scheduler torch.optim.lr_scheduler.StepLR --model.lr_scheduler.step_size 0"),
    Case("a schedule waits for a metric", f"{FIT} --model.lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau"),
    Case("there is no such data module", f"{FIT} --data rslightning.data.OpenOrka"),
    Case("the batch is empty", f"{FIT} --data.batch_size 0"),
    Case("the length is 0", f"{FIT} --data.max_length 0"),
    Case("the batch of a plan is negative", "plan --config tiny.yaml --memory 8GiB --data.batch_size -4"),
    Case("a step has no micro-batches", f"{FIT} --trainer.accumulate_grad_batches 0"),
    Case("validations have no interval", f"{FIT} --trainer.val_check_interval 0"),
    Case("answers have no length", f"{FIT} --model.max_new_tokens -5"),
    Case("the seed is negative", f"{FIT} --seed_everything -1"),
    Case("a stream has no end", f"{FIT} --data.streaming true --data.held_out_examples 2"
         " --trainer.max_steps -1 --trainer.max_epochs 2"),
    Case("a monitor's interval is 0", f"{FIT} --gradient_norm.every_n_steps 0"),
    Case("quantization quantizes nothing", f'{FIT} --model.quantization {{"load_in_4bit":false}}'),
    Case("rank: auto where no rank fits", f"{FIT} --data.batch_size 4000000"
         " --data.packing false --model.adapter.rank auto"),
    Case("the memory is no size", "plan --config tiny.yaml --memory lots"),
]  # fmt: skip

DATA_ROWS = [
    Case("the data are not there", f"{FIT} --data.path nowhere.jsonl"),
    Case("the data are of another kind", f"{FIT} --data.path tiny.yaml"),
    Case("the folder holds no data", f"{FIT} --data.path base"),
    Case("two files may be the training rows", f"{FIT} --data.path parts", 2,
         lambda: [rows(GOOD_ROW, name=f"parts/{name}_train.jsonl") for name in ("code", "math")]),
    Case("a part of the training rows is missing", f"{FIT} --data.path parts", 2,
         lambda: [rows(GOOD_ROW, name=f"parts/train-0000{n}-of-00003.jsonl") for n in (0, 2)]),
    Case("the file is empty", f"{FIT} {DATA}", 2, partial(write, "bad.jsonl", "")),
    Case("a row is not JSON", f"{FIT} {DATA}", 2, partial(rows, GOOD_ROW, "{'question': 1}")),
    Case("a row is a list", f"{FIT} {DATA}", 2, partial(rows, GOOD_ROW, [1, 2])),
    Case("the rows are not UTF-8", f"{FIT} {DATA}", 2, partial(write, "bad.jsonl", b'{"system_prompt": "", "question": "\xff", "response": "!"}\n' * 9)),
    Case("a column is missing", f"{FIT} {DATA}", 2, partial(rows, {"question": "?", "answer": "!"})),
    Case("a value is a number", f"{FIT} {DATA}", 2, partial(rows, *[GOOD_ROW | {"response": 7}] * 9)),
    Case("a value is null", f"{FIT} {DATA}", 2, partial(rows, *[GOOD_ROW] * 9, GOOD_ROW | {"question": None})),
    Case("an answer is empty", f"{FIT} {DATA}", 2, partial(rows, *[GOOD_ROW] * 9, GOOD_ROW | {"response": ""})),
    Case("no row is good", f"{FIT} {DATA} --data.on_bad_row skip", 2, partial(rows, *[GOOD_ROW | {"response": 7}] * 9)),
    Case("no row is short enough", f"{FIT} --data.max_length 2"),
    Case("the held-out rows are all rows", f"{FIT} --data.path bad.jsonl --data.held_out_examples 3", 2,
         partial(rows, *[GOOD_ROW] * 3)),
    Case("a Parquet file is cut short", f"{FIT} --data.path bad.parquet", 2,
         partial(write, "bad.parquet", b"PAR1 and no more")),
    Case("the rows are of another data set", f"{FIT} --data rslightning.data.GSM8K --data.path data"),
    Case("the tokenizer is of a larger model", f"{FIT} --model.base_model small"),
]  # fmt: skip

MODEL_FOLDER = [
    Case("the model is not there", f"{FIT} --model.base_model ./nowhere"),
    Case("the model is on a hub that cannot be reached", f"{FIT} --model.base_model some/model"),
    Case("the packaged model does not exist", f"{FIT} --model.base_model asset:llama"),
    Case("there is no config.json", FIT, 2, partial(remove, "base/config.json")),
    Case("config.json is cut short", FIT, 2, partial(cut, "base/config.json", 30)),
    Case("there are no weights", FIT, 2, partial(remove, "base/model.safetensors")),
    Case("the weights are a pickle", FIT, 2,
         partial(as_pickle, "base/model.safetensors", "pytorch_model.bin")),
    Case("the weights are cut short", FIT, 2, partial(cut, "base/model.safetensors", 20_000)),
    Case("the weights lack a tensor", FIT, 2,
         partial(change_tensors, "base/model.safetensors", lambda t: t.pop("model.norm.weight"))),
    Case("the weights are of other sizes", FIT, 2,
         partial(change_json, "base/config.json", intermediate_size=41)),
    Case("the index names a file elsewhere", FIT, 2, index_elsewhere),
    Case("the model type is unknown", FIT, 2,
         partial(change_json, "base/config.json", model_type="lama")),
    Case("the model mixes the examples of a packed row", f"{FIT} --model.pretrained false --merge_adapters null", 2,
         partial(write, "base/config.json", json.dumps(FALCON))),
    Case("the model brings code of its own", FIT, 2,
         partial(change_json, "base/config.json", model_type="own",
                 auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})),
    Case("there is no tokenizer", FIT, 2,
         partial(remove, "base/tokenizer.json", "base/tokenizer_config.json")),
]  # fmt: skip

LORA_WEIGHTS = "lora/adapter_model.safetensors"
LORA_CONFIG = "lora/adapter_config.json"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"

ADAPTER_FOLDER = [
    Case("the adapter is not there", f"{MERGE} nowhere"),
    Case("the folder holds no adapter", f"{MERGE} data"),
    Case("the configuration is no JSON", f"{MERGE} lora", 2, partial(write, LORA_CONFIG, "r: 3")),
    Case("the adapter is DoRA", f"{MERGE} lora", 2, partial(change_json, LORA_CONFIG, use_dora=True)),
    Case("the adapter is of another method", f"{MERGE} lora", 2,
         partial(change_json, LORA_CONFIG, peft_type="LOHA")),
    Case("the adapter changed its base", f"{MERGE} lora", 2,
         partial(change_json, LORA_CONFIG, init_lora_weights="pissa")),
    Case("the ranks contradict each other", f"{MERGE} lora", 2, partial(change_json, LORA_CONFIG, r=5)),
    Case("the weights are cut short", f"{MERGE} lora", 2, partial(cut, LORA_WEIGHTS, 900)),
    Case("the weights are a pickle", f"{MERGE} lora", 2,
         partial(as_pickle, LORA_WEIGHTS, "adapter_model.bin")),
    Case("the base's head is among the weights", f"{MERGE} lora", 2,
         partial(change_tensors, LORA_WEIGHTS,
                 lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(2)}))),
    Case("a matrix is missing", f"{MERGE} lora", 2,
         partial(change_tensors, LORA_WEIGHTS, lambda t: t.pop(KEY.format("B")))),
    Case("a matrix is not finite", f"{MERGE} lora", 1,
         partial(change_tensors, LORA_WEIGHTS, lambda t: t[KEY.format("B")].fill_(torch.inf))),
    Case("a byte of ours has changed", f"{MERGE} adapter", 2,
         partial(flip, "adapter/adapter_model.safetensors", -1)),
    Case("the adapter is of another base", f"{MERGE} lora --base-model other", 2,
         partial(shutil.copytree, "wide", "other")),
    Case("the base has moved", f"{MERGE} lora", 2, partial(os.rename, "base", "moved")),
    Case("the folder to write is not empty", "merge --output data --checkpoint lora"),
    Case("the folder to write is a file", "merge --output tiny.yaml --checkpoint lora"),
    Case("the beginning is of another rank", f"{FIT} --model.start_from lora --model.adapter.rank 5"),
]  # fmt: skip

CHECKPOINT = [
    Case("the checkpoint is not there", f"{GO_ON} nowhere.ckpt"),
    Case("there is no run to go on with", f"{GO_ON} last --trainer.logger.init_args.name other"),
    Case("the checkpoint is no file of torch", f"{GO_ON} bad.ckpt", 2,
         partial(write, "bad.ckpt", b"\x00" * 4096)),
    Case("the checkpoint holds code", f"{GO_ON} bad.ckpt", 2, partial(write_pickle, "bad.ckpt")),
    Case("all checkpoints are cut short", f"{GO_ON} run", 2, partial(break_checkpoints, 5_000)),
    Case("the checkpoint is of another rank", f"{GO_ON} run --model.adapter.rank 7"),
    Case("the checkpoint is of another scaling", f"{GO_ON} run --model.adapter.scaling lora"),
    Case("the checkpoint is of other targets", f"{GO_ON} run --model.adapter.targets [q_proj]"),
    Case("a new run shall begin in the folder of another",
         f"{FIT} --trainer.logger false --trainer.default_root_dir run"),
    Case("what is evaluated is of another base", "validate --config tiny.yaml --ckpt_path run --model.base_model wide"),
    Case("a run shall go on from an adapter", f"{GO_ON} adapter"),
    Case("it has no adapter to export", "export --output new --checkpoint bad.ckpt", 2,
         lambda: torch.save({"state_dict": {"w": torch.zeros(1)}}, "bad.ckpt")),
    Case("it is no checkpoint of Lightning", "export --output new --checkpoint bad.ckpt", 2,
         lambda: torch.save({"w": torch.zeros(1)}, "bad.ckpt")),
]  # fmt: skip

ENVIRONMENT = [
    Case("there is no GPU", f"{FIT} --trainer.accelerator gpu"),
    Case("there is no GPU for DeepSpeed", f"{FIT} --config configs/strategy/deepspeed_zero3.yaml"),
    Case("there is no such strategy", f"{FIT} --trainer.strategy dpp"),
    Case("there are 0 devices", f"{FIT} --trainer.devices 0"),
    Case("the launcher started another number", f"{FIT} --trainer.devices 2", 2,
         environment={"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0",
                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
                      "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}),
    Case("SLURM's tasks were not started by srun", FIT, 2,
         environment={"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "1",
                      "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "tiny"}),
    Case("the cache cannot be written", FIT, 1, partial(write, "file", ""),
         environment={"RSLIGHTNING_CACHE": "file"}),
    Case("a CPU has no number of devices of its own", f"{FIT} --trainer.devices -1"),
    Case("the runs cannot be written", f"{FIT} --trainer.logger.init_args.save_dir tiny.yaml", 1),
    Case("the merged model cannot be written", "merge --checkpoint lora --output tiny.yaml/merged", 1),
    Case("the memory of no GPU is there to plan for", "plan --config tiny.yaml"),
]  # fmt: skip

VERBS = [
    Case("the verb is misspelt", "fti --config tiny.yaml"),
    Case("an option does not belong to the verb", "merge --checkpoint lora --output m --rank 4"),
    Case("a needed option is missing", "merge --checkpoint lora"),
    Case("there is no such recipe", "recipes show lama"),
    Case("what is copied is there already", "recipes copy quickstart", 2,
         partial(write, "quickstart.yaml", "")),
    Case("no number of blocks", "data show --config tiny.yaml -n -1"),
    Case("the sweep is a recipe", "sweep --config tiny.yaml"),
    Case("the sweep's grid is empty", "sweep --config bad.yaml", 2,
         partial(write, "bad.yaml", "base: [tiny.yaml]\ngrids: []\n")),
    Case("the sweep's figure is misspelt", "sweep --config bad.yaml", 2,
         partial(write, "bad.yaml",
                 "base: [tiny.yaml]\ngrids: [{rank: [4]}]\nfigures: {a: perplexty}\n")),
    Case("there is nothing to report", "report data --output report"),
    Case("the report would write over another folder", "report runs --output data"),
    Case("the pickle to convert is not there", "convert --pickle data --output new"),
]  # fmt: skip

GROUPS = {
    "Configuration": CONFIGURATION,
    "Data": DATA_ROWS,
    "Model folder": MODEL_FOLDER,
    "Adapter folder": ADAPTER_FOLDER,
    "Checkpoint": CHECKPOINT,
    "Environment": ENVIRONMENT,
    "Other verbs": VERBS,
}
