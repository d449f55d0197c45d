"""Bases in 4 and 8 bit, from the configuration to the merged folder."""

import json
import logging
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rslightning import hf
from rslightning.__main__ import main
from rslightning.callbacks import GradientNormMonitor, MergeAdapters, TrainableCheckpoint
from rslightning.checkpoint import load_adapter
from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder
from rslightning.rslora import AdapterSpec, inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.quantized import is_quantized

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the quantization extra)")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}
KINDS = {"nf4": NF4, "fp4": {"load_in_4bit": True}, "int8": INT8}

# The closed form of NormalFloat4 (arXiv:2305.14314, appendix E), to four digits.
NF4_LEVELS = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)


@pytest.fixture(autouse=True)
def quiet_bitsandbytes(caplog):
    """Let it not say at each call that an input is cast."""
    caplog.set_level(logging.ERROR, logger="bitsandbytes")


def load(folder, kind, dtype=torch.float32, **options):
    return hf.load_causal_lm(folder, dtype, quantization=KINDS[kind], **options)


def dense_weight(layer):
    """Return in float64 what a quantized layer multiplies with: its answers to the unit vectors."""
    bias = 0.0 if layer.bias is None else layer.bias
    units = torch.eye(layer.in_features, dtype=getattr(layer, "compute_dtype", torch.float32))
    with torch.no_grad():
        return (layer(units) - bias).T.double()


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_linear_maps_are_packed_and_the_rest_is_not(model_folder, kind):
    model = load(model_folder, kind, torch.bfloat16)
    assert model.training
    quantized = {path for path, module in model.named_modules() if is_quantized(module)}
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(quantized) == 14
    assert linear - quantized == {"lm_head"}
    rest = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in quantized}
    assert {p.dtype for p in rest.values()} == {torch.bfloat16}
    bits = 8 if kind == "int8" else 4
    packed = sum(
        p.numel() for n, p in model.named_parameters() if n.removesuffix(".weight") in quantized
    )
    entries = sum(m.in_features * m.out_features for m in model.modules() if is_quantized(m))
    assert packed == entries * bits // 8


def test_each_nf4_weight_is_a_level_times_its_block_s_largest(model_folder):
    single = NF4 | {"bnb_4bit_use_double_quant": False}
    model = hf.load_causal_lm(model_folder, torch.float32, quantization=single)
    stored = load_file(model_folder / "model.safetensors")
    path = "model.layers.0.mlp.down_proj"
    blocks = stored[f"{path}.weight"].double().reshape(-1, 64)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)
    truth = (levels[nearest] * scale).reshape(24, 40)
    found = dense_weight(model.get_submodule(path))
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4 * float(scale.max()))


