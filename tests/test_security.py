"""Code that comes with a model runs when the user has asked for it, and never otherwise."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rslightning import hf
from rslightning.data.tokenizer import load_tokenizer
from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder
from rslightning.rslora.adapters import Adapter, LayerAdapter
from rslightning.rslora.merge_folder import merge_folder
from rslightning.rslora.spec import ResolvedAdapter

Q_PROJ = "model.layers.0.self_attn.q_proj"
NUMBERS = ResolvedAdapter(2, 3.0, "lora")
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("it_ran").touch()
Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch, model_folder):
    """A model folder with code of its own, which leaves a mark when it runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    return folder


def test_a_models_own_code_does_not_run(hostile, tmp_path):
    with pytest.raises(UserError) as caught:
        hf.load_causal_lm(hostile, torch.float32)
    assert "trust_remote_code" in str(caught.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["auto_map", "trust_remote_code"])
def test_a_configuration_cannot_turn_it_on(hostile, tmp_path, name):
    config = json.loads((hostile / "config.json").read_text())
    config["trust_remote_code"] = True
    if name == "auto_map":  # beside a type that transformers knows
        config["model_type"] = "llama"
    (hostile / "config.json").write_text(json.dumps(config))
    if name == "auto_map":
        hf.load_causal_lm(hostile, torch.float32)
    else:
        with pytest.raises(UserError):
            hf.load_causal_lm(hostile, torch.float32)
    assert not (tmp_path / "mark").exists()


def test_a_tokenizers_own_code_does_not_run(hostile, tmp_path):
    path = hostile / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    config["tokenizer_class"] = "OwnTokenizer"
    path.write_text(json.dumps(config))
    (hostile / "config.json").unlink()
    with suppress(UserError):
        load_tokenizer(str(hostile))
    assert not (tmp_path / "mark").exists()


def test_merging_takes_a_models_own_code_along_and_does_not_run_it(hostile, tmp_path):
    adapter = Adapter({Q_PROJ: LayerAdapter(torch.ones(2, 24), torch.ones(24, 2), NUMBERS)})
    (tmp_path / "merged").mkdir()
    merge_folder(ModelFolder(hostile), adapter, tmp_path / "merged")
    assert not (tmp_path / "mark").exists()
    with pytest.raises(UserError, match="trust_remote_code"):
        hf.load_causal_lm(tmp_path / "merged", torch.float32)
    before, after = (
        hf.load_causal_lm(folder, torch.float32, trust_remote_code=True).get_submodule(Q_PROJ)
        for folder in (hostile, tmp_path / "merged")
    )
    torch.testing.assert_close(after.weight, before.weight + 2 * NUMBERS.gamma)


def test_the_mark_is_left_when_it_runs(hostile, tmp_path):
    """Or the tests above would show nothing."""
    hf.load_causal_lm(hostile, torch.float32, trust_remote_code=True)
    assert (tmp_path / "mark").exists()
    assert AutoTokenizer.from_pretrained(hostile) is not None
