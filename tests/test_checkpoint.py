import json
import os
import pickle
import re
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rslightning.checkpoint import load_adapter, read_checkpoint
from rslightning.checkpoint_folder import point_last, step_name
from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder
from rslightning.rslora import AdapterSpec, adapter_layers, adapter_parameters
from rslightning.rslora.merge_folder import merge_folder


def refused(path):
    with pytest.raises(UserError) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def last(fitted_run, tmp_path):
    """A copy of the run's last checkpoint."""
    return Path(shutil.copy(fitted_run.folder / "checkpoints/last.ckpt", tmp_path))


def changed(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("place", ["checkpoints/last.ckpt", "checkpoints", "adapter", "."])
def test_the_adapter_of_whatever_a_run_left(fitted_run, place):
    adapter = load_adapter(str(fitted_run.folder / place))
    layers = dict(adapter_layers(fitted_run.module.model))
    assert set(adapter.layers) == set(layers)
    assert len(layers) == 14
    for path, layer in layers.items():
        assert torch.equal(adapter.layers[path].lora_a, layer.lora_a)
        assert torch.equal(adapter.layers[path].lora_b, layer.lora_b)
        assert adapter.layers[path].numbers == layer.adapter
    assert adapter.base_model == fitted_run.module.base_model
    assert adapter.dropout == 0.0


@pytest.fixture
def run(fitted_run, tmp_path):
    """A copy of the run: `adapter/` of step 5, checkpoints of steps 4 and 5."""
    return shutil.copytree(fitted_run.folder, tmp_path / "run", symlinks=True)


def go_on(run: Path, step: int, seconds: float = 1.0) -> None:
    """Leave the checkpoint of a step with B all ones, saved so long after the adapter."""

    def train(content):
        for name, tensor in content["state_dict"].items():
            content["state_dict"][name] = torch.ones_like(tensor) if "lora_b" in name else tensor

    path = run / "checkpoints" / step_name(step)
    content = torch.load(run / "checkpoints/step-5.ckpt", weights_only=True)
    train(content)
    torch.save(content, path)
    at = (run / "adapter/adapter_config.json").stat().st_mtime + seconds
    os.utime(path, (at, at))
    point_last(run / "checkpoints", step)


def has_gone_on(run: Path) -> bool:
    layers = load_adapter(run).layers.values()
    (ones,) = {bool((layer.lora_b == 1).all()) for layer in layers}
    return ones


def test_a_run_folder_is_its_newest_state(run):
    assert not has_gone_on(run)
    go_on(run, 30)
    assert has_gone_on(run)


def test_a_run_folder_whose_copy_has_other_times(run):
    go_on(run, 30, seconds=-100)
    assert has_gone_on(run)


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_that_went_back_to_an_earlier_step(run, step):
    go_on(run, step)
    assert has_gone_on(run)


def test_a_run_whose_final_state_is_in_no_checkpoint(run):
    go_on(run, 3, seconds=-100)
    assert not has_gone_on(run)


@pytest.mark.parametrize("seconds", [-100, 100])
def test_an_adapter_that_does_not_say_its_step(run, seconds):
    manifest = run / "adapter/manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("step") == 5
    manifest.write_text(json.dumps(content))
    go_on(run, 30, seconds)
    assert has_gone_on(run) is (seconds > 0)


def test_a_run_folder_without_an_adapter(run):
    go_on(run, 30)
    shutil.rmtree(run / "adapter")
    assert has_gone_on(run)


def test_a_damaged_newest_state_is_told(run):
    go_on(run, 30)
    go_on(run, 31)
    path = run / "checkpoints/step-31.ckpt"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.warns(UserWarning, match=r"step-31\.ckpt is not whole .*: taking step-30\.ckpt\."):
        assert has_gone_on(run)
    (run / "checkpoints/step-30.ckpt").unlink()
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    assert refused(run).startswith("No checkpoint can be gone on from: ")


def test_patterns_of_a_checkpoint_are_resolved_per_layer(last):
    spec = AdapterSpec(rank=3, alpha=5.0, alpha_pattern={"q_proj": 7.0}, dropout=0.1)
    changed(last, lambda content: content["hyper_parameters"].update(adapter=asdict(spec)))
    adapter = load_adapter(last)
    alphas = {path.rpartition(".")[2]: x.numbers.alpha for path, x in adapter.layers.items()}
    assert alphas.pop("q_proj") == 7.0
    assert set(alphas.values()) == {5.0}
    assert adapter.dropout == 0.1


def test_nothing_at_the_path(tmp_path):
    assert refused(tmp_path / "x") == f"{tmp_path / 'x'} does not exist."


def test_a_folder_of_something_else(tmp_path):
    assert refused(tmp_path) == (
        f"{tmp_path} is neither a checkpoint nor a folder with adapter_config.json, adapter/ or "
        "checkpoints/ in it."
    )


class Intruder:
    """An object whose pickle makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    mark, path = tmp_path / "the code ran", tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Intruder(mark)}, path)
    message = (
        re.escape(f"{path} cannot be opened: it holds ") + r"\w+\.mkdir, which could run code\."
    )
    assert re.fullmatch(message, refused(path))
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the trap works


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    mark, path = tmp_path / "the code ran", tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Intruder(mark)}))
    assert refused(path) == f"{path} is damaged, incomplete or no checkpoint."
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint(last, share):
    content = last.read_bytes()
    last.write_bytes(content[: int(share * len(content))])
    assert refused(last) == f"{last} is damaged, incomplete or no checkpoint."


def test_a_damaged_checkpoint(last):
    content = bytearray(last.read_bytes())
    start = content.index(b"data.pkl") + 60
    content[start : start + 400] = bytes(reversed(range(200))) * 2
    last.write_bytes(content)
    assert refused(last).startswith(f"{last} cannot be opened: ")


@pytest.mark.parametrize("content", [b"a text file\n", b"\x80\x04}.", b"PK\x03\x04 no archive"])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert refused(path) == f"{path} is damaged, incomplete or no checkpoint."


def test_an_archive_of_another_kind(tmp_path):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")
    assert refused(path).startswith(f"{path} cannot be opened: ")


@pytest.mark.parametrize("content", [[1, 2], {"weight": torch.zeros(1)}, {"state_dict": 3}])
def test_a_checkpoint_of_another_program(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert refused(tmp_path / "x.pt") == (
        f"{tmp_path / 'x.pt'} holds no state_dict: it is no Lightning checkpoint."
    )


@pytest.mark.parametrize("hparams", [None, {}, {"adapter": None}, {"adapter": {"r": 8}}])
def test_a_checkpoint_without_adapter(last, hparams):
    changed(last, lambda content: content.update(hyper_parameters=hparams))
    assert refused(last) == (
        f"{last} has no adapter: it is from full fine-tuning or another program. The merged/ "
        "folder of a full fine-tuning run is the model itself."
    )


def test_a_matrix_that_is_missing(last):
    name = "model.model.layers.1.mlp.up_proj.lora_b"
    changed(last, lambda content: content["state_dict"].pop(name))
    assert refused(last) == (
        f"{last}: model.layers.1.mlp.up_proj has lora_a in place of lora_a and lora_b."
    )


def test_a_checkpoint_without_matrices(last):
    changed(last, lambda content: content.update(state_dict={}))
    assert refused(last) == f"{last} holds no adapter matrices."


def test_a_rank_that_contradicts_the_matrices(last):
    changed(last, lambda content: content["hyper_parameters"]["adapter"].update(rank=4))
    assert refused(last) == (
        f"{last}: model.layers.0.self_attn.q_proj has matrices of shape [3, 24] and [24, 3], which "
        "are not of the rank 4 in its hyperparameters."
    )


def test_square_transposed_weights_merge_the_right_way_round(tmp_path, make_module):
    config = GPT2Config(vocab_size=53, n_embd=24, n_layer=1, n_head=4, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    module = make_module(tmp_path / "gpt2")
    module.configure_model()
    for parameter in adapter_parameters(module.model).values():
        torch.nn.init.normal_(parameter)
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    (tmp_path / "merged").mkdir()
    adapter = load_adapter(tmp_path / "x.ckpt")
    merge_folder(ModelFolder(tmp_path / "gpt2"), adapter, tmp_path / "merged")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = module.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


def test_read_checkpoint_gives_everything(fitted_run):
    content = read_checkpoint(fitted_run.folder / "checkpoints/last.ckpt")
    assert content["global_step"] == 5
    assert content["hyper_parameters"]["adapter"]["rank"] == 3
