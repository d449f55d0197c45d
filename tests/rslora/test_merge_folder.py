import copy
import json
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from rslightning.errors import RunError, UserError
from rslightning.manifest import MANIFEST_FILE
from rslightning.model_folder import INDEX_FILE, WEIGHTS_FILE, ModelFolder
from rslightning.rslora import merge_folder as merge_folder_module
from rslightning.rslora.adapters import Adapter, LayerAdapter, attach_adapter, collect_adapter
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.kept_dtypes import float32_parts, kept_names
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.merge import LayerMerge, merge_adapters, unwrap_adapters
from rslightning.rslora.merge_folder import REPORT_FILE, MergeReport, merge_folder
from rslightning.rslora.peft_format import read_adapter
from rslightning.rslora.spec import AdapterSpec, ResolvedAdapter
from rslightning.storage import new_folder

SHARD_SIZES = {"one_file": "1GB", "shards": "10KB"}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def adapted(model, std=0.05, **fields):
    """Inject adapters of rank 3 whose B is random."""
    inject_adapters(model, AdapterSpec(**{"rank": 3, **fields}))
    generator = torch.Generator().manual_seed(7)
    for _, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_b, std=std, generator=generator)
    return model


def saved(model, path, shards="shards"):
    model.save_pretrained(path, max_shard_size=SHARD_SIZES[shards])
    return ModelFolder(path)


def merged(base, adapter, path, *arguments):
    """Merge as the command line does, into a folder that appears whole."""
    with new_folder(path) as aside:
        return merge_folder(base, adapter, aside, *arguments)


def tensors_of(folder):
    return {
        k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()
    }


def assert_same_bits(ours, truth):
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("shards", SHARD_SIZES)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_folder_is_the_merge_in_memory(tiny_llama, tmp_path, shards, dtype):
    base = saved(tiny_llama, tmp_path / "base", shards)
    assert (len(base.shards) > 3) == (shards == "shards")
    adapter = collect_adapter(adapted(tiny_llama, rank_pattern={"q_proj": 5}))
    merged(base, adapter, tmp_path / "merged", dtype)
    merge_adapters(tiny_llama)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert reloaded.dtype == torch.float32
    assert_same_bits(reloaded.state_dict(), unwrap_adapters(tiny_llama).state_dict())


@pytest.mark.parametrize("kind", ["tied_llama", "gpt2"])
def test_tied_heads_and_conv1d(tmp_path, make_llama, make_gpt2, kind):
    model = make_gpt2() if kind == "gpt2" else make_llama(53, tie_word_embeddings=True)
    base = saved(model, tmp_path / "base")
    merged(base, collect_adapter(adapted(model)), tmp_path / "merged")
    merge_adapters(model)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_bits(reloaded.state_dict(), unwrap_adapters(model).state_dict())


def test_a_checkpoint_without_the_outermost_segment(tmp_path, make_gpt2):
    model = make_gpt2()
    base = saved(model.transformer, tmp_path / "base")  # h.0..., as GPT-2's own is stored
    assert "h.0.attn.c_attn.weight" in base.tensor_names
    merged(base, collect_adapter(adapted(model)), tmp_path / "merged")
    merge_adapters(model)
    expected = unwrap_adapters(model).transformer.state_dict()
    assert_same_bits(tensors_of(tmp_path / "merged"), expected)


