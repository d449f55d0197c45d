"""`MergeAdapters` in somebody else's project: a LightningModule that knows nothing of ours."""

import copy
import json
import shutil

import peft
import pytest
import torch
from lightning.pytorch import LightningModule
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import optim
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BatchEncoding,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
)

from rslightning.callbacks import MergeAdapters
from rslightning.callbacks.base_weights import refuse_other_weights
from rslightning.callbacks.merge_adapters import language_model
from rslightning.errors import RunError, UserError
from rslightning.model_folder import ModelFolder
from rslightning.rslora import AdapterSpec, collect_adapter, inject_adapters, merge_adapters

IDS = torch.arange(2, 38).reshape(4, 9)
TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
PATTERNS = {
    "llama": {
        "rank_pattern": {"q_proj": 7, "model.layers.1.mlp.up_proj": 1},
        "alpha_pattern": {r"^model\.layers\.0\..*": 5, "layers.1.mlp.down_proj": 2.5},
    },
    "gpt2": {
        "rank_pattern": {"c_attn": 7, "h.1.mlp.c_fc": 1},
        "alpha_pattern": {r"^transformer\.h\.0\..*": 5},
    },
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Foreign(LightningModule):
    """Somebody's training of a model that they have adapted themselves."""

    def __init__(self, model, read=lambda batch: batch["input_ids"]):
        super().__init__()
        self.network = model
        self.read = read

    def training_step(self, batch, batch_idx):
        ids = self.read(batch)
        return self.network(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Classification(Foreign):
    """Somebody's training of a classifier of three classes."""

    def training_step(self, batch, batch_idx):
        ids = self.read(batch)
        return self.network(input_ids=ids, labels=ids[:, 0] % 3).loss


def classifier(folder, labels=3):
    """Return a classifier on the backbone of a causal language model, its head drawn anew."""
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, pad_token_id=0
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory, make_llama, make_gpt2):
    """The base models, saved as anybody would."""
    root = tmp_path_factory.mktemp("bases")
    make_llama(53).save_pretrained(root / "llama")
    make_gpt2(initializer_range=0.2).save_pretrained(root / "gpt2")
    make_llama(53, tie_word_embeddings=True).save_pretrained(root / "tied")
    return root


@pytest.fixture
def load(bases):
    return lambda kind="llama": AutoModelForCausalLM.from_pretrained(bases / kind).train()


@pytest.fixture
def fit(make_trainer):
    def run(module, callback=None, data=None, **options):
        callbacks = [callback or MergeAdapters()]
        trainer = make_trainer(max_steps=2, callbacks=callbacks, **options)
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in IDS]
        trainer.fit(module, data or DataLoader(rows, batch_size=2))

    return run


