"""Recipes and fragments, one by one; `test_fragments.py` crosses them, and trains all recipes."""

import itertools
import json

import pytest
import yaml
from tiny_recipes import OTHERS, RECIPES, SWEEPS, read, stand_ins

from rslightning.__main__ import main
from rslightning.recipes import find_config, packaged_names, packaged_root

FRAGMENTS = [name for name in packaged_names() if name.startswith("configs/")]


def test_all_of_them_are_found():
    root = packaged_root()
    on_disk = [*(root / "recipes").rglob("*.yaml"), *(root / "configs").rglob("*.yaml")]
    names = sorted(path.relative_to(root).as_posix() for path in on_disk)
    assert names == sorted(packaged_names())
    assert len(RECIPES) == 10
    assert len(SWEEPS) == 18
    groups = {name.split("/")[1] for name in FRAGMENTS}
    assert groups == {"ablation", "debug", "precision", "quantization", "strategy"}
    assert len(FRAGMENTS) >= 2 * len(groups) - 1


@pytest.mark.parametrize("name", packaged_names())
def test_each_says_its_purpose_and_includes_no_other_file(name):
    text = find_config(name).read_text()
    assert text.startswith("# ")
    content = yaml.safe_load(text)
    assert "config" not in content  # it would silently reset the keys beside it
    if name in FRAGMENTS:
        assert len(content) == 1  # one subtree


@pytest.fixture(scope="module")
def options(tmp_path_factory, model_folder, orca_folder, gsm8k_folder):
    return stand_ins(tmp_path_factory.mktemp("tiny"), model_folder, orca_folder, gsm8k_folder)


@pytest.fixture
def tiny(tmp_path, options, monkeypatch):
    """Return the options that put the tiny model and data in the place of a recipe's."""
    monkeypatch.chdir(tmp_path)
    return options


def test_every_base_that_is_no_llama_has_its_own_tiny_model():
    bases = {read(recipe)["model"]["base_model"] for recipe in RECIPES}
    assert OTHERS.keys() < bases
    assert all("llama" in base.lower() for base in bases - OTHERS.keys())


@pytest.mark.filterwarnings("ignore:Rounding to bfloat16 lost")  # of two steps' tiny updates
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("recipe", ["recipes/quickstart.yaml", "recipes/llama_gsm8k_paper.yaml"])
def test_a_recipe_trains_two_steps(recipe, tiny, tmp_path):
    fragment = ["--config", "configs/debug/two_steps.yaml"]
    assert main(["fit", "--config", recipe, *fragment, *tiny(recipe)]) == 0
    (run,) = (tmp_path / "runs").glob("*/version_0")
    merges = read(recipe).get("merge_adapters", {}) is not None
    assert (run / "merged" / "model.safetensors").exists() == merges
    assert (run / "config.yaml").exists()


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.endswith("gsm8k.yaml")])
def test_answers_to_gsm8k_have_room_and_are_scored(recipe, tiny, tmp_path):
    assert read(recipe)["model"]["max_new_tokens"] >= 300
    options = [*tiny(recipe), "--model.max_new_tokens=5"]
    assert main(["test", "--config", recipe, *options]) == 0
    (run,) = (tmp_path / "runs").glob("*/version_0")
    lines = (run / "test_answers.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [
        {"prompt", "answer", "reference", "right"}
    ] * 5


def test_the_chat_recipe_skips_what_its_template_refuses(tiny, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    recipe = "recipes/mistral_chat.yaml"
    fragment = ["--config", "configs/debug/two_steps.yaml", "--merge_adapters=null"]
    assert main(["fit", "--config", recipe, *fragment, *tiny(recipe)]) == 0
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("data: ")]
    skipped = [int(message.split(" bad rows skipped")[0].split()[-1]) for message in said]
    assert sum(skipped) == 8  # every fifth of 40


def test_the_baseline_differs_in_its_scaling_alone():
    ours, baseline = (read(f"recipes/llama2_openorca{end}.yaml") for end in ("", "_lora"))
    assert (ours["model"]["adapter"].pop("scaling"), ours["trainer"].pop("logger")) != (None, None)
    assert baseline["model"]["adapter"].pop("scaling") == "lora"
    assert baseline["trainer"].pop("logger")["init_args"]["name"] == "llama2_openorca_lora"
    assert ours == baseline


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_last_held_out_loss_is_that_of_the_end(recipe):
    """Where validation is counted in batches, and their number is known: not of packed passes."""
    content = read(recipe)
    trainer, data = content["trainer"], content["data"]["init_args"]
    every = trainer.get("val_check_interval")
    if "max_steps" in trainer:
        batches = trainer["max_steps"] * trainer.get("accumulate_grad_batches", 1)
    else:
        batches = None if data["packing"] else data.get("num_examples", 0) // data["batch_size"]
    assert every is None or batches is None or batches % every == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_logged_under_its_recipe_s_name(recipe):
    name = read(recipe)["trainer"]["logger"]["init_args"]["name"]
    assert recipe == f"recipes/{name}.yaml"


# Those of strategies and precisions are trained with, in test_fragments.py.
@pytest.mark.parametrize(
    "fragment",
    [name for name in FRAGMENTS if "/strategy/" not in name and "/precision/" not in name],
)
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
