import copy
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rslightning.errors import UserError
from rslightning.manifest import MANIFEST_FILE
from rslightning.rslora.adapters import (
    Adapter,
    LayerAdapter,
    attach_adapter,
    collect_adapter,
    copy_adapter,
)
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.merge import merge_adapters, unwrap_adapters
from rslightning.rslora.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_config,
    read_adapter,
    write_adapter,
)
from rslightning.rslora.scaling import RANK_EXPONENT
from rslightning.rslora.spec import AdapterSpec, ResolvedAdapter

# PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

IDS = torch.arange(10).reshape(2, 5)
PATTERNS = {
    "none": {},
    "rank": {"rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 7}},
    "alpha": {"alpha_pattern": {r".*layers\.0\..*": 2.5, "layers.1.mlp.up_proj": 3}},
    "both": {
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {r".*layers\.0\..*": 2.5, "v_proj": 2.5},
    },
}


def randomize(model, names=("lora_b",)):
    """Give every adapter matrix of these names, ours or PEFT's, random entries."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.normal_(std=0.1, generator=generator)
    return model


def adapted(model, **fields):
    inject_adapters(model, AdapterSpec(**{"rank": 3, **fields}))
    return randomize(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("scaling", RANK_EXPONENT)
def test_peft_computes_the_same_function(tiny_llama, tmp_path, scaling, patterns):
    base = copy.deepcopy(tiny_llama)
    plain = logits(tiny_llama)
    adapted(tiny_llama, scaling=scaling, **PATTERNS[patterns])
    write_adapter(collect_adapter(tiny_llama), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = logits(tiny_llama)
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(theirs), ours, rtol=0, atol=1e-5)


class Nested(nn.Module):
    """A model where the path of one module is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(7, 11)
        self.encoder = nn.ModuleDict({"proj": nn.Linear(11, 5)})
        self.encoder["encoder"] = nn.ModuleDict({"proj": nn.Linear(5, 3)})

    def forward(self, x):
        return self.encoder["encoder"]["proj"](self.encoder["proj"](self.proj(x)))


@pytest.mark.parametrize("scaling", RANK_EXPONENT)
@pytest.mark.parametrize("special", ["proj", "encoder.proj", "encoder.encoder.proj"])
def test_a_pattern_whose_path_ends_another_one(tmp_path, scaling, special):
    model, base = Nested(), Nested()
    only = {f"^{special}": 4}
    adapted(model, scaling=scaling, rank=2, rank_pattern=only, alpha_pattern=only)
    assert {p: x.rank for p, x in adapter_layers(model)} == {
        path: 4 if path == special else 2
        for path in ("proj", "encoder.proj", "encoder.encoder.proj")
    }
    write_adapter(collect_adapter(model), tmp_path / "adapter")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    config.task_type = None  # PEFT wants a generating model for CAUSAL_LM
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    x = torch.randn(6, 7)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", RANK_EXPONENT)
def test_peft_computes_the_same_function_on_conv1d(tmp_path, scaling, make_gpt2):
    model, base = make_gpt2(), make_gpt2()
    adapted(model, scaling=scaling, rank_pattern={"c_attn": 5})
    write_adapter(collect_adapter(model), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", RANK_EXPONENT)
def test_folding_leaves_nothing_to_scale(tiny_llama, tmp_path, scaling):
    base = copy.deepcopy(tiny_llama)
    adapted(tiny_llama, scaling=scaling, **PATTERNS["both"])
    write_adapter(collect_adapter(tiny_llama), tmp_path / "adapter", fold_scaling=True)
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == config["r"] == 3
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert Counter(config["rank_pattern"].values()) == {5: 2, 7: 1}
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(tiny_llama), rtol=0, atol=1e-5)
    # A server that knows neither rsLoRA nor alpha adds B A.
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    for path, layer in adapter_layers(tiny_llama):
        key = f"base_model.model.{path}.lora_{{}}.weight"
        product = tensors[key.format("B")] @ tensors[key.format("A")]
        torch.testing.assert_close(product, layer.gamma * layer.lora_b @ layer.lora_a)


@pytest.mark.parametrize("std", [0.1, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folding_rounds_no_matrix_of_16_bit(tmp_path, dtype, std):
    lora_a, lora_b = torch.randn(48, 7).to(dtype), (torch.randn(5, 48) * std).to(dtype)
    layer = LayerAdapter(lora_a, lora_b, ResolvedAdapter(48, 10.0, "rslora"))
    write_adapter(Adapter({"x.q": layer}), tmp_path / "adapter", fold_scaling=True)
    again = read_adapter(tmp_path / "adapter").layers["x.q"]
    assert again.numbers.gamma == 1.0
    exact = layer.numbers.gamma * lora_b.double() @ lora_a.double()
    error = again.lora_b.double() @ again.lora_a.double() - exact
    assert error.norm() <= 2**-22 * exact.norm()
    assert torch.equal(again.lora_a, lora_a)


PEFT_CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 7, "model.layers.1.mlp.up_proj": 2},
        "alpha_pattern": {r"^model\.layers\.0\..*": 5},
    },
    # PEFT takes the first key that matches; its file has them sorted.
    "overlap": {"use_rslora": True, "rank_pattern": {"layers.0.*": 2, "q_proj": 7}},
}


