import json
import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from peft import PeftModel
from safetensors.torch import load_file
from torch import optim
from transformers import AutoModelForCausalLM, AutoTokenizer

from rslightning.callbacks import MergeAdapters
from rslightning.errors import RunError, UserError


def held_out_batch(run):
    return next(iter(run.data.val_dataloader()))


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def fit(make_trainer, module, data, *callbacks, **options):
    torch.manual_seed(7)
    options = {"max_steps": 3, "limit_val_batches": 0, "callbacks": list(callbacks), **options}
    trainer = make_trainer(**options)
    trainer.fit(module, data)
    return trainer


class KeepBatches(Callback):
    """Keep the batches that a fit saw."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(batch)


def test_peft_opens_the_adapter_and_computes_the_same(fitted_run, model_folder):
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    peft = PeftModel.from_pretrained(base, fitted_run.folder / "adapter").eval()
    batch = held_out_batch(fitted_run)
    expected = logits(fitted_run.module.model, batch)
    torch.testing.assert_close(logits(peft, batch), expected, rtol=0, atol=1e-5)
    with peft.disable_adapter():
        assert (logits(peft, batch) - expected).abs().max() > 0.1  # the adapter does something


def test_the_merged_folder_stands_alone(fitted_run, tmp_path):
    folder = shutil.copytree(fitted_run.folder / "merged", tmp_path / "anywhere")
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = fitted_run.module
    assert merged.dtype == torch.float32
    batch = held_out_batch(fitted_run)
    torch.testing.assert_close(
        logits(merged, batch), logits(module.model, batch), rtol=0, atol=1e-4
    )
    for prompt, _ in fitted_run.data.held_out_rows[:3]:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": 12, "do_sample": False}
        answers = [model.generate(**inputs, **options) for model in (merged, module.model)]
        texts = [tokenizer.decode(ids[0]) for ids in answers]
        assert texts[0] == texts[1]
        assert len(texts[0]) > len(prompt)


def test_the_base_folder_is_as_it_was(fitted_run, model_folder):
    merged = load_file(fitted_run.folder / "merged/model.safetensors")
    base = load_file(model_folder / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    adapted = {f"{name}.weight" for name in fitted_run.module.injection.modules}
    assert changed == adapted


def test_the_report_says_what_rounding_lost(make_trainer, make_module, make_data, tmp_path):
    module, batches = make_module(), KeepBatches()
    fit(make_trainer, module, make_data(), MergeAdapters(dtype="bfloat16"), batches)
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    base = load_file(f"{module.base_model}/model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == report["dtype"] == "bfloat16"
    assert report["layers"].keys() == module.injection.modules.keys()
    assert len(report["layers"]) == 14
    for path, numbers in report["layers"].items():
        layer = module.model.get_submodule(path)
        gamma = 5.0 / 3**0.5
        delta = gamma * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
        weight = base[f"{path}.weight"].double()
        lost = (merged[f"{path}.weight"].double() - (weight + delta)).norm() / delta.norm()
        assert numbers == {
            "weight_norm": pytest.approx(weight.norm().item(), rel=1e-6),
            "update_norm": pytest.approx(delta.norm().item(), rel=1e-6),
            "lost_share": pytest.approx(lost.item(), rel=1e-4),
            "quantization_error": 0.0,
        }
        assert 1e-4 < numbers["lost_share"] < 0.2
    shares = [numbers["lost_share"] for numbers in report["layers"].values()]
    assert report["largest_lost_share"] == max(shares)
    assert report["warning"] is None
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    first = batches.seen[0]
    sample = first.input_ids[:1, first.attention_mask[0].bool()]
    with torch.no_grad():
        difference = module.eval().model(sample).logits - reloaded(sample).logits.float()
    assert report["largest_logit_difference"] == pytest.approx(difference.abs().max().item())
    assert report["largest_logit_difference"] > 1e-3


def test_an_update_that_bfloat16_cannot_hold_is_warned_about(
    make_trainer, make_module, make_data, tmp_path
):
    module = make_module(optimizer=partial(optim.AdamW, lr=1e-5))
    with pytest.warns(UserWarning, match=r"^Rounding to bfloat16 lost more than 20% of the update"):
        fit(make_trainer, module, make_data(), MergeAdapters(dtype="bfloat16"))
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["largest_lost_share"] > 0.5
    assert report["warning"].startswith("Rounding to bfloat16 lost more than 20% of the update in ")


def test_the_model_in_training_stays_as_it_is(make_trainer, make_module, make_data):
    states = []
    for callbacks in ([], [MergeAdapters(dtype="bfloat16")]):
        module = make_module()
        fit(make_trainer, module, make_data(), *callbacks)
        states.append(module.state_dict())
        assert module.training
    left, right = states
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_full_fine_tuning_leaves_the_model_alone(
    make_trainer, make_module, make_data, tmp_path, dtype
):
    module = make_module(adapter=None)
    fit(make_trainer, module, make_data(), MergeAdapters(dtype=dtype))
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "merged/merge_report.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(tokenizer.encode("A hat")) == "<s>A hat"
    target = getattr(torch, dtype or "float32")
    state = {name.removeprefix("model."): t for name, t in module.trainable_state().items()}
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name].to(target)), name
        assert tensor.dtype == target
    assert module.model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_a_tied_head_is_saved_once(
    make_trainer, make_module, make_data, make_llama, model_folder, tmp_path, dtype
):
    base = shutil.copytree(model_folder, tmp_path / "base")
    vocabulary = AutoTokenizer.from_pretrained(base).vocab_size
    make_llama(vocabulary, tie_word_embeddings=True).save_pretrained(base)
    module = make_module(base, adapter=None)
    fit(make_trainer, module, make_data(), MergeAdapters(dtype=dtype))
    saved = load_file(tmp_path / "merged/model.safetensors")
    assert saved.keys() == load_file(base / "model.safetensors").keys()
    assert "lm_head.weight" not in saved
    module.model.save_pretrained(tmp_path / "theirs")  # float32; transformers casts as it loads
    target = getattr(torch, dtype or "float32")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=target).eval()
    assert {tensor.dtype for tensor in saved.values()} == {target}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert module.model.dtype == torch.float32


def test_a_second_fit_replaces_the_folders_of_the_first(
    make_trainer, make_module, make_data, tmp_path
):
    fit(make_trainer, make_module(), make_data(), MergeAdapters(), max_steps=1)
    first = load_file(tmp_path / "merged/model.safetensors")
    fit(make_trainer, make_module(), make_data(), MergeAdapters(), max_steps=2)
    second = load_file(tmp_path / "merged/model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_a_dry_run_writes_nothing(make_trainer, make_module, make_data, tmp_path):
    fit(make_trainer, make_module(), make_data(), MergeAdapters(), fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_a_folder_of_somebody_else_stops_the_fit_at_its_start(
    make_trainer, make_module, make_data, tmp_path, name
):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    module = make_module()
    with pytest.raises(UserError) as caught:
        fit(make_trainer, module, make_data(), MergeAdapters())
    assert str(caught.value) == (
        f"{tmp_path / name} holds something else; MergeAdapters writes there."
    )
    assert module.trainer.global_step == 0
    assert (tmp_path / name / "thesis.txt").read_text() == "mine"


def test_a_module_without_language_model_stops_the_fit_at_its_start(make_trainer, make_data):
    class Bare(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 5)

        def training_step(self, batch, batch_idx):
            raise AssertionError("the fit must not start")

        def configure_optimizers(self):
            return optim.SGD(self.parameters(), lr=0.1)

    data = make_data()
    data.setup("fit")
    with pytest.raises(UserError) as caught:
        fit(make_trainer, Bare(), data.train_dataloader(), MergeAdapters())
    assert str(caught.value) == "Bare holds no Hugging Face model to merge adapters into."


def test_a_base_that_moved_is_named_by_the_option(
    make_trainer, make_module, make_data, model_folder, tmp_path
):
    moved = shutil.copytree(model_folder, tmp_path / "base")
    module = make_module(moved)
    callback = MergeAdapters(base_model=str(model_folder))
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[callback])
    module.configure_model()
    shutil.rmtree(moved)
    trainer.fit(module, make_data())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    assert (tmp_path / "merged/model.safetensors").exists()


def test_a_base_of_the_hub_is_named_as_on_the_hub(
    make_trainer, make_module, make_data, model_folder, tmp_path, monkeypatch
):
    cache = shutil.copytree(model_folder, tmp_path / "cache" / "snapshots" / "0123abcd")

    def fetched(name, **options):
        assert name == "somebody/tiny-llama"
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    fit(make_trainer, make_module("somebody/tiny-llama"), make_data(), MergeAdapters())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/tiny-llama"
    for path in (tmp_path / "merged").glob("*.json"):
        assert "snapshots" not in path.read_text()


def test_a_full_disk_is_one_sentence_and_no_half_folder(
    make_trainer, make_module, make_data, tmp_path, small_disk
):
    module = make_module()
    with small_disk(max_bytes=50_000), pytest.raises(RunError) as caught:
        fit(make_trainer, module, make_data(), MergeAdapters())
    assert str(caught.value).startswith(f"Could not write {tmp_path / 'merged'}: ")
    assert "File too large" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]  # smaller than the limit
