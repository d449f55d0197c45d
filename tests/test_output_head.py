"""The loss that the head returns is that of the whole logits, wherever a model lets it."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rslightning import CausalLMModule, cost
from rslightning.batch import IGNORED, Batch
from rslightning.callbacks import NonFiniteGuard
from rslightning.errors import RunError
from rslightning.losses import token_nats
from rslightning.output_head import logits_are_of_head, nats_for_logits
from rslightning.rslora import AdapterSpec, inject_adapters

V, B, T = 53, 3, 7
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # so that caps matter
}
GEMMA = {"head_dim": 10, "sliding_window": 3, **SIZES}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPTJ = {"vocab_size": V, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
OPT = {"ffn_dim": 40, "word_embed_proj_dim": 24, "max_position_embeddings": 32, "dropout": 0.0}

PLAIN = {
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(rotary_dim=4, **NO_DROPOUT, **GPTJ)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),  # tied to the embedding
    "mixtral": lambda: MixtralForCausalLM(
        # The grouped product of experts has no float64.
        MixtralConfig(
            num_local_experts=3,
            output_router_logits=True,
            experts_implementation="eager",
            **SIZES,
        )
    ),
    "unscaled granite": lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=1.0, **SIZES)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, **SIZES)),  # asks its base model's decoder
}
CHANGED = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=1.5, **GEMMA)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(logit_scale=0.25, **SIZES)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=8.0, **SIZES)),
}


@pytest.fixture
def build(make_llama, make_gpt2):
    """Return a function from a name to a random model in float64."""
    made_here = {"llama": partial(make_llama, V), "gpt2": partial(make_gpt2, **NO_DROPOUT)}

    def make(name):
        torch.manual_seed(0)
        return (made_here | PLAIN)[name]().double()

    return make


def batch_of(labels=None):
    """Return ids with an uneven number of targets per row, one row padded at its end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (B, T), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    if labels is None:
        labels = ids.clone()
        labels[0, :3] = labels[1, :6] = labels[mask == 0] = IGNORED
    return Batch(ids, labels, mask)


def output(model, batch):
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return model(**given, use_cache=False).logits


def gradients_of(model, nats):
    model.zero_grad()
    nats.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", *PLAIN])
def test_nats_and_gradients_are_those_of_the_whole_logits(build, monkeypatch, name):
    """In full fine-tuning, so that the gradient of the head, also of a tied one, is compared."""
    monkeypatch.setattr(cost, "CHUNK_BYTES", 4 * V * 8)
    model, batch = build(name), batch_of()
    assert logits_are_of_head(model)
    with nats_for_logits(model, batch.labels):
        nats = output(model, batch)
    assert nats.shape == (1, 1, 1)
    found = gradients_of(model, nats.squeeze())
    scores = output(model, batch)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(scores, batch.labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(nats.squeeze(), expected)
    expected = gradients_of(model, expected)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-7, atol=1e-9)


def test_a_head_with_a_bias_is_covered(build):
    head, tied = build("gptj").get_output_embeddings(), build("gemma3")
    assert head.bias is not None
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize("name", CHANGED)
def test_logits_that_are_more_than_the_product(name):
    model = CHANGED[name]()
    assert not logits_are_of_head(model)
    assert "forward" not in vars(model.lm_head) | vars(model.base_model)


def own_forward(model):
    class Quantized(nn.Linear):
        def forward(self, x):
            return super().forward(x).round()

    model.lm_head = Quantized(24, V, bias=False)


def hook(model):
    model.lm_head.register_forward_hook(lambda *arguments: arguments[-1] * 2)


def adapter(model):
    inject_adapters(model, AdapterSpec(rank=3, targets=["lm_head"]))


def other_forward(model):
    vars(model.lm_head)["forward"] = lambda x: x


def packed_weight(model):
    class Packed(nn.Parameter):
        pass

    model.lm_head.weight = Packed(model.lm_head.weight.data)


def in_place(model):
    def scale(_, inputs, output):
        output.logits *= 2

    model.register_forward_hook(scale)


def two_calls(model):
    def call_again(*_):
        model.lm_head(torch.zeros(1, 2, 24))

    model.register_forward_hook(call_again)


def failure(model):
    def fail(*_):
        raise ArithmeticError

    model.register_forward_hook(fail)


def no_head(model):
    model.get_output_embeddings = lambda: None


@pytest.mark.parametrize(
    "change",
    [
        own_forward,
        other_forward,
        packed_weight,
        adapter,
        hook,
        in_place,
        two_calls,
        failure,
        no_head,
    ],
)
def test_a_head_that_is_not_a_plain_linear_map(make_llama, change):
    model = make_llama(V)
    assert logits_are_of_head(model)
    change(model)
    assert not logits_are_of_head(model)


def test_the_trial_reads_no_weight_and_leaves_no_trace(make_llama):
    with torch.device("meta"):
        model = make_llama(V)
    state, modules = torch.get_rng_state(), [dict(vars(m)) for m in model.modules()]
    assert logits_are_of_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [dict(vars(m)) for m in model.modules()] == modules


def test_the_head_is_restored_after_an_error(make_llama):
    model, batch = make_llama(V), batch_of()
    before = output(model, batch)
    bad = batch_of(torch.full((B, T), V))
    with pytest.raises(RuntimeError, match="out of bounds"), nats_for_logits(model, bad.labels):
        output(model, bad)
    assert torch.equal(output(model, batch), before)