@pytest.mark.parametrize("options", PEFT_CONFIGS)
def test_an_adapter_of_peft_opens_here(tiny_llama, tmp_path, options):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=0.25, **PEFT_CONFIGS[options]
    )
    theirs = get_peft_model(copy.deepcopy(tiny_llama), config)
    randomize(theirs, ("lora_A", "lora_B")).save_pretrained(tmp_path)

    adapter = read_adapter(tmp_path)
    assert adapter.dropout == 0.25
    attach_adapter(tiny_llama, adapter)
    reference = logits(theirs)
    torch.testing.assert_close(logits(tiny_llama), reference, rtol=0, atol=1e-5)
    assert {n for n, p in tiny_llama.named_parameters() if p.requires_grad} == {
        f"{path}.lora_{matrix}" for path in adapter.layers for matrix in "ab"
    }

    merge_adapters(tiny_llama)
    ours = unwrap_adapters(tiny_llama).state_dict()
    truth = theirs.merge_and_unload().state_dict()
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


def test_an_adapter_of_peft_on_conv1d_opens_here(tmp_path, make_gpt2):
    targets = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(
        r=4,
        target_modules=targets,
        fan_in_fan_out=True,
        use_rslora=True,
        rank_pattern={"c_attn": 9},
        task_type="CAUSAL_LM",
    )
    theirs = randomize(get_peft_model(make_gpt2(), config), ("lora_A", "lora_B"))
    theirs.save_pretrained(tmp_path)

    model = make_gpt2()
    adapter = read_adapter(tmp_path)
    assert len(adapter.layers) == 8
    assert all(layer.transposed for layer in adapter.layers.values())
    attach_adapter(model, adapter)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    merge_adapters(model)
    ours, truth = unwrap_adapters(model).state_dict(), theirs.merge_and_unload().state_dict()
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("scaling", RANK_EXPONENT)
def test_round_trip(tiny_llama, tmp_path, scaling, patterns):
    adapted(tiny_llama, scaling=scaling, dropout=0.125, **PATTERNS[patterns])
    adapter = collect_adapter(tiny_llama, "some/base")
    write_adapter(adapter, tmp_path / "adapter")
    again = read_adapter(tmp_path / "adapter")
    assert (again.base_model, again.dropout) == ("some/base", 0.125)
    assert again.layers.keys() == adapter.layers.keys()
    for path, layer in adapter.layers.items():
        assert torch.equal(again.layers[path].lora_a, layer.lora_a)
        assert torch.equal(again.layers[path].lora_b, layer.lora_b)
        assert again.layers[path].numbers.rank == layer.numbers.rank
        assert again.layers[path].numbers.gamma == pytest.approx(layer.numbers.gamma, rel=1e-15)
        if scaling in ("lora", "rslora"):
            assert again.layers[path].numbers == layer.numbers