def config_of_peft(kind="llama", **options):
    """Return a configuration whose B is random, so that the adapter does something at once."""
    defaults = {
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.25,
        "init_lora_weights": False,
        "target_modules": TARGETS[kind],
        "fan_in_fan_out": kind == "gpt2",
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(defaults | options))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def assert_close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def assert_same_as_peft(folder, base, theirs, adapter="default"):
    """Compare both folders with the PEFT model after the fit."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    before, expected = logits(plain), logits(theirs)
    assert (expected - before).abs().max() > 0.1

    reopened = PeftModel.from_pretrained(plain, folder / "adapter")
    assert_close(logits(reopened), expected)
    state = peft.get_peft_model_state_dict(theirs, adapter_name=adapter)
    written = load_file(folder / "adapter/adapter_model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)

    truth = copy.deepcopy(theirs).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert_close(logits(merged), expected)
    assert merged.state_dict().keys() == truth.keys()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-5, atol=1e-6)


def assert_reports(folder, theirs, adapter="default"):
    """Compare `merge_report.json` with dense products in float64."""
    report = json.loads((folder / "merged/merge_report.json").read_text())
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert report["layers"].keys() == layers.keys()
    for path, layer in layers.items():
        a, b = (m[adapter].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
        norm = layer.scaling[adapter] * (b @ a).norm().item()
        assert report["layers"][path]["update_norm"] == pytest.approx(norm, rel=1e-6)
    assert report["dtype"] == "float32"
    assert report["largest_logit_difference"] < 1e-4


@pytest.mark.parametrize("patterns", [False, True], ids=["one_rank", "patterns"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapter_of_peft(fit, load, bases, tmp_path, kind, use_rslora, patterns):
    options = {"use_rslora": use_rslora} | (PATTERNS[kind] if patterns else {})
    theirs = get_peft_model(load(kind), config_of_peft(kind, **options))
    before = copy.deepcopy(theirs.state_dict())
    fit(Foreign(theirs))
    assert any(not torch.equal(before[name], t) for name, t in theirs.state_dict().items())
    assert_same_as_peft(tmp_path, bases / kind, theirs)
    assert_reports(tmp_path, theirs)

    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["use_rslora"] is use_rslora
    assert config["lora_dropout"] == 0.25
    assert config["base_model_name_or_path"] == str(bases / kind)
    if not patterns:
        assert (config["r"], config["lora_alpha"]) == (4, 6)
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
    theirs_again = PeftModel.from_pretrained(load(kind), tmp_path / "adapter")
    for path, layer in theirs_again.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            live = theirs.get_submodule(path)
            assert layer.lora_alpha == live.lora_alpha
            assert layer.scaling == live.scaling


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_a_scale_that_was_set_by_hand_is_kept(fit, load, bases, tmp_path, use_rslora):
    theirs = get_peft_model(load(), config_of_peft(use_rslora=use_rslora))
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for layer in layers[::2]:
        layer.scaling["default"] *= 1.75
    fit(Foreign(theirs))
    assert_same_as_peft(tmp_path, bases / "llama", theirs)
    assert_reports(tmp_path, theirs)


def test_the_dtype_of_the_merge(fit, load, tmp_path):
    theirs = get_peft_model(load(), config_of_peft())
    fit(Foreign(theirs), MergeAdapters(dtype="bfloat16"))
    truth = copy.deepcopy(theirs).merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, truth[name].bfloat16(), rtol=2**-8, atol=1e-6)


def test_transformers_own_way_to_adapt(fit, load, bases, tmp_path):
    model = load()
    model.add_adapter(config_of_peft(use_rslora=True, task_type=None))
    fit(Foreign(model))
    expected = logits(model)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert_close(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter")), expected)
    assert (logits(load()) - expected).abs().max() > 0.1


def test_modules_injected_without_a_wrapper(fit, load, tmp_path):
    model = peft.inject_adapter_in_model(config_of_peft(use_rslora=True), load())
    fit(Foreign(model))
    expected = logits(model)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert_close(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter")), expected)


def test_an_adapter_with_a_name_beside_one_that_rests(fit, load, bases, tmp_path):
    theirs = get_peft_model(load(), config_of_peft(use_rslora=True), adapter_name="mine")
    rests = config_of_peft(r=2, target_modules=["q_proj", "k_proj"], use_dora=True)
    theirs.add_adapter("rests", rests)
    theirs.set_adapter("mine")
    fit(Foreign(theirs))
    theirs.delete_adapter("rests")
    assert_same_as_peft(tmp_path, bases / "llama", theirs, "mine")


def test_our_adapters_in_their_module(fit, load, bases, tmp_path):
    model = load()
    inject_adapters(model, AdapterSpec(rank=4, alpha=6.0, rank_pattern={"q_proj": 7}))
    fit(Foreign(model))
    expected = logits(model)
    assert (logits(load()) - expected).abs().max() > 1e-2
    assert_close(logits(PeftModel.from_pretrained(load(), tmp_path / "adapter")), expected)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    merge_adapters(model)
    truth = {name.replace(".base.", "."): t for name, t in model.state_dict().items()}
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(tensor, truth[name]) for name, tensor in merged.items())
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["layers"].keys() == collect_adapter(model).layers.keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
@pytest.mark.parametrize("how", ["ours", "peft", "full"])
def test_layers_that_are_compiled_one_by_one(fit, load, bases, tmp_path, how):
    module = Foreign(load())
    if how == "ours":
        inject_adapters(module.network, AdapterSpec(rank=3))
    if how == "peft":
        module.network = get_peft_model(module.network, config_of_peft(lora_dropout=0.0))
    layers = language_model(module).model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    fit(module)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits(module.network))
    if how != "full":
        base = AutoModelForCausalLM.from_pretrained(bases / "llama")
        reopened = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert_close(logits(reopened), logits(module.network))


def test_full_fine_tuning_in_their_module(fit, load, tmp_path):
    model = load()
    fit(Foreign(model))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in merged.state_dict().items())
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("how", ["full", "ours"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_chooses_experts_stays_in_float32(fit, make_deepseek, tmp_path, dtype, how):
    make_deepseek(torch.float32).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").train()
    if how == "ours":
        inject_adapters(model, AdapterSpec(rank=3, targets=["o_proj"]))
    fit(Foreign(model), MergeAdapters(dtype=dtype))
    merged = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        merged |= load_file(file)
    biases = {name for name in merged if "e_score_correction_bias" in name}
    assert len(biases) == 2
    for name, tensor in merged.items():
        wanted = torch.float32 if name in biases else getattr(torch, dtype)
        assert tensor.dtype == wanted, name
    for name in biases:
        assert torch.equal(merged[name], model.get_buffer(name))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", ["resized", "classifier"])
def test_full_fine_tuning_of_what_the_base_is_not(fit, load, bases, tmp_path, kind, dtype):
    """The base's own configuration would say less of it."""
    if kind == "resized":
        model = load()
        model.resize_token_embeddings(60, mean_resizing=False)
        module = Foreign(model)
    else:
        model = classifier(bases / "llama").train()
        module = Classification(model)
    fit(module, MergeAdapters(dtype=dtype))
    merged = type(model).from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == getattr(torch, dtype or "float32")
    assert merged.state_dict().keys() == model.state_dict().keys()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name


