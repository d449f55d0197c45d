"""Every recipe with every fragment of a strategy and of a precision: parsed, and trained."""

import logging
import math
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_recipes import RECIPES, SWEEPS, read, stand_ins

from rslightning.callbacks.throughput import linear_maps
from rslightning.cli import RecipeCLI
from rslightning.errors import UserError
from rslightning.experiments.claims import CLAIMS
from rslightning.experiments.figures import KINDS
from rslightning.experiments.grid import read_sweep
from rslightning.experiments.sweep import corners
from rslightning.recipes import find_config, packaged_names
from rslightning.rslora.whole import whole_tensor

NAMES = packaged_names()
STRATEGIES = [name for name in NAMES if name.startswith("configs/strategy/")]
PRECISIONS = [name for name in NAMES if name.startswith("configs/precision/")]
SINGLE, QUICKSTART = "configs/strategy/single.yaml", "recipes/quickstart.yaml"
BF16_TRUE = "configs/precision/bf16_true.yaml"
# Trained are those that are not another one with other numbers.
TRAINED = [name for name in RECIPES if name != "recipes/llama_gsm8k_paper.yaml"]
ADAFACTOR = [name for name in RECIPES if "Adafactor" in find_config(name).read_text()]
MERGING = (
    QUICKSTART,
    "recipes/quickstart_base.yaml",
)  # with adapters, and with all weights trained
# What two do under the other stages of ZeRO is compared in strategies/.
SEVERAL = [f"configs/strategy/{name}.yaml" for name in ("ddp", "fsdp2", "deepspeed_zero3")]
PROCESSES = {name: 2 if name in SEVERAL else 1 for name in STRATEGIES}
CLASSES = dict.fromkeys(STRATEGIES, "CPUZeroStrategy") | {
    SINGLE: "SingleDeviceStrategy",
    "configs/strategy/ddp.yaml": "DDPStrategy",
    "configs/strategy/fsdp2.yaml": "FSDP2Strategy",
}
PARTS = [name for name in STRATEGIES if CLASSES[name] in ("FSDP2Strategy", "CPUZeroStrategy")]
ROWS = 4  # of a micro-batch of all processes together
TOLD = "lightning.pytorch.utilities.rank_zero"


# --- parsed --------------------------------------------------------------------------------------


class PreparedCLI(RecipeCLI):
    """Builds the parser once for all: that takes longer than to train two steps."""

    kept: ClassVar[dict[str, Any]] = {}

    def setup_parser(self, *arguments):
        if not self.kept:
            super().setup_parser(*arguments)
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            self.kept.update({name: self.__dict__[name] for name in names})
        self.__dict__ |= self.kept


def words(*names):
    return [word for name in names for word in ("--config", str(find_config(name)))]


@pytest.fixture(scope="module")
def parse():
    """Return the function that gives the options of `fit` under some configurations, flat."""

    @cache
    def parsed(*names):
        config = PreparedCLI(["fit", *words(*names)], build=False).config.fit
        del config["config"]
        return dict(flat(config.as_dict()))

    return parsed


def flat(tree, path=""):
    """Yield (path, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict | Namespace) and value:
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def said_by(*fragments) -> dict[str, Any]:
    trees = (yaml.safe_load(find_config(name).read_text()) for name in fragments)
    return {path: value for tree in trees for path, value in flat(tree)}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_fragments_change_what_they_say_alone(recipe, strategy, parse):
    # Each recipe meets each strategy and each precision; as they commute, not each pair of them.
    precision = PRECISIONS[(RECIPES.index(recipe) + STRATEGIES.index(strategy)) % len(PRECISIONS)]
    before, after = parse(recipe), parse(recipe, strategy, precision)
    said = said_by(strategy, precision)
    assert {path: after[path] for path in said} == said
    # A class brings the defaults of its other arguments along.
    subtrees = tuple({re.split(r"\.(class_path|init_args)", path)[0] for path in said})
    kept = {path: value for path, value in before.items() if not path.startswith(subtrees)}
    assert kept == {path: value for path, value in after.items() if not path.startswith(subtrees)}
    assert len(before) - len(kept) in (2, 4)  # strategy and precision; devices and nodes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_and_precisions_commute(strategy, parse):
    recipe = RECIPES[0]
    precision = PRECISIONS[STRATEGIES.index(strategy) % len(PRECISIONS)]
    assert parse(recipe, strategy, precision) == parse(recipe, precision, strategy)
    assert all(said_by(strategy).keys().isdisjoint(said_by(name)) for name in PRECISIONS)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweeps_cells_are_fits_of_its_recipe(name, parse, tmp_path):
    sweep = read_sweep(find_config(name))
    assert sweep.title
    assert set(sweep.figures.values()) <= set(KINDS)
    assert set(sweep.claims) <= set(CLAIMS)
    options = tmp_path / "options.yaml"
    options.write_text(yaml.safe_dump(sweep.options))
    base = ["fit", *words(*sweep.base), "--config", str(options)]
    cells = list(corners(sweep.cells()))
    for cell in {cells[0].name: cells[0], cells[-1].name: cells[-1]}.values():
        config = PreparedCLI([*base, *cell.arguments()], build=False).config.fit
        rate = cell.values.get("rate", config.model.optimizer.init_args.lr)
        assert config.model.optimizer.init_args.lr == rate
        adapter = config.model.adapter
        for axis in {"rank", "scaling", "init"} & cell.values.keys():
            assert adapter[axis] == cell.values[axis]


# --- trained -------------------------------------------------------------------------------------


class Record(Callback):
    """Write what a run did on each process."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, *_):
        if len(self.losses) < trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer, module):
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        record = {
            "steps": trainer.global_step,
            "losses": self.losses,
            "strategy": type(trainer.strategy).__name__,
            "precision": trainer.precision,
            "trained": {name: whole_tensor(p).clone() for name, p in trained.items()},
            "dtypes": {p.dtype for p in trained.values()},
            "states": set(dtypes_of_state(trainer.optimizers)),
            "maps": [repr(x) for x in linear_maps(module)],
        }
        torch.save(record, f"record-{trainer.global_rank}.pt")