def test_hooks_of_the_head_see_its_input_and_the_nats(make_llama):
    model, batch, seen = make_llama(V), batch_of(), []
    model.lm_head.register_forward_hook(lambda _, x, y: seen.append((x[0].shape, y.shape)))
    with nats_for_logits(model, batch.labels):
        output(model, batch)
    assert seen == [((B, T, 24), (1, 1, 1))]


def test_a_compiled_model_takes_both_in_turns(make_llama):
    model, graphs = make_llama(V), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for length in (2, 4, 3):
        labels = batch_of().labels.clone()
        labels[:, length:] = IGNORED
        batch = batch_of(labels)
        expected, _ = token_nats(output(model, batch), labels)
        with nats_for_logits(model, labels):
            nats = output(compiled, batch)
        torch.testing.assert_close(nats.squeeze(), expected)
        torch.testing.assert_close(output(compiled, batch), output(model, batch))
    assert len(graphs) == 2  # neither broken nor compiled again


# --- in the module -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptj", "mixtral", *CHANGED])
def test_the_module_has_the_loss_of_its_logits(make_module, tmp_path, name):
    torch.manual_seed(0)
    (CHANGED | PLAIN)[name]().save_pretrained(tmp_path / name)
    module, batch = make_module(tmp_path / name, adapter=None), batch_of()
    module.configure_model()
    assert module.logits_are_of_head is (name not in CHANGED)
    nats, targets = module.nats(batch)
    expected_nats, expected_targets = token_nats(module(batch), batch.labels)
    torch.testing.assert_close(nats, expected_nats)
    assert torch.equal(targets, expected_targets)


def test_an_adapted_head_has_the_loss_of_its_logits(make_module):
    module = make_module(adapter=AdapterSpec(rank=3, targets=["lm_head"]))
    module.configure_model()
    nn.init.normal_(module.model.lm_head.lora_b)
    batch = batch_of()
    assert torch.equal(module.nats(batch)[0], token_nats(module(batch), batch.labels)[0])


def test_a_step_of_the_module_makes_no_whole_logits(
    make_module, make_data, monkeypatch, largest_allocation
):
    monkeypatch.setattr(cost, "CHUNK_BYTES", 2**14)
    module, data = make_module(), make_data()
    module.configure_model()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    whole = batch.labels.numel() * module.model.config.vocab_size * 4
    assert largest_allocation(lambda: module.training_step(batch, 0).backward()) < whole / 4
    module.logits_are_of_head = False
    assert largest_allocation(lambda: module.training_step(batch, 0).backward()) >= whole


def test_a_bad_weight_of_the_head_is_named(make_trainer, make_module, make_data):
    module = make_module()
    module.configure_model()
    module.model.lm_head.weight.data[7, 3] = torch.nan
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[NonFiniteGuard()])
    with pytest.raises(RunError, match=r"the first such value is an output of model\.lm_head\."):
        trainer.fit(module, make_data())


class Recorder(Callback):
    """Keep the logged losses."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())


class Sharded(CausalLMModule):
    """A module that FSDP2 shards: layers, head and the rest."""

    def configure_model(self):
        super().configure_model()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            for part in (*self.model.model.layers, self.model.lm_head, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


@pytest.fixture
def strategies(monkeypatch):
    """Return a function from a name to a strategy over two processes."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "callbacks"))

    def choose(name):
        if name == "zero3":
            cpu = pytest.importorskip("deepspeed_cpu")
            strategy = cpu.CPUDeepSpeedStrategy(stage=3, logging_batch_size_per_gpu=1)
            strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return strategy
        return ModelParallelStrategy(2, 1) if name == "fsdp2" else "ddp"

    return choose


@pytest.mark.parametrize("adapter", [None, AdapterSpec(rank=3)], ids=["full", "adapters"])
@pytest.mark.parametrize(
    "name",
    ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.filterwarnings("ignore"))],
)
def test_two_processes_train_as_by_whole_logits(
    make_trainer, make_data, model_folder, run_processes, tmp_path, strategies, name, adapter
):
    make_data().setup("fit")  # the cache is there before the fork
    strategies(name)  # and DeepSpeed is imported

    def rank(number):
        for whole in (True, False):
            torch.manual_seed(7)
            optimizer = partial(torch.optim.SGD, lr=0.5)
            module = Sharded(str(model_folder), adapter, optimizer, dtype="float32")
            CausalLMModule.configure_model(module)  # DeepSpeed shards what is there
            assert module.logits_are_of_head
            module.logits_are_of_head, recorder = not whole, Recorder()
            options = {"strategy": strategies(name), "devices": 2, "callbacks": [recorder]}
            make_trainer(
                max_steps=3, limit_val_batches=0, use_distributed_sampler=False, **options
            ).fit(module, make_data())
            torch.save(recorder.losses, tmp_path / f"{whole}.{number}")

    assert run_processes(2, rank) == [0, 0]
    for number in range(2):
        whole, fused = (torch.load(tmp_path / f"{kind}.{number}") for kind in (True, False))
        assert fused == pytest.approx(whole, rel=1e-5)
        assert len(whole) == 3
        assert abs(whole[2] / whole[0] - 1) > 1e-3  # it learns