def test_dequantized_weights_are_multiplied_in_the_base_s_dtype(model_folder):
    path = "model.layers.1.mlp.up_proj"
    found = {
        dtype: load(model_folder, "nf4", dtype).get_submodule(path).compute_dtype
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert found == {dtype: dtype for dtype in found}
    chosen = NF4 | {"bnb_4bit_compute_dtype": "float16"}
    model = hf.load_causal_lm(model_folder, torch.float32, quantization=chosen)
    assert model.get_submodule(path).compute_dtype == torch.float16


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"load_in_4bits": True},
            "transformers' BitsAndBytesConfig has no argument 'load_in_4bits'; did you mean "
            "'load_in_4bit'?",
        ),
        (
            {"bits": 4},
            "transformers' BitsAndBytesConfig has no argument 'bits'; it has load_in_8bit, ",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"},
            "quantization {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf5'} quantizes nothing: "
            "set load_in_8bit: true, or load_in_4bit: true with a bnb_4bit_quant_type of nf4 or "
            "fp4.",
        ),
        ({}, "quantization {} quantizes nothing: "),
        ({"load_in_8bit": "yes"}, "quantization {'load_in_8bit': 'yes'}: load_in_8bit must be a "),
        (
            NF4 | {"bnb_4bit_compute_dtype": "bf16"},
            "quantization {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4', ",
        ),
        (NF4 | INT8, "quantization {"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(make_module, quantization, message):
    with pytest.raises(UserError) as error:
        make_module(quantization=quantization)
    assert str(error.value).startswith(message)
    assert str(error.value).count("\n") == 0


def test_a_missing_bitsandbytes_is_named_with_the_command(make_module, monkeypatch):
    monkeypatch.setattr("rslightning.rslora.quantized.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        make_module(quantization=NF4)
    assert str(error.value) == (
        "A base in 4 or 8 bit needs bitsandbytes: pip install 'rslightning[quantization]'"
    )


def test_there_must_be_plain_weights_to_quantize(make_module, model_folder, tmp_path):
    module = make_module(quantization=NF4, pretrained=False)
    with pytest.raises(UserError) as error:
        module.configure_model()
    assert str(error.value) == (
        "pretrained: false draws weights to be trained; leave quantization out."
    )
    load(model_folder, "nf4").save_pretrained(tmp_path / "packed")
    with pytest.raises(UserError, match=r"is stored quantized already; leave quantization out\."):
        make_module(tmp_path / "packed", quantization=NF4).configure_model()


def test_a_quantized_base_is_not_trained_itself(make_trainer, make_module, make_data):
    with pytest.raises(UserError, match=r"^A quantized base is frozen: give model\.adapter a"):
        make_trainer(max_steps=1).fit(make_module(quantization=NF4, adapter=None), make_data())


# --- gradients ------------------------------------------------------------------------------------


class CountCalls(TorchDispatchMode):
    """Count the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        self.counts[name] = self.counts.get(name, 0) + 1
        return operator(*args, **(kwargs or {}))


def adapted_layer(model_folder, kind):
    """Return an adapted quantized layer [24 -> 40] with a random B, and its dense weight."""
    model = load(model_folder, kind)
    dense = dense_weight(model.get_submodule("model.layers.0.mlp.up_proj"))
    inject_adapters(model, AdapterSpec(rank=3, alpha=5.0))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    nn.init.normal_(layer.lora_b, generator=torch.Generator().manual_seed(1))
    return layer, dense


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_dense_weight(model_folder, kind):
    layer, dense = adapted_layer(model_folder, kind)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
    weight = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(3))
    y = layer(x)
    (y * weight).sum().backward()

    x64, a, b = (t.detach().double().requires_grad_() for t in (x, layer.lora_a, layer.lora_b))
    truth = x64 @ (dense + 5.0 / 3**0.5 * b @ a).T
    (truth * weight.double()).sum().backward()
    scale = float(truth.detach().abs().max())
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-6 * scale)
    for ours, theirs in ((x, x64), (layer.lora_a, a), (layer.lora_b, b)):
        atol = 2e-6 * float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=atol)
    assert all(p.grad is None for p in layer.base.parameters())


def test_a_4_bit_weight_is_dequantized_once_per_use(model_folder):
    layer, _ = adapted_layer(model_folder, "nf4")
    x = torch.randn(2, 5, 24, requires_grad=True)
    with CountCalls() as forward:
        y = layer(x)
    with CountCalls() as backward:
        y.sum().backward()
    # The product has the dequantization inside; the backward pass makes the two one by one.
    operators = [f"bitsandbytes.{name}_4bit.default" for name in ("gemm", "dequantize")]
    for calls in (forward, backward):
        assert sum(calls.counts.get(name, 0) for name in operators) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_validation_in_between_changes_no_gradient(model_folder, kind):
    """On some CPUs bitsandbytes would repack the weights at the first evaluation, for good."""
    model = load(model_folder, kind)
    inject_adapters(model, AdapterSpec(rank=3))
    ids = torch.arange(3, 14)[None]

    def gradients():
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return [layer.lora_b.grad.clone() for _, layer in adapter_layers(model)]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(ids)
    model.train()
    assert all(map(torch.equal, gradients(), before))
    assert min(float(g.norm()) for g in before) > 0


def test_recomputed_layers_have_the_same_gradients(model_folder):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = load(model_folder, "nf4", activation_checkpointing=checkpointing)
        inject_adapters(model, AdapterSpec(rank=3))
        model(torch.arange(3, 14)[None]).logits.square().mean().backward()
        found.append([layer.lora_b.grad for _, layer in adapter_layers(model)])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=0)
    assert min(float(g.norm()) for g in found[1]) > 0


# --- a fit, its checkpoint and what it leaves -----------------------------------------------------


def fit(make_trainer, module, data, *callbacks, **options):
    torch.manual_seed(7)
    defaults = {"max_steps": 3, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = make_trainer(callbacks=list(callbacks), **(defaults | options))
    trainer.fit(module, data)
    return trainer


@pytest.fixture(params=["nf4", "int8"])
def trained(request, make_trainer, make_module, make_data, tmp_path):
    """Return a module after three steps with `adapter/`, `merged/` and a checkpoint, and its kind.

    Only the attention is adapted, so that maps without adapter are quantized, too.
    """
    adapter = AdapterSpec(rank=3, alpha=5.0, targets="attention")
    module = make_module(quantization=KINDS[request.param], adapter=adapter)
    callbacks = (MergeAdapters(), GradientNormMonitor(every_n_steps=1), TrainableCheckpoint())
    fit(make_trainer, module, make_data(), *callbacks, enable_checkpointing=True)
    return module.eval(), request.param


def test_only_adapters_are_saved_and_the_hyperparameters_are_plain(trained, tmp_path):
    _, kind = trained
    content = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["quantization"] == KINDS[kind]
    assert len(content["state_dict"]) == 16
    assert {name.rpartition(".")[2] for name in content["state_dict"]} == {"lora_a", "lora_b"}
    described = content["quantized"]
    assert described["scheme"] == kind
    assert len(described["modules"]) == 14


def seen(module, path):
    """Return in float64 the weight that a layer of a trained module computes with."""
    layer = module.model.get_submodule(path)
    return dense_weight(getattr(layer, "base", layer).train())


def test_the_merged_folder_is_the_dequantized_base_with_the_update(trained, model_folder, tmp_path):
    module, kind = trained
    merged = load_file(tmp_path / "merged/model.safetensors")
    base = load_file(model_folder / "model.safetensors")
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert merged.keys() == base.keys()
    assert len(report["layers"]) == 8
    for name, tensor in merged.items():
        path = name.removesuffix(".weight")
        layer = module.model.get_submodule(path)
        if not is_quantized(getattr(layer, "base", layer)):
            assert torch.equal(tensor, base[name])
            continue
        weight = seen(module, path)
        delta = torch.zeros_like(weight)
        if path in report["layers"]:
            delta = 5.0 / 3**0.5 * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
            error = (weight - base[name].double()).norm() / base[name].double().norm()
            numbers = report["layers"][path]
            assert numbers["quantization_error"] == pytest.approx(error.item(), rel=1e-4)
            assert numbers["update_norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
            assert numbers["weight_norm"] == pytest.approx(weight.norm().item(), rel=1e-5)
            assert numbers["lost_share"] < 1e-4
        scale = float(weight.abs().max())
        torch.testing.assert_close(tensor.double(), weight + delta, rtol=0, atol=1e-6 * scale)
    assert report["dequantized_from"] == kind
    largest = max(numbers["quantization_error"] for numbers in report["layers"].values())
    assert (0.05 < largest < 0.12) if kind == "nf4" else (0.001 < largest < 0.01)


def test_the_merged_folder_opens_anywhere_and_computes_the_same(trained, make_data, tmp_path):
    module, kind = trained
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert not any(is_quantized(child) for child in reloaded.modules())
    data = make_data()
    data.setup("fit")
    ids = next(iter(data.val_dataloader())).input_ids
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    with torch.no_grad():
        ours, theirs = module.model(ids).logits, reloaded(ids).logits
    # In evaluation 8-bit layers quantize their input as well, which no merged weight can hold.
    limit = 1e-4 if kind == "nf4" else 0.3
    assert (ours - theirs).abs().max() < limit
    assert 0 < report["largest_logit_difference"] < limit
    plain = AutoModelForCausalLM.from_pretrained(module.base_model, dtype="auto").eval()
    with torch.no_grad():
        assert (ours - plain(ids).logits).abs().max() > 2 * limit  # it learned something


def test_the_command_line_merges_the_same_from_whatever_is_left(trained, tmp_path, capsys):
    _, kind = trained
    truth = load_file(tmp_path / "merged/model.safetensors")
    for source in ("checkpoints/last.ckpt", "adapter"):
        output = tmp_path / f"from_{source[:5]}"
        assert main(["merge", "--checkpoint", str(tmp_path / source), "--output", str(output)]) == 0
        found = load_file(output / "model.safetensors")
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        said = capsys.readouterr().out
        assert f"(float32, onto the base dequantized from {kind}); rounding lost" in said
    copy = tmp_path / "exported"
    main(["export", "--checkpoint", str(tmp_path / "adapter"), "--output", str(copy)])
    assert load_adapter(copy).quantized == load_adapter(tmp_path / "adapter").quantized


def test_without_quantization_json_the_stored_weights_are_merged_into(trained, tmp_path):
    (tmp_path / "adapter/quantization.json").unlink()
    output = tmp_path / "onto_stored"
    main(["merge", "--checkpoint", str(tmp_path / "adapter"), "--output", str(output)])
    base = load_file(f"{trained[0].base_model}/model.safetensors")
    found = load_file(output / "model.safetensors")
    path = "model.layers.0.mlp.up_proj.weight"  # not adapted
    assert torch.equal(found[path], base[path])


def test_peft_opens_the_adapter_over_a_quantized_base(trained, model_folder, tmp_path):
    from peft import PeftModel

    module, kind = trained
    peft = PeftModel.from_pretrained(load(model_folder, kind), tmp_path / "adapter").eval()
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(peft(ids).logits, module.model(ids).logits, rtol=0, atol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, make_module, make_data, tmp_path):
    module = make_module(quantization=NF4)
    fit(make_trainer, module, make_data(), max_steps=4)
    half = fit(make_trainer, make_module(quantization=NF4), make_data(), max_steps=2)
    half.save_checkpoint(tmp_path / "two.ckpt", weights_only=False)
    again = make_module(quantization=NF4)
    options = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None}
    make_trainer(**options).fit(again, make_data(), ckpt_path=tmp_path / "two.ckpt")
    for name, tensor in module.trainable_state().items():
        assert torch.equal(again.trainable_state()[name], tensor), name


def test_another_quantization_than_the_checkpoint_s_is_refused(
    make_trainer, make_module, make_data, tmp_path
):
    half = fit(make_trainer, make_module(quantization=INT8), make_data(), max_steps=1)
    half.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    with pytest.raises(UserError) as error:
        make_trainer(max_steps=2).fit(make_module(), make_data(), ckpt_path=tmp_path / "one.ckpt")
    assert str(error.value) == (
        "The checkpoint has quantization {'load_in_8bit': True}, this run None; set it to the "
        "checkpoint's, or start a new run."
    )


def test_training_lowers_the_loss_and_leaves_the_base_alone(make_trainer, make_module, make_data):
    module, data = make_module(quantization=NF4), make_data()
    module.configure_model()
    packed = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    trainer = fit(make_trainer, module, data, max_steps=1)
    first = trainer.callback_metrics["train/loss"].item()
    trainer = fit(make_trainer, module, data, max_steps=12)
    assert trainer.callback_metrics["train/loss"].item() < first - 0.2
    frozen = dict(module.named_parameters())
    assert len(packed) > 14
    assert all(torch.equal(frozen[name], tensor) for name, tensor in packed.items())


def test_two_processes_train_as_one(make_trainer, make_module, make_data, run_processes, tmp_path):
    def train(rank):
        module = make_module(quantization=NF4)
        options = {"strategy": "ddp", "devices": 2, "limit_val_batches": 1, "max_steps": 3}
        fit(make_trainer, module, make_data(batch_size=2), MergeAdapters(), **options)
        if rank == 0:
            torch.save(module.trainable_state(), tmp_path / "two.pt")

    assert run_processes(2, train) == [0, 0]
    module = make_module(quantization=NF4)
    fit(make_trainer, module, make_data(batch_size=4), limit_val_batches=1)
    found, truth = torch.load(tmp_path / "two.pt"), module.trainable_state()
    for name, tensor in truth.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:Rounding to bfloat16 lost")
def test_a_bfloat16_base_is_merged_in_bfloat16(make_trainer, make_module, make_data, tmp_path):
    module = make_module(quantization=NF4, dtype="bfloat16")
    fit(make_trainer, module, make_data(), MergeAdapters("bfloat16"), precision="bf16-mixed")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for path, layer in adapter_layers(module.model):
        assert layer.lora_a.dtype == torch.float32
        weight = seen(module, path)
        delta = 5.0 / 3**0.5 * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
        error = (merged[f"{path}.weight"].double() - weight - delta).abs()
        assert (error <= 2**-8 * (weight + delta).abs() + 1e-6).all()
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert 0 < report["largest_logit_difference"] < 0.5


# --- GPT-2 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_conv1d_is_merged_as_it_is_stored(
    kind, make_gpt2, make_trainer, make_module, make_data, model_folder, tmp_path
):
    """Its weights are [in, out] on disk and [out, in] when quantized; attn.c_proj is square."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    folder = tmp_path / "gpt2"
    make_gpt2(vocab_size=len(tokenizer), n_positions=128).save_pretrained(folder)
    module = make_module(folder, quantization=KINDS[kind])
    fit(make_trainer, module, make_data(), MergeAdapters())
    assert set(load_adapter(tmp_path / "adapter").quantized.modules.values()) == {True}
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train(False)
    path = "transformer.h.0.attn.c_proj"
    layer = module.model.get_submodule(path)
    update = 5.0 / 3**0.5 * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
    found = reloaded.get_submodule(path).weight.detach().double()
    assert found.shape == (24, 24)
    truth = (seen(module, path) + update).T
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)


# --- PEFT -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_a_quantized_model_of_peft_is_merged_likewise(
    model_folder, make_trainer, make_data, tmp_path
):
    from lightning.pytorch import LightningModule
    from peft import LoraConfig, get_peft_model

    class Theirs(LightningModule):
        def __init__(self):
            super().__init__()
            config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
            self.model = get_peft_model(load(model_folder, "nf4"), config)

        def training_step(self, batch, batch_idx):
            labels = batch.labels.masked_fill(batch.labels < 0, -100)
            return self.model(input_ids=batch.input_ids, labels=labels).loss

        def configure_optimizers(self):
            return partial(optim.AdamW, lr=1e-2)([p for p in self.parameters() if p.requires_grad])

    module, data = Theirs(), make_data()
    data.setup("fit")
    make_trainer(max_steps=3, callbacks=[MergeAdapters()]).fit(module, data.train_dataloader())
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["dequantized_from"] == "nf4"
    assert len(report["layers"]) == 4
    assert len(load_adapter(tmp_path / "adapter").quantized.modules) == 14
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 14)[None]
    module.eval()
    with torch.no_grad():
        ours = module.model(input_ids=ids).logits
        torch.testing.assert_close(reloaded(ids).logits, ours, rtol=0, atol=1e-4)