def dtypes_of_state(optimizers):
    """Yield the dtypes of what optimizers keep for each entry."""
    for optimizer in optimizers:
        for state in getattr(optimizer, "optimizer", optimizer).state.values():
            yield from (x.dtype for name, x in state.items() if name != "step")


class Run(NamedTuple):
    """A recipe, fragments beside that of the strategy, and what else differs."""

    recipe: str
    fragments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class Left(NamedTuple):
    """What a run left behind."""

    codes: list[int]
    folder: Path

    def records(self) -> list[dict[str, Any]]:
        """Return what each process wrote; all must have ended well."""
        assert set(self.codes) == {0}
        paths = sorted(self.folder.glob("record-*.pt"))
        assert len(paths) == len(self.codes)
        return [torch.load(path, weights_only=False) for path in paths]

    @property
    def run_folder(self) -> Path:
        (folder,) = self.folder.glob("runs/*/version_0")
        return folder

    def tags(self) -> set[str]:
        events = EventAccumulator(str(self.run_folder))
        events.Reload()
        return set(events.Tags()["scalars"])

    def merged(self) -> dict[str, torch.Tensor]:
        return load_file(self.run_folder / "merged" / "model.safetensors")

    def said(self) -> list[str]:
        """Return the lines at the start whose numbers are of the model alone."""
        lines = (self.folder / "said-0.txt").read_text().splitlines()
        return [line for line in lines if line.startswith(("  base ", "  train ", "  adapters "))]


def fit(run: Run, strategy, folder, tiny, processes, rank):
    """Run a recipe in this process, one of several, as the command line would."""
    os.chdir(folder)
    options = [
        *tiny(run.recipe),
        "--model.max_new_tokens=4",
        f"--data.batch_size={ROWS // processes}",
        "--throughput.every_n_steps=1",
        "--trainer.max_epochs=-1",
        "--trainer.limit_val_batches=1",
        "--trainer.callbacks+=test_fragments.Record",
        *run.options,
    ]
    if run.recipe not in MERGING:
        options.append("--merge_adapters=null")
    configs = words(run.recipe, strategy, *run.fragments, "configs/debug/two_steps.yaml")
    logger, handler = logging.getLogger(TOLD), logging.FileHandler(f"said-{rank}.txt")
    logger.addHandler(handler)
    try:
        PreparedCLI(["fit", *configs, *options])
    except UserError as error:
        Path(f"refusal-{rank}.txt").write_text(str(error))
    logger.removeHandler(handler)


def on_cpu(fragment, folder) -> str:
    """Return a fragment that runs here: Lightning and DeepSpeed refuse the CPU."""
    text = find_config(fragment).read_text()
    if "ZeroStrategy" not in text:
        return fragment
    pytest.importorskip("deepspeed_cpu")
    path = folder / Path(fragment).name
    path.write_text(text.replace("rslightning.strategies.Zero", "deepspeed_cpu.CPUZero"))
    return str(path)


ADAMW = ("--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3")
RUNS = [
    *(Run(name) for name in TRAINED),
    *(Run(name, options=ADAMW) for name in ADAFACTOR),
    Run(QUICKSTART, (BF16_TRUE,), ("--trainer.max_steps=8",)),
]


@pytest.fixture(scope="module")
def train(parse, model_folder, orca_folder, gsm8k_folder, tmp_path_factory, run_processes):
    """Return the function that makes all runs with a fragment, in the same processes."""
    tiny = stand_ins(tmp_path_factory.mktemp("tiny"), model_folder, orca_folder, gsm8k_folder)
    parse(QUICKSTART)  # the parser is built here, for all processes

    @cache
    def trained(fragment) -> dict[Run, Left]:
        root = tmp_path_factory.mktemp(Path(fragment).stem)
        processes, mine = PROCESSES.get(fragment, 1), on_cpu(fragment, root)
        folders = {run: root / str(number) for number, run in enumerate(RUNS)}
        for folder in folders.values():
            folder.mkdir()

        def train_all(rank):
            warnings.simplefilter("ignore")
            for run, folder in folders.items():
                fit(run, mine, folder, tiny, processes, rank)

        codes = run_processes(processes, train_all)
        return {run: Left(codes, folder) for run, folder in folders.items()}

    return trained


