"""Every recipe and fragment parses, and trains two steps on a tiny model."""

import itertools

import pytest
import yaml

from rslightning.__main__ import main
from rslightning.recipes import find_config, packaged_names, packaged_root

RECIPES = [name for name in packaged_names() if name.startswith("recipes/")]
FRAGMENTS = [name for name in packaged_names() if name.startswith("configs/")]


def test_all_of_them_are_found():
    root = packaged_root()
    on_disk = [*(root / "recipes").rglob("*.yaml"), *(root / "configs").rglob("*.yaml")]
    assert len(on_disk) == len(packaged_names()) == 10
    assert len(RECIPES) == 5


@pytest.mark.parametrize("name", packaged_names())
def test_each_says_its_purpose_and_includes_no_other_file(name):
    text = find_config(name).read_text()
    assert text.startswith("# ")
    content = yaml.safe_load(text)
    assert "config" not in content  # it would silently reset the keys beside it
    if name in FRAGMENTS:
        assert len(content) == 1  # one subtree


@pytest.fixture
def tiny(tmp_path, model_folder, orca_folder, gsm8k_folder, monkeypatch):
    """Return the options that put the tiny model and data in the place of a recipe's."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "lines.txt"
    text.write_text("A line of text.\n" * 40)
    folders = {"OpenOrca": orca_folder, "GSM8K": gsm8k_folder, "PlainText": text}

    def options(recipe):
        data = yaml.safe_load(find_config(recipe).read_text())["data"]["class_path"]
        path = folders[data.rpartition(".")[2]]
        return [
            f"--model.base_model={model_folder}",
            "--model.pretrained=true",
            f"--data.path={path}",
            "--data.max_length=128",
            "--data.held_out_examples=5",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]

    return options


@pytest.mark.filterwarnings("ignore:Rounding to bfloat16 lost")  # of two steps' tiny updates
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_two_steps(recipe, tiny, tmp_path):
    fragment = ["--config", "configs/debug/two_steps.yaml"]
    assert main(["fit", "--config", recipe, *fragment, *tiny(recipe)]) == 0
    (run,) = (tmp_path / "runs").glob("*/version_0")
    assert (run / "merged" / "model.safetensors").exists()
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_fragment_parses_with_every_recipe(fragment, capsys):
    for recipe in RECIPES:
        if "ablation" in fragment and "adapter: null" in find_config(recipe).read_text():
            continue  # nothing to ablate
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", recipe, "--config", fragment, "--print_config"])
        assert ended.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        (subtree,) = yaml.safe_load(find_config(fragment).read_text()).items()
        assert is_within(subtree[1], config[subtree[0]])


def is_within(part, whole) -> bool:
    if isinstance(part, dict):
        return all(is_within(value, whole[key]) for key, value in part.items())
    return part == whole


def test_fragments_of_different_groups_commute(capsys):
    outputs = set()
    for order in itertools.permutations(
        [
            "configs/ablation/lora.yaml",
            "configs/precision/fp32.yaml",
            "configs/debug/two_steps.yaml",
        ]
    ):
        options = [word for name in order for word in ("--config", name)]
        with pytest.raises(SystemExit):
            main(["fit", "--config", "recipes/quickstart.yaml", *options, "--print_config"])
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1