# --- a base that is quantized on disk -------------------------------------------------------------


def test_a_base_that_is_stored_quantized_is_refused_at_the_start_of_the_fit(
    model_folder, make_trainer, make_module, make_data, tmp_path
):
    packed = tmp_path / "packed"
    load(model_folder, "nf4").save_pretrained(packed)
    module = make_module(packed)
    with pytest.raises(UserError) as error:
        make_trainer(max_steps=1, callbacks=[MergeAdapters()]).fit(module, make_data())
    assert str(error.value) == (
        f"{packed} is stored quantized, and holds no plain weights to merge into; name the model "
        "that it was made from (--base-model, merge_adapters.base_model)."
    )


def test_its_adapter_is_merged_into_the_model_that_it_was_made_from(
    model_folder, make_trainer, make_module, make_data, tmp_path
):
    packed = tmp_path / "packed"
    load(model_folder, "nf4").save_pretrained(packed)
    module = make_module(packed)
    callback = MergeAdapters(base_model=str(model_folder))
    make_trainer(max_steps=3, callbacks=[callback]).fit(module, make_data())
    assert "quantization_config" in ModelFolder(packed).config
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 14)[None]
    module.eval()
    with torch.no_grad():
        ours = module.model(ids).logits
        torch.testing.assert_close(reloaded(ids).logits, ours, rtol=0, atol=1e-4)