def update(record, recipe, model_folder) -> torch.Tensor:
    """Return what training added to B, which was zero, or to all weights, as one vector."""
    trained = record["trained"]
    if recipe == "recipes/quickstart_base.yaml":
        base = load_file(model_folder / "model.safetensors")
        moved = [trained[f"model.{name}"] - base[name] for name in base]
    else:
        moved = [value for name, value in trained.items() if name.endswith("lora_b")]
    return torch.cat([value.double().flatten() for value in moved])


def assert_agrees(left, single, recipe, model_folder, loss_tolerance, update_tolerance):
    """Compare with a run on one process, which saw the same rows in each step."""
    (truth,) = single.records()
    expected = update(truth, recipe, model_folder)
    assert expected.norm() > 1e-6  # Adafactor's first steps from zero are that small
    for record in left.records():
        assert record["losses"] == pytest.approx(truth["losses"], abs=loss_tolerance)
        assert record["maps"] == truth["maps"]
    found = update(left.records()[0], recipe, model_folder)
    assert (found - expected).norm() < update_tolerance * expected.norm()
    assert left.tags() == single.tags()
    assert left.said() == single.said()
    assert len(left.said()) == 3


@pytest.mark.parametrize("fragment", STRATEGIES)
@pytest.mark.parametrize("recipe", TRAINED)
def test_a_recipe_trains_under_every_strategy(recipe, fragment, train, model_folder):
    run = Run(recipe, options=ADAMW) if fragment in PARTS and recipe in ADAFACTOR else Run(recipe)
    left, single = train(fragment)[run], train(SINGLE)[run]
    precision = read(recipe)["trainer"].get("precision", "32-true")
    for record in left.records():
        assert (record["steps"], len(record["losses"])) == (2, 2)
        assert all(map(math.isfinite, record["losses"]))
        assert (record["strategy"], record["precision"]) == (CLASSES[fragment], precision)
    tolerances = (1e-5, 1e-4) if precision == "32-true" else (1e-3, 0.1)
    assert_agrees(left, single, recipe, model_folder, *tolerances)


@pytest.mark.parametrize("fragment", STRATEGIES)
@pytest.mark.parametrize("recipe", MERGING)
def test_every_strategy_merges_the_same(recipe, fragment, train):
    left, single = (train(name)[Run(recipe)].merged() for name in (fragment, SINGLE))
    assert left.keys() == single.keys()
    for name, value in single.items():
        torch.testing.assert_close(left[name], value, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("fragment", PARTS)
@pytest.mark.parametrize("recipe", ADAFACTOR)
def test_adafactor_is_refused_where_it_has_no_matrices(recipe, fragment, train):
    left = train(fragment)[Run(recipe)]
    assert set(left.codes) == {0}
    for rank in range(PROCESSES[fragment]):
        message = (left.folder / f"refusal-{rank}.txt").read_text()
        assert message.startswith(f"Adafactor looks at whole matrices, and {CLASSES[fragment]} ")
    assert not list(left.folder.glob("record-*"))


@pytest.mark.parametrize("fragment", PRECISIONS)
@pytest.mark.parametrize("recipe", TRAINED)
def test_a_recipe_trains_in_every_precision(recipe, fragment, train):
    (record,) = train(fragment)[Run(recipe)].records()
    (other,) = train(SINGLE)[Run(recipe)].records()
    assert record["precision"] == said_by(fragment)["trainer.precision"]
    assert record["steps"] == 2
    dtype = torch.bfloat16 if fragment == BF16_TRUE else torch.float32
    assert record["dtypes"] == {dtype}
    # transformers' Adafactor keeps its state in float32, whatever the weights have.
    assert record["states"] == {torch.float32 if recipe in ADAFACTOR else dtype}
    assert record["losses"] == pytest.approx(other["losses"], abs=0.05)
    if record["precision"] == other["precision"]:
        assert record["losses"] == other["losses"]


@pytest.mark.parametrize("fragment", STRATEGIES)
def test_bfloat16_alone_trains_under_every_strategy(fragment, train, model_folder):
    left, single = (train(name)[RUNS[-1]] for name in (fragment, SINGLE))
    masters = torch.float32 if "Zero" in CLASSES[fragment] else torch.bfloat16
    for record in left.records():
        assert record["steps"] == 8
        assert record["dtypes"] == {torch.bfloat16}
        assert record["states"] == {masters}
        assert record["losses"][0] - record["losses"][-1] > 1.0  # nats per token
    assert_agrees(left, single, QUICKSTART, model_folder, 0.01, 0.1)