def test_a_weight_that_float16_cannot_hold_is_refused(fit, load, tmp_path):
    model = load()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 1e6
    with pytest.raises(RunError) as caught:
        fit(Foreign(model), MergeAdapters(dtype="float16"))
    assert str(caught.value) == (
        "model.embed_tokens.weight has entries that are not finite in float16."
    )
    assert list(tmp_path.iterdir()) == []


BATCHES = {
    "dict": (lambda rows: {"input_ids": rows}, lambda batch: batch["input_ids"], True),
    "encoding": (
        lambda rows: BatchEncoding({"input_ids": rows, "attention_mask": torch.ones(1, 1, 9, 9)}),
        lambda batch: batch["input_ids"],
        True,
    ),
    "tuple": (lambda rows: (rows, rows), lambda batch: batch[0], False),
    "one_row": (lambda rows: {"input_ids": rows[0]}, lambda batch: batch["input_ids"][None], False),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_other_projects(fit, load, tmp_path, kind):
    make, read, compared = BATCHES[kind]
    theirs = get_peft_model(load(), config_of_peft())
    rows = DataLoader([make(IDS[:2]), make(IDS[2:])], batch_size=None)
    fit(Foreign(theirs, read), data=rows)
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert (report["largest_logit_difference"] is not None) == compared


# Lightning's advice: here it is on purpose.
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_modes_are_as_before(fit, load):
    theirs = get_peft_model(load(), config_of_peft())
    theirs.get_submodule("base_model.model.model.layers.0").eval()
    modes = {name: module.training for name, module in theirs.named_modules()}
    assert len(set(modes.values())) == 2
    fit(Foreign(theirs))
    assert {name: module.training for name, module in theirs.named_modules()} == modes


def test_the_trained_one_of_two_models(fit, load, bases, tmp_path):
    class WithReference(Foreign):
        def __init__(self, reference, model):
            super().__init__(model)
            self.a_reference = reference

    reference = load("gpt2").requires_grad_(False)
    theirs = get_peft_model(load(), config_of_peft())
    module = WithReference(reference, theirs)
    module._modules = dict(sorted(module._modules.items()))
    assert language_model(module) is theirs.get_base_model()
    fit(module)
    assert_same_as_peft(tmp_path, bases / "llama", theirs)


def test_the_revision_that_was_loaded(fit, load, bases, tmp_path, monkeypatch):
    asked = []

    def fetched(name, revision=None, **options):
        asked.append((name, revision))
        return str(bases / "llama")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    model = load()
    model.config.name_or_path = "somebody/llama"
    model.config._commit_hash = "0123abcd"
    fit(Foreign(get_peft_model(model, config_of_peft())))
    assert set(asked) == {("somebody/llama", "0123abcd")}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/llama"


def peft_model(base, **options):
    return get_peft_model(base, config_of_peft(**options))


def second_adapter(base):
    model = peft_model(base)
    model.add_adapter("second", config_of_peft(r=2))
    model.base_model.set_adapter(["default", "second"])
    return model


def switched_off(base):
    model = peft_model(base)
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def folded(base):
    model = peft_model(base)
    model.merge_adapter()
    return model


def norms_trained(base):
    model = peft_model(base)
    model.get_base_model().model.norm.requires_grad_(True)
    return model


def scale_of_zero(base):
    model = peft_model(base)
    model.get_base_model().get_submodule(Q_PROJ).scaling["default"] = 0.0
    return model


def ours_with_a_trained_head(base):
    inject_adapters(base, AdapterSpec(rank=2))
    base.lm_head.requires_grad_(True)
    return base


ADAPTER = "PEFT's configuration of adapter 'default'"
PLAIN = "which plain LoRA does not have."
BESIDE = (
    "is trained beside the adapters (1 such weights), and merging them into the base would lose "
    "it: freeze it with requires_grad_(False)."
)
REFUSED = {
    "dora": (
        lambda base: peft_model(base, use_dora=True),
        f"{ADAPTER} sets use_dora to True, {PLAIN}",
    ),
    "bias": (lambda base: peft_model(base, bias="all"), f"{ADAPTER} sets bias to 'all', {PLAIN}"),
    "modules_to_save": (
        lambda base: peft_model(base, modules_to_save=["lm_head"]),
        f"{ADAPTER} sets modules_to_save to ['lm_head'], {PLAIN}",
    ),
    "tokens": (
        lambda base: peft_model(base, trainable_token_indices=[3]),
        f"{ADAPTER} sets trainable_token_indices to [3], {PLAIN}",
    ),
    "pissa": (
        lambda base: peft_model(base, init_lora_weights="pissa"),
        f"{ADAPTER} sets init_lora_weights to 'pissa', which may change the base weights, too; "
        "convert the adapter to plain LoRA with PEFT first.",
    ),
    "embedding": (
        lambda base: peft_model(base, target_modules=["q_proj", "embed_tokens"]),
        "model.embed_tokens adapts Embedding; only adapters of linear maps can be merged and "
        "written. Leave it out of target_modules.",
    ),
    "several": (
        second_adapter,
        "Exactly one adapter of PEFT must be active to be written, here default, second; choose "
        "one with set_adapter.",
    ),
    "disabled": (
        switched_off,
        f"The adapter of {Q_PROJ} is disabled; call enable_adapter_layers first.",
    ),
    "merged": (folded, f"The adapter of {Q_PROJ} is merged; call unmerge_adapter first."),
    "ia3": (
        lambda base: get_peft_model(
            base, IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        ),
        f"{ADAPTER} has peft_type 'IA3'; only LORA can be read.",
    ),
    "adalora": (
        lambda base: get_peft_model(base, AdaLoraConfig(target_modules=["q_proj"], total_step=9)),
        f"{ADAPTER} has peft_type 'ADALORA'; only LORA can be read.",
    ),
    "prompts": (
        lambda base: get_peft_model(
            base, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        ),
        f"{ADAPTER} has peft_type 'PROMPT_TUNING'; only LORA can be read.",
    ),
    "norms": (norms_trained, f"model.norm.weight {BESIDE}"),
    "head": (ours_with_a_trained_head, f"lm_head.weight {BESIDE}"),
    "zero": (scale_of_zero, f"The scale of {Q_PROJ} must be positive and finite, got 0.0."),
}


def refusal(fit, module, *arguments):
    with pytest.raises(UserError) as caught:
        fit(module, *arguments)
    assert module.trainer.global_step == 0
    return str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_plain_lora_cannot_say_stops_the_fit_at_its_start(fit, load, tmp_path, case):
    make, message = REFUSED[case]
    assert refusal(fit, Foreign(make(load()))) == message
    assert list(tmp_path.iterdir()) == []


def test_a_trained_bias_of_the_adapter_is_refused(fit, load):
    theirs = get_peft_model(load("gpt2"), config_of_peft("gpt2", lora_bias=True))
    assert refusal(fit, Foreign(theirs)) == f"{ADAPTER} sets lora_bias to True, {PLAIN}"


# PEFT's own advice on such a target.
@pytest.mark.filterwarnings("ignore:Model (with `tie_word_embeddings=True` and the|has)")
def test_an_adapted_head_that_is_tied_is_refused(fit, load):
    theirs = peft_model(load("tied"), target_modules=["q_proj", "lm_head"])
    assert refusal(fit, Foreign(theirs)) == (
        "lm_head shares its weight with model.embed_tokens.weight: merging an adapter would change "
        "both. Leave it out of targets, or untie the weights first."
    )


@pytest.mark.parametrize("adapt", [peft_model, lambda base: base], ids=["peft", "full"])
def test_a_model_without_folder_stops_the_fit_at_its_start(fit, make_llama, adapt):
    module = Foreign(adapt(make_llama(53)))
    assert refusal(fit, module) == (
        "LlamaForCausalLM was not loaded from a folder, so there is no base to merge into: save "
        "the model before it is adapted (save_pretrained), and give MergeAdapters that folder as "
        "base_model."
    )


def test_a_model_without_folder_whose_base_was_saved(fit, make_llama, tmp_path):
    model = make_llama(53)
    model.save_pretrained(tmp_path / "saved")
    theirs = peft_model(model, use_rslora=True)
    fit(Foreign(theirs), MergeAdapters(base_model=str(tmp_path / "saved")))
    assert_same_as_peft(tmp_path, tmp_path / "saved", theirs)


def test_a_base_that_is_gone_stops_the_fit_at_its_start(fit, bases, tmp_path):
    moved = shutil.copytree(bases / "llama", tmp_path / "base")
    theirs = peft_model(AutoModelForCausalLM.from_pretrained(moved).train())
    shutil.rmtree(moved)
    assert refusal(fit, Foreign(theirs)) == f"Base model {moved} does not exist."


def changed_by_hand(model):
    """Return the model with a base that is no longer the one on disk."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def test_weights_that_are_not_the_bases_are_warned_about(fit, load, bases, tmp_path):
    theirs = peft_model(changed_by_hand(load()))
    with pytest.warns(UserWarning, match="is not the model that was trained") as told:
        fit(Foreign(theirs))
    expected = logits(theirs)[:1]
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))[:1]
    largest, difference = expected.abs().max().item(), (merged - expected).abs().max().item()
    assert [str(each.message) for each in told if each.category is UserWarning] == [
        f"{tmp_path / 'merged'} is not the model that was trained: their logits differ by up to "
        f"{difference:.2g}, where the largest is {largest:.2g}. The adapters were trained on other "
        f"weights than those in {bases / 'llama'}; give MergeAdapters the folder of those as "
        "base_model."
    ]


@pytest.mark.parametrize("in_training", [True, False])
def test_a_comparison_that_fails_costs_nothing(fit, load, tmp_path, monkeypatch, in_training):
    """As of a model that needs more than token ids, or cannot be loaded beside another one."""
    theirs = peft_model(load())
    forward = LlamaForCausalLM.forward

    def failing(self, *args, labels=None, **kwargs):
        is_trained = self is theirs.get_base_model()
        if labels is None and is_trained == in_training:
            raise ValueError("pixel_values are needed\nand more")
        return forward(self, *args, labels=labels, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", failing)
    with pytest.warns(UserWarning, match="not compared") as told:
        fit(Foreign(theirs))
    assert [str(each.message) for each in told if each.category is UserWarning] == [
        "The merged model was not compared with the one in training: ValueError: pixel_values are "
        "needed"
    ]
    monkeypatch.undo()
    assert theirs.training
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(theirs))
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["largest_logit_difference"] is None


def test_a_row_of_one_fit_is_not_shown_to_the_model_of_the_next(fit, load, make_llama, tmp_path):
    make_llama(700).save_pretrained(tmp_path / "large")
    large = AutoModelForCausalLM.from_pretrained(tmp_path / "large").train()
    callback, rows = MergeAdapters(), [{"input_ids": row + 600} for row in IDS]
    fit(Foreign(peft_model(large)), callback, DataLoader(rows, batch_size=2))
    theirs = peft_model(load())
    fit(Foreign(theirs), callback)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(theirs))
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["largest_logit_difference"] < 1e-4


SAVE_FIRST = (
    "a merge would take all but the adapters from there. Save the model before it is adapted "
    "(save_pretrained), and give MergeAdapters that folder as base_model."
)


def ours(model):
    inject_adapters(model, AdapterSpec(rank=4, alpha=6.0))
    return model


@pytest.mark.parametrize("adapt", [lambda base: peft_model(base, task_type=None), ours])
def test_a_head_that_was_drawn_stops_the_fit_at_its_start(fit, bases, tmp_path, adapt):
    module = Classification(adapt(classifier(bases / "llama").requires_grad_(False)))
    assert refusal(fit, module) == (
        f"LlamaForSequenceClassification has a score, {bases / 'llama'} has none: {SAVE_FIRST}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_resized_embeddings_stop_the_fit_at_its_start(fit, load, bases, kind):
    model = load(kind)
    model.resize_token_embeddings(60, mean_resizing=False)
    is_gpt2 = kind == "gpt2"
    options = {"target_modules": TARGETS["gpt2" if is_gpt2 else "llama"], "fan_in_fan_out": is_gpt2}
    name = "transformer.wte.weight" if is_gpt2 else "model.embed_tokens.weight"
    width = model.config.hidden_size
    assert refusal(fit, Foreign(peft_model(model, **options))) == (
        f"{name} has shape [60, {width}] in the model and [53, {width}] in {bases / kind}: "
        f"{SAVE_FIRST}"
    )


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_base_in_4_bit_is_of_the_sizes_that_it_was_loaded_from(bases, storage):
    """FSDP needs one dtype of all weights: bitsandbytes then packs them into floats."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage)
    base = bases / "llama"
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == storage
    refuse_other_weights(peft_model(model).get_base_model(), ModelFolder(base))
    model.resize_token_embeddings(60, mean_resizing=False)
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \[60, 24\]"):
        refuse_other_weights(model, ModelFolder(base))


def test_a_head_of_another_size_stops_the_fit_at_its_start(fit, bases, tmp_path):
    classifier(bases / "llama", labels=2).save_pretrained(tmp_path / "two")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "two", num_labels=3, pad_token_id=0, ignore_mismatched_sizes=True
    )
    theirs = peft_model(model, task_type=None)
    assert refusal(fit, Classification(theirs)) == (
        f"score.weight has shape [3, 24] in the model and [2, 24] in {tmp_path / 'two'}: "
        f"{SAVE_FIRST}"
    )


