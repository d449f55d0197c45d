import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rslightning.errors import UserError
from rslightning.model_folder import (
    INDEX_FILE,
    WEIGHTS_FILE,
    ModelFolder,
    absolute_name,
    find_model_folder,
    read_json,
    unique_key,
)


@pytest.fixture
def copied(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def refused(act):
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_of_one_file(model_folder):
    folder = ModelFolder(model_folder)
    assert folder.config["model_type"] == "llama"
    assert folder.tensor_names == set(load_file(model_folder / WEIGHTS_FILE))
    assert list(folder.shards) == [WEIGHTS_FILE]


def test_tensors_of_several_files(sharded, tiny_llama):
    folder = ModelFolder(sharded)
    assert len(folder.shards) > 2
    assert folder.tensor_names == set(tiny_llama.state_dict())
    for file, names in folder.shards.items():
        assert set(names) == set(load_file(sharded / file))


def test_other_files_are_configuration_and_tokenizer(copied):
    (copied / "README.md").write_text("a model")
    (copied / "training_args.bin").write_bytes(b"a pickle")
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    assert [path.name for path in ModelFolder(copied).other_files()] == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_is_an_other_file_where_a_configuration_names_it(copied, name):
    (copied / "own.py").write_text("from .parts import Part")
    (copied / "parts.py").write_text("class Part: ...")
    assert "own.py" not in [path.name for path in ModelFolder(copied).other_files()]
    config = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Config"}}))
    names = [path.name for path in ModelFolder(copied).other_files()]
    assert {"own.py", "parts.py"} < set(names)


def test_code_is_fetched_with_a_model_of_the_hub(monkeypatch, copied):
    patterns = []

    def fetched(name, revision, allow_patterns):
        patterns.extend(allow_patterns)
        return str(copied)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert find_model_folder("some/model") == copied
    assert "*.py" in patterns


def test_the_index_of_shards_is_no_other_file(sharded):
    assert INDEX_FILE not in [path.name for path in ModelFolder(sharded).other_files()]


def test_a_path_that_is_no_folder(tmp_path):
    assert refused(lambda: ModelFolder(tmp_path / "x")) == f"{tmp_path / 'x'} is not a folder."


def test_a_folder_without_configuration(tmp_path):
    assert refused(lambda: ModelFolder(tmp_path)) == f"{tmp_path / 'config.json'} does not exist."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON: Expecting property name"),
        (b"[1, 2]", "holds no JSON object."),
        (b"\xff\xfe{}", "cannot be read as JSON: 'utf-8' codec"),
    ],
)
def test_a_configuration_that_is_no_object(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    assert refused(lambda: ModelFolder(tmp_path)).startswith(
        f"{tmp_path / 'config.json'} {message}"
    )


def test_a_folder_without_weights(copied):
    (copied / WEIGHTS_FILE).unlink()
    assert refused(ModelFolder(copied).check_weights) == (
        f"{copied} has no {WEIGHTS_FILE} and no {INDEX_FILE}."
    )


def test_weights_in_a_pickle_are_not_opened(copied):
    (copied / WEIGHTS_FILE).unlink()
    torch.save({"weight": torch.zeros(1)}, copied / "pytorch_model.bin")
    assert refused(ModelFolder(copied).check_weights) == (
        f"{copied} has its weights only as a pickle (pytorch_model.bin), which could run code when "
        "opened; if you trust it, write it as safetensors with rslightning convert --pickle "
        f"{copied} --output DIR."
    )


def test_truncated_weights(copied):
    path = copied / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(ModelFolder(copied).check_weights)
    assert message.startswith(f"{path} cannot be read as safetensors (")
    assert message.endswith("it is damaged or incomplete: copy or download it again.")


def test_a_shard_that_is_missing(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    assert refused(ModelFolder(sharded).check_weights) == f"{lost} does not exist."


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"weight_map": {"w": "../x.safetensors"}},
            "names '../x.safetensors', outside of its folder.",
        ),
        ({"weight_map": {"w": 7}}, "has no weight_map of file names."),
        ({"weight_map": ["w"]}, "has no weight_map of file names."),
        ({}, "has no weight_map of file names."),
    ],
)
def test_an_index_that_names_no_files(sharded, index, message):
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert refused(ModelFolder(sharded).check_weights) == f"{sharded / INDEX_FILE} {message}"


def test_a_folder_is_found_by_its_path(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder.parent)
    assert find_model_folder(str(model_folder)) == model_folder
    assert find_model_folder(model_folder.name).resolve() == model_folder
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert find_model_folder(f"~/{model_folder.name}") == model_folder


@pytest.mark.parametrize("name", ["./x", "/no/where", "a/b/c", "~/x"])
def test_a_path_that_does_not_exist(name):
    assert refused(lambda: find_model_folder(name)) == f"Base model {name} does not exist."


def test_a_hub_name_that_cannot_be_fetched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: find_model_folder("nobody/nothing")).startswith(
        "Base model nobody/nothing is no folder here and could not be fetched from the Hub: "
    )


def test_an_unknown_asset():
    assert refused(lambda: find_model_folder("asset:toy_lama")).startswith(
        "There is no asset:toy_lama; the package has "
    )


def test_read_json_gives_the_object(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "\u2603"}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"a": "\u2603"}


def test_a_key_with_or_without_its_first_segment():
    assert unique_key({"model.a.weight", "a.weight"}, "model.a.weight") == "model.a.weight"
    assert unique_key(["a.weight"], "model.a.weight") == "a.weight"
    assert unique_key(iter(["weight"]), "model.a.weight") is None


def test_a_folder_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute_name("base") == absolute_name("./base") == str(tmp_path / "base")
    for name in ("somebody/model", "asset:toy_llama", "./nowhere"):
        assert absolute_name(name) == name
