"""The contraction's orders inside of a fit: when they are allowed, that they train the same."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from rslightning import hf
from rslightning.batch import Batch
from rslightning.callbacks import BeforeAfter
from rslightning.errors import UserError
from rslightning.hf import compile_decoder_layers
from rslightning.rslora import AdapterSpec, contraction, rounding
from rslightning.rslora.linear import adapter_layers

FAST = partial(torch.optim.AdamW, lr=3e-2)
SLOW = partial(torch.optim.AdamW, lr=1e-6)


class Watch(Callback):
    """Notes, for each step, which layers may merge, and the loss."""

    def __init__(self):
        self.merging, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layers = adapter_layers(pl_module.model)
        self.merging.append({path for path, layer in layers if layer.merges_in_16_bit})
        self.losses.append(float(outputs["loss"]))


class SaveThird(Callback):
    """Saves when three steps are done, before one at which nothing is measured."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path, weights_only=False)


def fit(make_trainer, module, data, steps, ckpt_path=None, precision="bf16-mixed", callbacks=()):
    watch = Watch()
    torch.manual_seed(3)
    trainer = make_trainer(max_steps=steps, precision=precision, callbacks=[watch, *callbacks])
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return watch


def build(module):
    module.configure_model()
    return module.model


def lost(layer):
    """Return the share of the update that rounding W' to bfloat16 loses, in float64."""
    update = layer.gamma * layer.lora_b.double() @ layer.lora_a.double()
    exact = layer.weight.double() + update
    return float((exact.bfloat16().double() - exact).norm() / update.norm())


def test_layers_merge_in_16_bit_once_their_update_is_large(make_trainer, make_module, make_data):
    module = make_module(optimizer=FAST, dtype="bfloat16")
    watch = fit(make_trainer, module, make_data(), 4)
    everything = {path for path, _ in adapter_layers(module.model)}
    assert watch.merging[0] == set()
    assert watch.merging[3] == watch.merging[2] == everything  # measured before step 2, not 3
    with torch.no_grad():
        assert max(lost(layer) for _, layer in adapter_layers(module.model)) < 0.25


def test_layers_do_not_merge_while_their_update_is_small(make_trainer, make_module, make_data):
    module = make_module(optimizer=SLOW, dtype="bfloat16")
    assert fit(make_trainer, module, make_data(), 4).merging == [set()] * 4
    with torch.no_grad():
        assert min(lost(layer) for _, layer in adapter_layers(module.model)) > 0.25


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_compiled_merges_as_a_whole(
    make_trainer, make_module, make_data, monkeypatch, compiled
):
    monkeypatch.setattr(hf, "compile_decoder_layers", lambda model: None)
    module = make_module(optimizer=FAST, dtype="bfloat16", compile=compiled)
    late, *others = (path for path, _ in adapter_layers(build(module)))
    measured = rounding.lost_in_rounding

    def more_in_one(layer, dtype):
        return measured(layer, dtype) + (layer is module.model.get_submodule(late))

    monkeypatch.setattr(rounding, "lost_in_rounding", more_in_one)
    watch = fit(make_trainer, module, make_data(), 3)
    assert watch.merging[2] == (set() if compiled else set(others))


def test_in_32_bit_nothing_is_measured(make_trainer, make_module, make_data):
    module = make_module(optimizer=FAST)
    assert fit(make_trainer, module, make_data(), 3, precision="32-true").merging == [set()] * 3


def test_merged_orders_train_as_the_usual_one(make_trainer, make_module, make_data, monkeypatch):
    spec = AdapterSpec(rank=16, alpha=4.0)  # rank and tokens where W' and G win
    make = partial(make_module, optimizer=FAST, dtype="bfloat16", adapter=spec)
    merged = fit(make_trainer, make(), make_data(), 8)
    assert merged.merging[-1]
    monkeypatch.setattr(contraction, "ORDERS", contraction.SPLIT_ORDERS)
    contraction._choose.cache_clear()
    usual = fit(make_trainer, make(), make_data(), 8)
    contraction._choose.cache_clear()
    assert merged.losses != usual.losses  # another order was taken indeed
    assert merged.losses == pytest.approx(usual.losses, rel=5e-3)
    assert usual.losses[-1] < 0.9 * usual.losses[0]


def test_a_resumed_run_takes_the_same_orders(make_trainer, make_module, make_data, tmp_path):
    make = partial(make_module, optimizer=FAST, dtype="bfloat16")
    whole = make()
    path = tmp_path / "third.ckpt"
    watched = fit(make_trainer, whole, make_data(), 4, callbacks=[SaveThird(path)])
    resumed = make()
    again = fit(make_trainer, resumed, make_data(), 4, ckpt_path=path)
    assert again.merging == watched.merging[3:]
    assert again.merging[0]
    assert again.losses == watched.losses[3:]
    for name, tensor in whole.trainable_state().items():
        assert torch.equal(tensor, resumed.trainable_state()[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile stumbles over warnings of its own
def test_compiled_decoder_layers_train_the_same(make_trainer, make_module, make_data, monkeypatch):
    quick = partial(compile_decoder_layers, backend="aot_eager")  # graphs, but no machine code
    monkeypatch.setattr(hf, "compile_decoder_layers", quick)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = fit(make_trainer, make_module(), make_data(), 3, precision="32-true")
    compiled = fit(make_trainer, make_module(compile=True), make_data(), 3, precision="32-true")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("ignore")
def test_lengths_of_evaluation_leave_that_of_training_known(
    make_trainer, make_module, make_data, monkeypatch
):
    lengths = []

    def note(graph, inputs):
        lengths.extend(x.shape[1] for x in inputs if getattr(x, "ndim", 0) == 3)
        return graph.forward

    monkeypatch.setattr(hf, "compile_decoder_layers", partial(compile_decoder_layers, backend=note))
    monkeypatch.setattr("rslightning.data.base._is_on_gpu", lambda tensor: True)  # one shape
    torch._dynamo.reset()
    options = {"callbacks": [BeforeAfter()], "num_sanity_val_steps": 2, "val_check_interval": 1}
    trainer = make_trainer(max_steps=3, check_val_every_n_epoch=None, **options)
    trainer.fit(make_module(compile=True), make_data(packing=True, max_length=200, batch_size=1))
    assert set(lengths) == {200}
    assert all(type(length) is int for length in lengths)


@pytest.mark.filterwarnings("ignore")
def test_answers_are_generated_without_the_compiler(make_module, monkeypatch):
    quick = partial(compile_decoder_layers, backend="aot_eager")
    monkeypatch.setattr(hf, "compile_decoder_layers", quick)
    plain, compiled = make_module(max_new_tokens=4), make_module(compile=True, max_new_tokens=4)
    ids = torch.tensor([[5, 6, 7]])
    batch = Batch(ids, ids, torch.ones_like(ids))
    answers = []
    for module in (plain, compiled):
        module.configure_model()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        answers.append(module.generate(batch))
    assert torch.equal(*answers)
    assert not torch._dynamo.utils.counters["stats"]  # each length of a cache would be translated
    compiled(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_model_that_names_no_layers_is_not_compiled(make_llama):
    model = make_llama(53)
    model._no_split_modules = None
    with pytest.raises(UserError, match=r"LlamaForCausalLM does not say .*; set model.compile to"):
        compile_decoder_layers(model)
