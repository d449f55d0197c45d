"""`rslightning plan` and `rank: auto`: what fits, read from a recipe without building anything."""

import json
import os
from dataclasses import replace

import lightning.pytorch as lightning
import pytest
import torch
import yaml
from test_architectures import MODELS
from test_cli import config, resumes, run, said

from rslightning import cli, plan
from rslightning.checkpoint import read_checkpoint
from rslightning.cost import GIB
from rslightning.errors import UserError
from rslightning.model_shape import read_shape
from rslightning.plan import choose_rank, parse_memory, read_plan
from rslightning.rslora import AdapterSpec, inject_adapters
from rslightning.training_step import Optimizer, Sharding

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


@pytest.fixture
def folder(tmp_path):
    """Return a folder that holds a configuration and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return tmp_path


def settings(folder, **changes):
    """Return what a parsed recipe holds; `changes` are options by their last word."""
    model = {
        "base_model": str(folder),
        "adapter": {"rank": 64, "targets": "all_linear", "dropout": 0.0, "rank_pattern": {}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
        "dtype": "bfloat16",
        "attention": None,
        "activation_checkpointing": True,
        "quantization": None,
    }
    trainer = {
        "accelerator": "auto",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 4,
    }
    data = {"batch_size": 8, "max_length": 512}
    for part in (model["adapter"], model, trainer, data):
        part |= {name: value for name, value in changes.items() if name in part}
    return {"model": model, "trainer": trainer, "data": {"init_args": data}}


def test_the_highest_rank_that_fits(folder):
    found = read_plan(settings(folder))
    needed = {rank: found.memory(rank).total for rank in found.candidates}
    assert list(needed) == [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert sorted(needed.values()) == list(needed.values())
    for rank, size in needed.items():
        assert found.highest_rank(size) == rank
        assert found.highest_rank(size - 1) == (rank // 2 if rank > 4 else None)


def test_a_rank_costs_its_matrices(folder):
    found = read_plan(settings(folder))
    entries = 32 * (4 * 8192 + 3 * (4096 + 11008))  # for each rank
    estimate = found.memory(512)
    assert estimate.frozen == 2 * found.shape.parameters
    assert estimate.trained == estimate.gradients == 4 * 512 * entries
    assert estimate.optimizer == 8 * 512 * entries


@pytest.mark.parametrize(
    "targets", ["all_linear", "attention", "mlp", r".*\.(0|1)\..*proj", "lists"]
)
@pytest.mark.parametrize("name", MODELS)
def test_targets_are_those_that_injection_adapts(name, targets, tmp_path):
    with torch.device("meta"):
        model = MODELS[name]()
    model.config.save_pretrained(tmp_path)
    path = read_shape(model.config.to_dict()).maps[1].path
    targets = [path.rpartition(".")[2], path] if targets == "lists" else targets
    try:
        report = inject_adapters(model, AdapterSpec(rank=3, targets=targets))
    except UserError:
        with pytest.raises(UserError, match=r"^targets '.*' matches no linear module"):
            read_plan(settings(tmp_path, targets=targets))
        return
    found = read_plan(settings(tmp_path, targets=targets))
    assert [linear.path for linear in found.adapted] == list(report.modules)
    step = found.at(3)
    sizes = [(m.in_features + m.out_features) * step.ranks[m.path] for m in found.adapted]
    assert sum(sizes) == report.trainable_parameters


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_refused_as_by_the_fit(folder, name):
    adapter = settings(folder)["model"]["adapter"] | {name: {"zzz": 4}}
    with pytest.raises(UserError) as caught:
        read_plan(settings(folder, adapter=adapter))
    assert str(caught.value).startswith(
        "rank_pattern or alpha_pattern key 'zzz' matches none of the adapted modules."
    )


def test_a_pattern_keeps_its_rank(folder):
    found = read_plan(settings(folder, rank_pattern={"q_proj": 3, r"layers\.5\.mlp\..*": 7}))
    ranks = found.at(32).ranks
    assert ranks["model.layers.5.self_attn.q_proj"] == 3
    assert ranks["model.layers.5.mlp.up_proj"] == 7
    assert ranks["model.layers.6.mlp.up_proj"] == 32


def test_no_rank_is_higher_than_the_matrices(tmp_path):
    small = LLAMA | {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(small), encoding="utf-8")
    assert read_plan(settings(tmp_path)).candidates == (4, 8, 16, 32, 64)


STEPS = {
    ("bf16-mixed", "bfloat16"): (2, 4, 2),
    ("bf16-mixed", "float32"): (4, 4, 2),
    ("32-true", "float32"): (4, 4, 4),
    ("32-true", "bfloat16"): (2, 4, 2),
    (None, "float32"): (4, 4, 4),
    ("bf16-true", "float32"): (2, 2, 2),
    ("16-mixed", "float16"): (2, 4, 2),
}


@pytest.mark.parametrize(("precision", "dtype"), STEPS)
def test_bytes_of_an_entry(folder, precision, dtype):
    step = read_plan(settings(folder, precision=precision, dtype=dtype)).step
    found = (step.base_bytes, step.adapter_bytes, step.compute_bytes)
    assert found == STEPS[precision, dtype]


def test_what_else_a_recipe_says(folder):
    step = read_plan(
        settings(
            folder,
            batch_size=3,
            max_length=77,
            dropout=0.1,
            attention="eager",
            quantization={"load_in_8bit": True},
            accelerator="cpu",
            optimizer={"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
        )
    ).step
    assert (step.rows, step.length, step.tokens) == (3, 77, 231)
    assert (step.dropout, step.eager_attention, step.on_cpu) == (True, True, True)
    assert (step.map_bytes, step.optimizer) == (1.0, Optimizer("SGD", 1))


@pytest.mark.parametrize(
    ("trainer", "devices", "sharding"),
    [
        ({"devices": "auto"}, None, Sharding()),
        ({"devices": "2", "num_nodes": 3}, None, Sharding(6, buckets=True)),
        ({"devices": [0, 3]}, None, Sharding(2, buckets=True)),
        ({"devices": 1, "strategy": "auto"}, 8, Sharding(8, buckets=True)),
        ({"devices": 2, "strategy": "deepspeed_stage_1"}, 8, "deepspeed"),
    ],
)
def test_processes(folder, trainer, devices, sharding, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    if sharding == "deepspeed":
        sharding = Sharding(8, optimizer=True, masters=True)
    assert read_plan(settings(folder, **trainer), devices).step.sharding == sharding


def test_a_strategy_by_its_class(folder):
    path = "lightning.pytorch.strategies.DDPStrategy"
    strategy = {"class_path": path, "init_args": {"gradient_as_bucket_view": True}}
    assert read_plan(settings(folder, strategy=strategy), 2).step.sharding == Sharding(2)


def test_data_without_sizes_is_no_plan(folder):
    foreign = settings(folder) | {"data": {"class_path": "their.Data", "init_args": {}}}
    with pytest.raises(UserError, match=r"^A plan needs data\.batch_size, which"):
        read_plan(foreign)


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("80 GB", 80 * 10**9), ("81920MiB", 80 * GIB), ("0.5MB", 500_000)],
)
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "80 gigs", "-3GiB", "0GiB", "1e3GiB", ""])
def test_what_is_no_size_of_memory(text):
    with pytest.raises(UserError, match=r"is no size of memory; write 80GiB, 80GB or 81920MiB\.$"):
        parse_memory(text)


def test_auto_is_what_fits_nine_tenths_of_the_memory(folder, monkeypatch):
    recipe = settings(folder, rank="auto")
    needed = read_plan(recipe).memory(128).total
    monkeypatch.setattr(plan, "device_memory", lambda: needed * 10 // 9 + 9)
    rank, reason = choose_rank(recipe)
    assert rank == 128
    assert f"fits {needed / GIB:.2f} GiB, 90% of the GPU's memory" in reason
    monkeypatch.setattr(plan, "device_memory", lambda: needed * 10 // 9 - 9)
    assert choose_rank(recipe)[0] == 64


def test_auto_on_the_cpu_shares_the_memory_with_the_other_processes(folder, monkeypatch):
    recipe = settings(folder, rank="auto", accelerator="cpu", devices=2, strategy="ddp")
    needed = read_plan(recipe).memory(32).total
    monkeypatch.setattr(plan, "device_memory", lambda: 1 << 50)
    monkeypatch.setattr(plan, "total_memory", lambda: 2 * needed * 10 // 9 + 99)
    # What is free differs from process to process, and all must choose the same.
    monkeypatch.setattr(plan, "available_memory", lambda: 0)
    rank, reason = choose_rank(recipe)
    assert rank == 32
    assert "90% of this machine's memory, by all processes" in reason


def test_auto_without_a_gpu_is_estimated_for_the_cpu(folder, monkeypatch):
    options = {"rank": "auto", "activation_checkpointing": False, "dropout": 0.1}
    recipe, on_cpu = (settings(folder, accelerator=name, **options) for name in ("auto", "cpu"))
    elsewhere, here = (read_plan(each).memory(32) for each in (recipe, on_cpu))
    assert here.total != elsewhere.total
    monkeypatch.setattr(plan, "device_memory", lambda: None)
    monkeypatch.setattr(plan, "available_memory", lambda: here.total * 10 // 9 + 9)
    rank, reason = choose_rank(recipe)
    assert rank == 32
    assert f"memory is estimated at {here}." in reason


def test_auto_where_nothing_fits(folder, monkeypatch):
    monkeypatch.setattr(plan, "device_memory", lambda: 10 * GIB)
    with pytest.raises(UserError, match=r"^rank: auto finds none that fits: rank 4 is estimated"):
        choose_rank(settings(folder, rank="auto"))


def test_the_machines_free_memory_is_less_than_all_of_it():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < plan.available_memory() <= pages


def test_python_wants_a_number():
    with pytest.raises(UserError, match="rank: auto is for the rslightning command"):
        AdapterSpec(rank="auto")
    with pytest.raises(UserError, match="rank must be a positive integer, got 'most'"):
        AdapterSpec(rank="most")


@pytest.fixture
def recipe(tmp_path, monkeypatch, model_folder, orca_folder):
    """Return a recipe of a tiny run whose rank is `auto`, alone in the working folder."""
    monkeypatch.chdir(tmp_path)
    text = config(model_folder, orca_folder)
    text["model"]["adapter"]["rank"] = "auto"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(text), encoding="utf-8")
    return path


def afford(monkeypatch, recipe, rank):
    """Let the machine have just enough memory for a rank."""
    parsed = cli._parse(["fit", "--config", str(recipe)], build=False).config["fit"].as_dict()
    needed = read_plan(parsed).memory(rank).total
    monkeypatch.setattr(plan, "available_memory", lambda: needed * 10 // 9 + 99)


@resumes
def test_a_fit_with_auto_writes_a_number_and_resumes_with_it(recipe, monkeypatch, tmp_path):
    afford(monkeypatch, recipe, 8)
    assert run("fit", "--config", recipe).status == 0
    (saved,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["adapter"]["rank"] == 8
    (adapter,) = tmp_path.rglob("adapter_config.json")
    assert json.loads(adapter.read_text())["r"] == 8
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert read_checkpoint(checkpoint)["hyper_parameters"]["adapter"]["rank"] == 8

    afford(monkeypatch, recipe, 16)
    again = ("fit", "--config", recipe, "--trainer.max_steps", 5, "--ckpt_path", checkpoint)
    assert run(*again, "--trainer.logger.init_args.version", 0).status == 0
    (resumed,) = tmp_path.rglob("config.resume-1.yaml")
    assert yaml.safe_load(resumed.read_text())["model"]["adapter"]["rank"] == 8


def test_auto_with_a_checkpoint_that_says_no_rank(recipe, tmp_path):
    path = tmp_path / "full.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"adapter": None}}, path)
    message = said(run("fit", "--config", recipe, "--ckpt_path", path))
    assert message.startswith("rank: auto takes the rank of the checkpoint, and ")


def test_data_is_shown_whatever_the_rank(recipe, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 0)
    assert run("data", "show", "--config", recipe, "-n", 1).status == 0


def test_a_plan_builds_nothing(recipe, monkeypatch, tmp_path, model_folder):
    def refuse(*_, **__):
        raise AssertionError("built")

    for kind in (lightning.LightningModule, lightning.LightningDataModule):
        monkeypatch.setattr(kind, "__init__", refuse)
    monkeypatch.setattr(cli.RecipeCLI, "_instantiate_trainer", refuse)
    (tmp_path / "base").mkdir()
    text = (model_folder / "config.json").read_text(encoding="utf-8")
    (tmp_path / "base" / "config.json").write_text(text, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    outcome = run(
        *("plan", "--config", recipe, "--model.base_model", tmp_path / "base"),
        *("--memory", "1GiB", "--devices", 8, "--trainer.strategy", "deepspeed_stage_3"),
    )
    assert (outcome.status, sorted(tmp_path.rglob("*"))) == (0, before)
    assert "4 rows x 128 tokens x 1 micro-batches x 8 devices, AdamW" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "80"], "--memory 80 is no size of memory; write 80GiB, 80GB or 81920MiB."),
        (["--memory", "8GiB", "--devices", "0"], "--devices is a number of processes, got 0."),
        (
            ["--memory", "8GiB", "--model.base_model", "./nowhere"],
            "Base model ./nowhere does not exist.",
        ),
        (
            ["--memory", "8GiB", "--model.adapter.rnk", "3"],
            "There is no option model.adapter.rnk; did you mean model.adapter.rank?",
        ),
        (
            ["--memory", "8GiB", "--model.adapter.rank", "most"],
            "model.adapter.rank: Expected int or 'auto'; got most",
        ),
        (["--memory"], "argument --memory: expected one argument (see rslightning plan --help)."),
    ],
)
def test_a_wrong_plan_is_one_sentence(recipe, options, message):
    assert said(run("plan", "--config", recipe, *options)) == message


def test_a_plan_of_an_unknown_family_is_refused(recipe, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}', encoding="utf-8")
    options = ("--memory", "8GiB", "--model.base_model", tmp_path)
    message = said(run("plan", "--config", recipe, *options))
    assert message.startswith("The sizes of models of type 'mamba2' are not known here; known are")


def test_without_a_gpu_a_plan_needs_a_size(recipe, monkeypatch):
    monkeypatch.setattr(cli, "device_memory", lambda: None)
    message = said(run("plan", "--config", recipe))
    assert message == "There is no GPU here whose memory could be taken: give --memory 80GiB."
    monkeypatch.setattr(cli, "device_memory", lambda: 3 * GIB)
    assert "2.70 GiB (3.00 GiB, of which 10% are left free)" in run("plan", "--config", recipe).out


def test_a_plan_can_be_changed(folder):
    found = read_plan(settings(folder))
    sparse = replace(found, step=replace(found.step, rows=1))
    assert sparse.memory(4).activations == found.memory(4).activations / 8
