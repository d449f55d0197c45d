import re

import pytest

from rslightning.cli import read_config
from rslightning.errors import UserError
from rslightning.experiments.grid import AXES, Sweep, describe_cells, read_sweep
from rslightning.recipes import find_config

ADAFACTOR = {"class_path": "torch.optim.Adafactor", "init_args": {"lr": 0.01}}


def sweep(*grids):
    return Sweep("any", ["recipes/llama_gsm8k.yaml"], list(grids))


def names(*grids):
    return [cell.name for cell in sweep(*grids).cells()]


def test_cells_are_the_products_of_all_grids_in_their_order():
    assert names(
        {"scaling": ["lora", "rslora"], "rank": [4, 64]}, {"adapter": [None], "rate": [1.0e-5]}
    ) == ["lora_rank4", "lora_rank64", "rslora_rank4", "rslora_rank64", "full_rate1e-05"]


@pytest.mark.parametrize(
    ("axis", "value", "name"),
    [
        ("rate", "5e-5", "rate5e-5"),  # what YAML 1.1 takes for text
        ("model", "/some/where/tiny-llama/", "tiny-llama"),
        ("optimizer", ADAFACTOR, "adafactor"),
        ("targets", ["q_proj", "v_proj"], "targets-q_proj-v_proj"),
        ("trainer.max_steps", 7, "max_steps7"),
        ("trainer.gradient_clip_val", None, "no-gradient_clip_val"),
        ("data.packing", False, "packingFalse"),
    ],
)
def test_a_cell_is_named_by_its_values(axis, value, name):
    assert names({axis: [value]}) == [name]


def test_a_cell_that_two_grids_name_is_there_once():
    assert names({"rank": [4, 8], "seed": [0]}, {"rank": [8], "seed": [0, 1]}) == [
        "rank4_seed0",
        "rank8_seed0",
        "rank8_seed1",
    ]


def test_two_cells_of_one_name_are_refused():
    with pytest.raises(UserError, match=r"^Two cells of sweep any are called llama: "):
        names({"model": ["a/llama", "b/llama"]})


def test_every_axis_sets_what_it_says():
    """The command's own parser reads what the cells say."""
    grid = {
        "seed": [3],
        "rank": [6],
        "alpha": [2.5],
        "scaling": ["quarter_root"],
        "init": ["gaussian"],
        "targets": ["attention"],
        "rate": [0.25],
        "optimizer": [ADAFACTOR],  # after its rate in the file, before it on the command line
        "data": [{"class_path": "rslightning.data.Alpaca", "init_args": {"path": "here"}}],
        "model": ["some/model"],
    }
    (cell,) = sweep(grid).cells()
    recipe = str(find_config("recipes/llama_gsm8k.yaml"))
    config = read_config(["fit", "--config", recipe, *cell.arguments()])
    assert config["seed_everything"] == 3
    assert config["data"]["init_args"]["seed"] == 3
    assert config["data"]["class_path"] == "rslightning.data.Alpaca"
    assert config["model"]["base_model"] == "some/model"
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.Adafactor"
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.25
    adapter = config["model"]["adapter"]
    expected = {"rank": 6, "alpha": 2.5, "scaling": "quarter_root", "init": "gaussian"}
    assert expected.items() <= adapter.items()
    assert adapter["targets"] == "attention"
    assert set(AXES) - set(grid) == {"adapter"}
    (full,) = sweep({"adapter": [None]}).cells()
    assert read_config(["fit", "--config", recipe, *full.arguments()])["model"]["adapter"] is None


def test_cells_are_described_in_a_line():
    cells = sweep({"scaling": ["lora", "rslora"], "rank": [4, 64]}).cells()
    assert describe_cells(cells) == "4 cells: scaling lora, rslora; rank 4, 64"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: [", "is not YAML"),
        ("model: {}", "has no key `grids`, so it is no sweep: run a recipe with `rslightning fit`"),
        ("{grids: [{rank: [4]}]}", "base is empty"),
        ("{base: [a], grids: []}", "grids is empty"),
        ("{base: [a], grids: [{rank: 4}]}", "axis rank takes a list of values, got 4"),
        ("{base: [a], grids: [{rank: []}]}", "axis rank takes a list of values, got []"),
        ("{base: [a], grids: [rank]}", "axis rank takes a list of values, got None"),
        ("{base: a, grids: [{rank: [4]}]}", "base is a list, got 'a'"),
        ("{base: [a], options: [], grids: [{rank: [4]}]}", "options is a mapping, got []"),
        ("{base: [a], rate: low, grids: [{rank: [4]}]}", "rate must be a number, got 'low'"),
        ("{base: [a], grid: [], grids: [{rank: [4]}]}", "there is no key grid in a sweep"),
        ("{base: [a], name: ../x, grids: [{rank: [4]}]}", "name '../x' cannot be a folder's"),
    ],
)
def test_a_wrong_file_is_told_in_a_sentence(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_sweep(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_sweep_is_called_as_its_file_if_it_says_nothing_else(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("{base: [a], grids: [{rank: [4]}]}")
    assert read_sweep(path).name == "mine"