@pytest.mark.parametrize("rank", [3, 5, 12])
@pytest.mark.parametrize("scaling", RANK_EXPONENT)
def test_what_was_written_is_taken_back(tiny_llama, tmp_path, scaling, rank):
    """Through an alpha of another scaling, gamma may come back with another last bit."""
    fields = {"scaling": scaling, "alpha": 10.0, "rank": rank}
    fresh = copy.deepcopy(tiny_llama)
    adapter = collect_adapter(adapted(tiny_llama, **fields))
    write_adapter(adapter, tmp_path / "adapter")
    inject_adapters(fresh, AdapterSpec(**fields))
    copy_adapter(fresh, read_adapter(tmp_path / "adapter"))
    assert torch.equal(logits(fresh), logits(tiny_llama))
    other = copy.deepcopy(adapter)
    path = next(iter(other.layers))
    numbers = replace(other.layers[path].numbers, alpha=10.001)
    other.layers[path] = replace(other.layers[path], numbers=numbers)
    with pytest.raises(UserError, match="give both the same rank, alpha and scaling"):
        copy_adapter(fresh, other)


def test_round_trip_through_peft(tiny_llama, tmp_path):
    base = copy.deepcopy(tiny_llama)
    adapter = collect_adapter(adapted(tiny_llama, **PATTERNS["both"]))
    write_adapter(adapter, tmp_path / "ours")
    PeftModel.from_pretrained(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = read_adapter(tmp_path / "theirs")
    assert again.layers.keys() == adapter.layers.keys()
    for path, layer in adapter.layers.items():
        assert torch.equal(again.layers[path].lora_a, layer.lora_a)
        assert torch.equal(again.layers[path].lora_b, layer.lora_b)
        assert again.layers[path].numbers == layer.numbers


def test_layout_of_the_folder(tiny_llama, tmp_path):
    adapted(tiny_llama, targets=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5})
    write_adapter(collect_adapter(tiny_llama, "some/base"), tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert list(config) == sorted(config)
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 16.0, True)
    assert config["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 5}
    assert config["alpha_pattern"] == {}
    with safe_open(tmp_path / "adapter" / WEIGHTS_FILE, "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        assert {key: tensors.get_slice(key).get_shape() for key in tensors.keys()} == {  # noqa: SIM118
            prefix.format(0, "A"): [3, 24],
            prefix.format(0, "B"): [24, 3],
            prefix.format(1, "A"): [5, 24],
            prefix.format(1, "B"): [24, 5],
        }


def test_a_scaling_that_peft_does_not_know_becomes_an_alpha(tiny_llama):
    adapter = collect_adapter(adapted(tiny_llama, rank=16, alpha=12.0, scaling="quarter_root"))
    config = adapter_config(adapter)
    # gamma = 12 / 16^(1/4) = 6 = 96 / 16
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (False, 96.0, 16)


def test_a_folder_gives_way_only_when_told(tiny_llama, tmp_path):
    adapter = collect_adapter(adapted(tiny_llama))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        write_adapter(adapter, tmp_path)
    assert str(error.value) == (
        f"{tmp_path} exists and is not empty; choose another folder or remove it."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write_adapter(adapter, tmp_path, replace=True)
    assert read_adapter(tmp_path).layers.keys() == adapter.layers.keys()
    assert not (tmp_path / "notes.txt").exists()


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """Return a sound adapter folder as another program writes it, to be damaged."""
    write_adapter(collect_adapter(adapted(tiny_llama, targets=["v_proj"])), tmp_path / "adapter")
    (tmp_path / "adapter" / MANIFEST_FILE).unlink()
    return tmp_path / "adapter"


def refusal(folder):
    with pytest.raises(UserError) as error:
        read_adapter(folder)
    return str(error.value)


def change_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "sets use_dora to True, which plain LoRA does not have."),
        ({"bias": "all"}, "sets bias to 'all', which plain LoRA does not have."),
        ({"lora_bias": True}, "sets lora_bias to True, which plain LoRA does not have."),
        (
            {"modules_to_save": ["lm_head"]},
            "sets modules_to_save to ['lm_head'], which plain LoRA does not have.",
        ),
        (
            {"target_parameters": ["experts.down_proj"]},
            "sets target_parameters to ['experts.down_proj'], which plain LoRA does not have.",
        ),
        ({"peft_type": "ADALORA"}, "has peft_type 'ADALORA'; only LORA can be read."),
        ({"peft_type": None}, "has peft_type None; only LORA can be read."),
        (
            {"r": True},
            ": r of model.layers.0.self_attn.v_proj must be a positive integer, got True.",
        ),
        (
            {"lora_alpha": "16"},
            ": lora_alpha of model.layers.0.self_attn.v_proj must be a number, got '16'.",
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_configurations_that_are_not_plain_lora(folder, changes, message):
    change_config(folder, **changes)
    text = refusal(folder)
    assert text.removeprefix(str(folder / CONFIG_FILE)).strip() == message


def test_values_that_mean_nothing_are_accepted(folder):
    change_config(folder, modules_to_save=[], lora_bias=None, init_lora_weights="gaussian")
    assert len(read_adapter(folder).layers) == 2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_refused(tiny_llama, tmp_path, init):
    config = LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=init)
    theirs = get_peft_model(copy.deepcopy(tiny_llama), config)
    weight = theirs.base_model.model.model.layers[0].self_attn.v_proj.base_layer.weight
    assert not torch.allclose(weight, tiny_llama.model.layers[0].self_attn.v_proj.weight)
    theirs.save_pretrained(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path / CONFIG_FILE} sets init_lora_weights to {init!r}, which may change the base "
        "weights, too; convert the adapter to plain LoRA with PEFT first."
    )


