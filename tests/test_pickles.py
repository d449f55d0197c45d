import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from rslightning.__main__ import main
from rslightning.model_folder import INDEX_FILE, WEIGHTS_FILE, ModelFolder
from rslightning.rslora.peft_format import read_adapter


class Intruder:
    """An object whose pickle makes a folder when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def old(tiny_llama, tmp_path):
    """Return a model folder as it was usual once: configuration and one pickle."""
    tiny_llama.config.save_pretrained(tmp_path / "old")
    torch.save(tiny_llama.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    return tmp_path / "old"


def convert(folder, output):
    return main(["convert", "--pickle", str(folder), "--output", str(output)])


def refused(folder, output, capsys):
    assert convert(folder, output) == 2
    assert not output.exists()
    return capsys.readouterr().err.removeprefix("rslightning: ").strip()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_model(old, tiny_llama, tmp_path, capsys):
    (old / "tokenizer.json").write_text("{}")
    assert convert(old, tmp_path / "new") == 0
    assert capsys.readouterr().out == f"Wrote model.safetensors to {tmp_path / 'new'}.\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        *("config.json", "manifest.json", "model.safetensors", "tokenizer.json")
    ]
    ModelFolder(tmp_path / "new").check_weights()
    assert_same(load_file(tmp_path / "new" / WEIGHTS_FILE), tiny_llama.state_dict())


def test_tied_weights_and_views(old, tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": whole, "b": whole, "row": whole[1], "column": whole[:, 2]}
    torch.save(tensors, old / "pytorch_model.bin")
    assert convert(old, tmp_path / "new") == 0
    assert_same(load_file(tmp_path / "new" / WEIGHTS_FILE), tensors)


def test_shards(old, tiny_llama, tmp_path):
    (old / "pytorch_model.bin").unlink()
    tensors = tiny_llama.state_dict()
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    weight_map = {name: files[number % 2] for number, name in enumerate(tensors)}
    for file in files:
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, old / file)
    index = {"metadata": {"total_size": 7}, "weight_map": weight_map}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert convert(old, tmp_path / "new") == 0
    new = ModelFolder(tmp_path / "new")
    new.check_weights()
    assert list(new.shards) == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    found = {}
    for file in new.shards:
        found |= load_file(new.path / file)
    assert_same(found, tensors)
    assert json.loads((new.path / INDEX_FILE).read_text())["metadata"] == {"total_size": 7}


def test_an_adapter(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama, LoraConfig(r=3, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").exists()
    assert convert(tmp_path / "old", tmp_path / "new") == 0
    new, plain = (read_adapter(tmp_path / name).layers for name in ("new", "plain"))
    assert new.keys() == plain.keys()
    for path, layer in plain.items():
        assert torch.equal(new[path].lora_a, layer.lora_a)
        assert torch.equal(new[path].lora_b, layer.lora_b)


def test_code_in_a_pickle_is_not_run(old, tmp_path, capsys):
    torch.save({"weight": Intruder(tmp_path / "mark")}, old / "pytorch_model.bin")
    assert refused(old, tmp_path / "new", capsys) == (
        f"{old / 'pytorch_model.bin'} cannot be opened: it holds posix.mkdir, which could run code."
    )
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"weight": torch.zeros(1), "step": 3}])
def test_what_is_no_file_of_weights(old, tmp_path, capsys, content):
    torch.save(content, old / "pytorch_model.bin")
    assert refused(old, tmp_path / "new", capsys) == (
        f"{old / 'pytorch_model.bin'} does not hold named tensors alone, so it is no file of "
        "weights."
    )


def test_a_folder_without_pickles(old, tmp_path, capsys):
    (old / "pytorch_model.bin").unlink()
    (old / "training_args.bin").write_bytes(b"not weights")
    assert refused(old, tmp_path / "new", capsys) == (
        f"{old} has no pytorch_model*.bin and no adapter_model.bin to convert."
    )
    nowhere = tmp_path / "nowhere"
    assert refused(nowhere, tmp_path / "new", capsys) == f"{nowhere} is not a folder."


def test_an_index_that_names_other_files(old, tmp_path, capsys):
    index = old / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "pytorch_model-2.bin"}}))
    assert refused(old, tmp_path / "new", capsys) == f"{index} names files that are not there."