def test_a_classifier_whose_base_has_its_head(fit, bases, tmp_path):
    base = tmp_path / "base"
    classifier(bases / "llama").save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base).train()
    theirs = peft_model(model, task_type=None)
    fit(Classification(theirs))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert_close(merged(input_ids=IDS).logits, theirs.eval()(input_ids=IDS).logits)


def test_a_head_that_is_stored_under_another_name_is_found(fit, tmp_path):
    """As Pythia's, which transformers renames as it loads it."""
    sizes = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = GPTNeoXConfig(**sizes, num_attention_heads=4, initializer_range=0.2)
    GPTNeoXForCausalLM(config).save_pretrained(base := tmp_path / "base")
    names = load_file(base / "model.safetensors").keys()
    assert "embed_out.weight" in names
    assert "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(base).train()
    theirs = peft_model(model, target_modules=["query_key_value"])
    fit(Foreign(theirs))
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(theirs))


def test_the_base_of_another_model_stops_the_fit_at_its_start(fit, load, bases):
    callback = MergeAdapters(base_model=str(bases / "gpt2"))
    assert refusal(fit, Foreign(peft_model(load())), callback) == (
        f"The adapter has matrices for {Q_PROJ}, of which {bases / 'gpt2'} has no weight: it was "
        "trained on another base model."
    )