def test_tensors_beyond_plain_lora(folder):
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector"
    change_tensors(folder, lambda tensors: tensors.update({key: torch.ones(12)}))
    assert refusal(folder) == f"{folder / WEIGHTS_FILE} holds {key}, which is not plain LoRA."


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_frozen_head_that_peft_saves_beside_its_adapter(tiny_llama, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(tiny_llama), config)
    theirs.save_pretrained(tmp_path / "adapter")
    assert refusal(tmp_path / "adapter") == (
        f"{tmp_path / 'adapter' / WEIGHTS_FILE} holds base_model.model.lm_head.base_layer.weight, "
        "a whole weight of the base, which PEFT adds where the head or embeddings are among the "
        "targets: if it was not trained, save the adapter with save_embedding_layers=False."
    )
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    attach_adapter(tiny_llama, read_adapter(tmp_path / "adapter"))
    torch.testing.assert_close(logits(tiny_llama), logits(theirs), rtol=0, atol=1e-5)


def test_a_pickle_is_refused(folder):
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    assert refusal(folder) == (
        f"{folder} holds adapter_model.bin, a pickle that could run code when opened; if you "
        f"trust it, write it as safetensors with rslightning convert --pickle {folder} "
        "--output DIR."
    )


def test_what_another_program_wrote_over_ours(tiny_llama, tmp_path):
    base, ours = copy.deepcopy(tiny_llama), tmp_path / "adapter"
    write_adapter(collect_adapter(adapted(tiny_llama, targets=["v_proj"])), ours)
    theirs = PeftModel.from_pretrained(base, ours)
    with torch.no_grad():
        theirs.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight.fill_(3)
    theirs.save_pretrained(ours)
    assert refusal(ours) == (
        f"{ours} is damaged: adapter_model.safetensors has other bytes than were written; copy or "
        "write it again, or remove its manifest.json if another program changed it rightly."
    )
    (ours / MANIFEST_FILE).unlink()
    changed = read_adapter(ours).layers["model.layers.0.self_attn.v_proj"].lora_b
    assert bool((changed == 3).all())


def test_a_missing_half(folder):
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    change_tensors(folder, lambda tensors: tensors.pop(key))
    assert refusal(folder) == (
        f"{folder} has only lora_A of model.layers.1.self_attn.v_proj; its other half is lost."
    )


@pytest.mark.parametrize("size", [0, 4, 100, 700])
def test_a_truncated_file(folder, size):
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    assert len(content) > 700
    path.write_bytes(content[:size])
    text = refusal(folder)
    assert text.startswith(f"{path} cannot be read as safetensors (")
    assert text.endswith("); it is damaged or incomplete: copy or download it again.")


def test_ranks_that_contradict_each_other(folder):
    change_config(folder, r=5)
    assert refusal(folder) == (
        "model.layers.0.self_attn.v_proj has rank 3 in adapter_model.safetensors and 5 in "
        "adapter_config.json; the two files do not belong together."
    )