# PEFT corrects the setting itself, and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_an_adapter_of_peft_on_conv1d(tmp_path, fan_in_fan_out, make_gpt2):
    config = LoraConfig(
        r=3,
        target_modules=["c_attn", "c_proj", "c_fc"],  # attn.c_proj is square
        fan_in_fan_out=fan_in_fan_out,
        init_lora_weights=False,
    )
    theirs = get_peft_model(make_gpt2(), config)
    theirs.save_pretrained(tmp_path / "adapter")
    base = saved(make_gpt2(), tmp_path / "base")
    merged(base, read_adapter(tmp_path / "adapter"), tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    truth = theirs.merge_and_unload().state_dict()
    for name, tensor in truth.items():
        torch.testing.assert_close(reloaded[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["attn.c_proj"]], ids=len)
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_one_setting_of_peft_for_conv1d_and_linear(tmp_path, make_gpt2, targets, fan_in_fan_out):
    """PEFT saves the setting of the layer that it adapted last: that of a head is false."""
    config = LoraConfig(r=3, target_modules=[*targets, "lm_head"], init_lora_weights=False)
    theirs = get_peft_model(make_gpt2(tie_word_embeddings=False), config)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    path = tmp_path / "adapter" / "adapter_config.json"
    saved_config = json.loads(path.read_text())
    assert saved_config["fan_in_fan_out"] is False
    path.write_text(json.dumps(saved_config | {"fan_in_fan_out": fan_in_fan_out}))
    base = saved(make_gpt2(tie_word_embeddings=False), tmp_path / "base")
    merged(base, read_adapter(tmp_path / "adapter"), tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(reloaded[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_square_linear_map_is_not_taken_for_conv1d(tiny_llama, tmp_path):
    base = saved(tiny_llama, tmp_path / "base")
    adapter = collect_adapter(adapted(tiny_llama, targets=["q_proj"]))
    turned = {path: replace(x, transposed=True) for path, x in adapter.layers.items()}
    merged(base, replace(adapter, layers=turned), tmp_path / "merged")
    merge_adapters(tiny_llama)
    result = tensors_of(tmp_path / "merged")
    assert torch.equal(result[f"{Q_PROJ}.weight"], tiny_llama.get_submodule(Q_PROJ).weight)


def test_blocks_that_keep_weights_both_ways(tmp_path):
    tensors = {
        "h.0.a.weight": torch.randn(5, 5),
        "h.0.a.bias": torch.randn(5),
        "h.0.b.weight": torch.randn(5, 7),
        "h.0.b.bias": torch.randn(5),
        "h.0.c.weight": torch.randn(5, 7),
        "h.0.c.bias": torch.randn(7),
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "base" / WEIGHTS_FILE)
    numbers = ResolvedAdapter(2, 4.0, "lora")
    layer = LayerAdapter(torch.randn(2, 5), torch.randn(5, 2), numbers)
    with pytest.raises(UserError) as error:
        merged(ModelFolder(tmp_path / "base"), Adapter({"h.0.a": layer}), tmp_path / "merged")
    assert str(error.value) == (
        f"{tmp_path / 'base'} keeps some weights in h as [out, in] and some as [in, out], so it is "
        "not known which way h.0.a.weight is: leave it out of the targets."
    )


@pytest.mark.parametrize("shards", SHARD_SIZES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_bfloat16(tiny_llama, tmp_path, shards, stored):
    base = saved(tiny_llama.to(stored), tmp_path / "base", shards)
    adapted(tiny_llama)
    exact = {name: tensor.double() for name, tensor in tensors_of(base.path).items()}
    for path, layer in adapter_layers(tiny_llama):
        update = layer.gamma * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
        exact[f"{path}.weight"] += update
    merged(base, collect_adapter(tiny_llama), tmp_path / "merged", torch.bfloat16)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert reloaded.dtype == torch.bfloat16
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, reloaded.state_dict()[name])
        error = (tensor.double() - exact[name]).abs()
        assert (error <= torch.finfo(torch.bfloat16).eps / 2 * exact[name].abs() + 1e-7).all()


def test_none_keeps_the_dtype_of_each_tensor(tiny_llama, tmp_path):
    tiny_llama.bfloat16().lm_head.float()
    base = saved(tiny_llama, tmp_path / "base")
    report = merged(base, collect_adapter(adapted(tiny_llama)), tmp_path / "merged")
    before, after = tensors_of(base.path), tensors_of(tmp_path / "merged")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    assert report.dtype == "mixed"


def test_which_tensors_keep_their_dtype():
    tensors = {
        "a": (torch.bfloat16, 70),
        "b": (torch.bfloat16, 70),
        "wide": (torch.float32, 80),
        "wider": (torch.float64, 1),
    }
    assert kept_names(tensors) == {"wide", "wider"}
    assert kept_names(dict.fromkeys("ab", (torch.float32, 5))) == set()
    assert kept_names(dict.fromkeys("ab", (torch.float32, 5)), ["b"]) == {"b"}
    assert kept_names(tensors, ["a"]) == {"wide", "wider"}
    assert kept_names({}) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_what_chooses_experts_stays_in_float32(tmp_path, make_deepseek, stored, dtype):
    base = saved(make_deepseek(stored), tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    adapter = collect_adapter(adapted(live, targets=["o_proj"]))
    parts = float32_parts(DeepseekV3ForCausalLM, dtype)
    with new_folder(tmp_path / "merged") as aside:
        merge_folder(base, adapter, aside, dtype, float32=parts if stored == torch.float32 else ())
    before, after = tensors_of(base.path), tensors_of(tmp_path / "merged")
    for name, tensor in after.items():
        if "correction_bias" in name:
            assert torch.equal(tensor, before[name])
        else:
            assert tensor.dtype == dtype
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).state_dict()
    for name, tensor in unwrap_adapters(live).state_dict().items():
        if "o_proj" not in name:
            assert torch.equal(reloaded[name], tensor), name


def test_files_index_and_description(tiny_llama, tmp_path):
    base = saved(tiny_llama, tmp_path / "base")
    (base.path / "tokenizer.json").write_text("{}")
    (base.path / "notes.md").write_text("not a part of the model")
    merged(base, collect_adapter(adapted(tiny_llama)), tmp_path / "merged")
    names = {path.name for path in base.path.iterdir()} - {"notes.md"} | {MANIFEST_FILE}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    for name in ("tokenizer.json", "config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base.path / name).read_bytes()
    ours, theirs = (
        json.loads((folder / INDEX_FILE).read_text()) for folder in (tmp_path / "merged", base.path)
    )
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_another_dtype_changes_size_and_configuration(tiny_llama, tmp_path):
    base = saved(tiny_llama, tmp_path / "base")
    merged(base, collect_adapter(adapted(tiny_llama)), tmp_path / "merged", torch.bfloat16)
    index = json.loads((tmp_path / "merged" / INDEX_FILE).read_text())
    expected = sum(t.nbytes for t in tensors_of(tmp_path / "merged").values())
    assert index["metadata"]["total_size"] == expected
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == base.config | {"dtype": "bfloat16"}


def test_the_old_name_of_the_dtype_is_replaced(tiny_llama, tmp_path):
    saved(tiny_llama, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    adapter = collect_adapter(adapted(tiny_llama))
    merged(ModelFolder(tmp_path / "base"), adapter, tmp_path / "merged", torch.bfloat16)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written


def test_one_file_has_no_index(tiny_llama, tmp_path):
    base = saved(tiny_llama, tmp_path / "base", "one_file")
    merged(base, collect_adapter(adapted(tiny_llama)), tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").glob("*safetensors*")] == [WEIGHTS_FILE]


@pytest.mark.parametrize("std", [1e-4, 0.05])
def test_the_report_against_float64(tiny_llama, tmp_path, std):
    base = saved(tiny_llama, tmp_path / "base")
    adapted(tiny_llama, std=std, targets=["v_proj", "down_proj"])
    report = merged(base, collect_adapter(tiny_llama), tmp_path / "merged", torch.bfloat16)
    assert report.dtype == "bfloat16"
    before, after = tensors_of(base.path), tensors_of(tmp_path / "merged")
    assert list(report.layers) == [path for path, _ in adapter_layers(tiny_llama)]
    for path, layer in adapter_layers(tiny_llama):
        weight, result = before[f"{path}.weight"].double(), after[f"{path}.weight"].double()
        update = layer.gamma * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
        numbers = report.layers[path]
        assert numbers.weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)
        assert numbers.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
        lost = float((result - weight - update).norm() / update.norm())
        assert numbers.lost_share == pytest.approx(lost, rel=1e-4)
    largest = max(x.lost_share for x in report.layers.values())
    assert report.largest_lost_share == largest
    assert (report.warning is not None) == (largest > 0.2) == (std == 1e-4)


def test_float32_loses_nothing_that_matters(tiny_llama, tmp_path):
    base = saved(tiny_llama, tmp_path / "base")
    report = merged(base, collect_adapter(adapted(tiny_llama)), tmp_path / "merged")
    assert report.dtype == "float32"
    assert 0 < report.largest_lost_share < 1e-6
    assert report.warning is None


def test_the_warning_names_dtype_share_and_first_layer():
    layers = {
        "a": LayerMerge(1.0, 1.0, 0.2),
        "b": LayerMerge(1.0, 1.0, 0.31),
        "c": LayerMerge(1.0, 1.0, 0.52),
    }
    report = MergeReport("bfloat16", layers)
    assert report.largest_lost_share == 0.52
    assert report.warning == (
        "Rounding to bfloat16 lost more than 20% of the update in 2 of 3 layers (at most 52.0%, b "
        "first); merge with dtype float32 to keep it."
    )
    assert MergeReport("bfloat16", {"a": layers["a"]}).warning is None
    assert MergeReport("bfloat16").largest_lost_share == 0.0


def test_the_report_as_a_file(tmp_path):
    report = MergeReport("bfloat16", {"a": LayerMerge(2.0, 0.5, 0.25)}, 0.125)
    report.write(tmp_path)
    assert json.loads((tmp_path / REPORT_FILE).read_text()) == {
        "dtype": "bfloat16",
        "layers": {
            "a": {
                "weight_norm": 2.0,
                "update_norm": 0.5,
                "lost_share": 0.25,
                "quantization_error": 0.0,
            }
        },
        "dequantized_from": None,
        "largest_logit_difference": 0.125,
        "largest_lost_share": 0.25,
        "warning": report.warning,
    }


def test_an_adapter_of_another_base(tiny_llama, tmp_path, make_gpt2):
    base = saved(make_gpt2(), tmp_path / "base")
    adapter = collect_adapter(adapted(tiny_llama))
    with pytest.raises(UserError) as error:
        merged(base, adapter, tmp_path / "merged")
    assert str(error.value) == (
        f"The adapter has matrices for {Q_PROJ}, of which {base.path} has no weight: it was "
        "trained on another base model."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_adapter_of_another_size(tiny_llama, tmp_path):
    base = saved(tiny_llama, tmp_path / "base")
    tiny_llama.model.layers[1].mlp.up_proj = nn.Linear(24, 44, bias=False)
    adapter = collect_adapter(adapted(tiny_llama, targets=["up_proj"]))
    with pytest.raises(UserError) as error:
        merged(base, adapter, tmp_path / "merged")
    assert str(error.value) == (
        "The adapter's update of model.layers.1.mlp.up_proj has shape [44, 24], the base's weight "
        "[40, 24]: it was trained on another base model."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_merge_that_is_not_finite(tiny_llama, tmp_path):
    base = saved(tiny_llama, tmp_path / "base")
    adapter = collect_adapter(adapted(tiny_llama, targets=["q_proj"], std=1e5))
    with pytest.raises(RunError) as error:
        merged(base, adapter, tmp_path / "merged", torch.float16)
    assert str(error.value) == (
        f"{Q_PROJ}: The merged weight has entries that are not finite in float16."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_not_blamed_on_the_base(tiny_llama, tmp_path, small_disk):
    base = saved(tiny_llama, tmp_path / "base")
    with pytest.raises(RunError) as error, small_disk(4096):
        merged(base, collect_adapter(adapted(tiny_llama)), tmp_path / "merged")
    assert str(error.value) == f"Could not write {tmp_path / 'merged'}: File too large."
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_one_tensor_at_a_time(tiny_llama, tmp_path, monkeypatch):
    """No two files are open at once, and a tensor is gone before the next one but one comes."""
    base = saved(tiny_llama, tmp_path / "base")
    adapter = collect_adapter(adapted(tiny_llama))
    del tiny_llama
    assert len(base.shards) > 3
    open_now, opened, held, progress = [], [], [], []
    open_tensors, tensor_writer = (
        merge_folder_module.open_tensors,
        merge_folder_module.tensor_writer,
    )

    @contextmanager
    def counting_open(path):
        open_now.append(path.name)
        opened.append(path.name)
        assert len(open_now) == 1
        with open_tensors(path) as tensors:
            yield tensors
        open_now.remove(path.name)

    @contextmanager
    def watching_writer(path, layout):
        with tensor_writer(path, layout) as write:

            def watching_write(tensor):
                held.append(weakref.ref(tensor))
                assert sum(reference() is not None for reference in held) <= 2
                write(tensor)

            yield watching_write

    monkeypatch.setattr(merge_folder_module, "open_tensors", counting_open)
    monkeypatch.setattr(merge_folder_module, "tensor_writer", watching_writer)
    merged(base, adapter, tmp_path / "merged", torch.bfloat16, progress.append)
    assert progress == opened == list(base.shards)
    assert len(held) == len(base.tensor_names)


def test_the_folder_computes_what_an_attached_adapter_computes(tiny_llama, tmp_path):
    base = saved(tiny_llama, tmp_path / "base")
    fresh = copy.deepcopy(tiny_llama)
    adapter = collect_adapter(adapted(tiny_llama))
    merged(base, adapter, tmp_path / "merged")
    attach_adapter(fresh, adapter)
    ids = torch.arange(10).reshape(2, 5)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        reloaded(input_ids=ids).logits, fresh.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-6
    )


def test_one_file_goes_before_an_index_as_in_transformers(tiny_llama, tmp_path, make_llama):
    saved(make_llama(53, tie_word_embeddings=True), tmp_path / "old")
    base = saved(tiny_llama, tmp_path / "base", "one_file")
    for path in (tmp_path / "old").glob("*safetensors*"):
        path.rename(base.path / path.name)
    loaded = AutoModelForCausalLM.from_pretrained(base.path).state_dict()
    assert_same_bits(loaded, tiny_llama.state_dict())
    merged(base, collect_adapter(adapted(tiny_llama, targets=["q_proj"])), tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").glob("*safetensors*")] == [WEIGHTS_FILE]
    result = tensors_of(tmp_path / "merged")
    assert torch.equal(result["lm_head.weight"], loaded["lm_head.weight"])


def test_a_weight_without_adapter_that_float16_cannot_hold_is_refused(tmp_path, tiny_llama):
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[3, 5] = 1e6
    tiny_llama.save_pretrained(tmp_path / "base")
    inject_adapters(tiny_llama, AdapterSpec(rank=2, targets=["up_proj"]))
    (tmp_path / "out").mkdir()
    with pytest.raises(
        RunError, match=r"^model\.embed_tokens\.weight has entries that are not fin"
    ):
        merge_folder(
            ModelFolder(tmp_path / "base"),
            collect_adapter(tiny_llama),
            tmp_path / "out",
            torch.float16,
        )
