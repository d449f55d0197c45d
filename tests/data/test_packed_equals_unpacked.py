"""The loss and the gradients of packed rows are those of the same rows one by one."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

from rslightning.batch import IGNORED
from rslightning.data.blocks import Block
from rslightning.data.collate import collate_blocks
from rslightning.losses import token_nats
from rslightning.rslora import AdapterSpec, adapter_layers, adapter_parameters, inject_adapters

LENGTHS = [[7, 4, 11], [13, 9]]


def random_gptj(**options):
    config = GPTJConfig(vocab_size=53, n_positions=64, n_embd=24, n_layer=2, n_head=4, **options)
    return GPTJForCausalLM(config)


@pytest.fixture
def build(make_llama, make_gpt2):
    """Return a function from an architecture and an attention implementation to a random model."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    factories = {
        "llama": partial(make_llama, 53),
        "gpt2": partial(make_gpt2, **no_dropout),
        "gptj": partial(random_gptj, rotary_dim=4),
    }
    return lambda kind, attention: factories[kind](attn_implementation=attention)


def examples(vocabulary=53):
    rng = np.random.default_rng(0)
    rows = []
    for lengths in LENGTHS:
        row = []
        for length in lengths:
            ids = rng.integers(3, vocabulary, length)
            labels = np.where(np.arange(length) < 2, IGNORED, ids)
            row.append(Block(ids, labels, np.array([length])))
        rows.append(row)
    return rows


def join(row):
    ids, labels = (np.concatenate([getattr(e, name) for e in row]) for name in Block._fields[:2])
    return Block(ids, labels, np.array([len(e.input_ids) for e in row]))


def loss_and_gradients(model, blocks, positions=None):
    batch = collate_blocks(blocks, pad_id=0)
    model.zero_grad()
    position_ids = batch.position_ids if positions is None else positions(batch)
    logits = model(batch.input_ids, position_ids=position_ids, use_cache=False).logits
    nats, targets = token_nats(logits, batch.labels)
    nats.backward()
    gradients = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    return nats.detach(), int(targets), gradients


def adapted(model):
    torch.manual_seed(1)
    inject_adapters(model.float(), AdapterSpec(rank=3, alpha=4.0))
    for _, layer in adapter_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return model.train()


def assert_same(model, vocabulary=53):
    rows = examples(vocabulary)
    packed = loss_and_gradients(model, [join(row) for row in rows])
    single = loss_and_gradients(model, [example for row in rows for example in row])
    assert packed[1] == single[1] == sum(n - 2 for row in LENGTHS for n in row)
    torch.testing.assert_close(packed[0], single[0], rtol=1e-5, atol=0)
    for name, gradient in packed[2].items():
        scale = float(single[2][name].abs().max())
        torch.testing.assert_close(gradient, single[2][name], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("kind", "attention"),  # GPT-J has no sdpa
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gpt2", "sdpa"),
        ("gpt2", "eager"),
        ("gptj", "eager"),
    ],
)
def test_packing_changes_no_loss_and_no_gradient(build, kind, attention):
    torch.manual_seed(0)
    assert_same(adapted(build(kind, attention)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_nothing_on_a_real_model(babyllama361, attention):
    model = AutoModelForCausalLM.from_pretrained(
        babyllama361, dtype=torch.float32, attn_implementation=attention
    )
    assert_same(adapted(model), vocabulary=361)


def test_a_row_without_borders_is_noticed(build):
    model = adapted(build("llama", "sdpa"))
    blocks = [join(row) for row in examples()]
    nats, _, _ = loss_and_gradients(model, blocks)

    def one_example_per_row(batch):
        return torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)

    leaky, _, _ = loss_and_gradients(model, blocks, one_example_per_row)
    assert abs(float(leaky - nats)) > 1e-4 * float(nats)  # ten times what equality allows