@pytest.mark.parametrize("key", ["(q_proj", "(?i)v_proj"])
def test_a_pattern_that_is_no_expression(folder, key):
    change_config(folder, rank_pattern={key: 3})
    assert refusal(folder).startswith(f"{key!r} is not a regular expression")


def test_ranks_of_patterns_that_overlap(tiny_llama, tmp_path):
    """PEFT's file has the keys sorted, so it does not say which came first in training."""
    config = LoraConfig(
        r=4,
        use_rslora=True,
        target_modules="all-linear",
        init_lora_weights=False,
        rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 6, "layers.0.mlp.*": 5},
    )
    theirs = get_peft_model(copy.deepcopy(tiny_llama), config)
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    ranks = {path: layer.numbers.rank for path, layer in adapter.layers.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.0.mlp.up_proj"] == 5
    attach_adapter(tiny_llama, adapter)
    torch.testing.assert_close(logits(tiny_llama), logits(theirs), rtol=0, atol=1e-5)
    change_config(tmp_path, rank_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 6})
    assert "has rank 5 in" in refusal(tmp_path)


def test_a_pattern_is_part_of_the_contradiction(folder):
    change_config(folder, rank_pattern={"layers.1.self_attn.v_proj": 2})
    assert refusal(folder).startswith("model.layers.1.self_attn.v_proj has rank 3 in")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "has peft_type None; only LORA can be read."),
        (b'"LORA"', "has peft_type None; only LORA can be read."),
        (b'{"r": 8', "cannot be read as JSON: Expecting ',' delimiter: line 1 column 8 (char 7)."),
        (b"\xff\xfe", "cannot be read as JSON: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_configuration_that_is_no_object(folder, content, message):
    (folder / CONFIG_FILE).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / CONFIG_FILE} {message}")


def test_missing_files(folder, tmp_path):
    (folder / WEIGHTS_FILE).unlink()
    assert refusal(folder) == f"{folder / WEIGHTS_FILE} does not exist."
    nowhere = tmp_path / "nowhere"
    assert refusal(nowhere) == (
        f"{nowhere / CONFIG_FILE} does not exist: {nowhere} is not an adapter folder."
    )


def test_a_file_in_the_place_of_the_folder(tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"")
    assert refusal(path) == (
        f"{path / CONFIG_FILE} cannot be read as JSON: [Errno 20] Not a directory: "
        f"'{path / CONFIG_FILE}'."
    )


def test_an_empty_file_of_tensors(folder):
    change_tensors(folder, dict.clear)
    assert refusal(folder) == f"{folder / WEIGHTS_FILE} holds no adapter."


def test_shards_that_were_not_gathered(folder):
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    change_tensors(folder, lambda tensors: tensors.update({key: torch.empty(0)}))
    assert refusal(folder) == (
        "model.layers.0.self_attn.v_proj has matrices of shape [0] and [12, 3] in "
        f"{folder}: it was saved without gathering its shards."
    )


def test_an_adapter_of_another_base_is_not_attached(folder, make_gpt2):
    adapter = read_adapter(folder)
    with pytest.raises(UserError) as error:
        attach_adapter(make_gpt2(), adapter)
    assert str(error.value) == (
        "The adapter has matrices for model.layers.0.self_attn.v_proj, where the model has no "
        "linear module: it was trained on another base model."
    )


def test_an_adapter_of_another_size_is_not_attached(folder, tiny_llama):
    unwrap_adapters(tiny_llama).model.layers[1].self_attn.v_proj = nn.Linear(24, 14)
    with pytest.raises(UserError) as error:
        attach_adapter(tiny_llama, read_adapter(folder))
    assert str(error.value) == (
        "The adapter's matrices for model.layers.1.self_attn.v_proj fit a linear map of 24 -> 12, "
        "the model has 24 -> 14: it was trained on another base model."
    )
    assert not list(adapter_layers(tiny_llama))


def test_an_adapter_is_not_attached_twice(folder, tiny_llama):
    with pytest.raises(UserError) as error:
        attach_adapter(tiny_llama, read_adapter(folder))
    assert str(error.value) == (
        "The model has adapters already; merge or remove them before injecting."
    )
