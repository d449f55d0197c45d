import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rslightning import hf
from rslightning.callbacks.throughput import linear_maps
from rslightning.cost import (
    ORDERS,
    USUAL_ORDER,
    LayerShape,
    LinearMap,
    Order,
    attention_width,
    cheapest_order,
    keeps_merged,
    kept_entries,
    layer_cost,
    training_flops,
)
from rslightning.rslora import AdapterSpec, contraction, inject_adapters

ROWS, LENGTH, RANK = 3, 11, 5
TOKENS = ROWS * LENGTH
HIDDEN, KEYS, INNER = 24, 12, 40  # of `make_llama`
EAGER = {"attn_implementation": "eager"}  # torch's counter does not know the CPU's fused kernels


def counted(model) -> int:
    """Return the operations that torch sees in a forward and a backward pass.

    Adapters in the order of fewest operations, whatever moving entries costs on this device.
    """
    ids = torch.randint(2, 53, (ROWS, LENGTH))
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(contraction, "choose_order", lambda shape, *_: cheapest_order(shape))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def expected(model) -> int:
    width = attention_width(model.config.to_dict())
    return training_flops(linear_maps(model), TOKENS, ROWS * LENGTH**2, width)


def near(operations: int):
    """Leave room for the angles of rotations, which transformers 5.17 makes by a product."""
    return pytest.approx(operations, abs=2 * TOKENS)


def input_gradient(features: int) -> int:
    """Return the operations of the gradient into the input of a map with an adapter."""
    shape = LayerShape(HIDDEN, features, RANK, TOKENS)
    without = shape._replace(input_gradient=False)
    return fewest(shape) - fewest(without)


def fewest(shape: LayerShape) -> int:
    return min(layer_cost(shape, order) for order in ORDERS)


KEYS_AND_VALUES = 2 * input_gradient(KEYS)
ATTENTION_BACKWARD = 8 * HIDDEN * ROWS * LENGTH**2  # of one layer

# What is trained -> what is counted though torch leaves it out: the first trained layer's input
# needs no gradient, nor do the scores of a layer before anything that is trained.
SURPLUS = {
    "all_linear": KEYS_AND_VALUES,
    "mlp": input_gradient(INNER) + ATTENTION_BACKWARD,
    r"model\.layers\.1\..*_proj": KEYS_AND_VALUES + ATTENTION_BACKWARD,
}


@pytest.mark.parametrize("targets", SURPLUS)
def test_operations_of_adapters_are_those_that_torch_counts(make_llama, targets):
    model = make_llama(53, **EAGER)
    inject_adapters(model, AdapterSpec(rank=RANK, targets=targets))
    assert expected(model) == near(counted(model) + SURPLUS[targets])


def test_operations_of_pefts_adapters(make_llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_llama(53, **EAGER), config)
    usual = 2 * TOKENS * HIDDEN * (KEYS + RANK)  # W's and A's, for keys and for values
    assert expected(model) == near(counted(model) + 2 * usual)


def test_operations_of_gpt2_whose_queries_keys_and_values_are_one_map(make_gpt2):
    model = make_gpt2(**EAGER)
    inject_adapters(model, AdapterSpec(rank=RANK))
    assert expected(model) == near(counted(model))


@pytest.mark.parametrize("tied", [False, True])
def test_operations_of_full_fine_tuning(make_llama, make_gpt2, tied):
    for model in (make_llama(53, tie_word_embeddings=tied, **EAGER), make_gpt2(**EAGER)):
        assert expected(model) == near(counted(model))


def test_recomputation_is_no_operation_of_the_model(make_llama):
    model = make_llama(53, **EAGER)
    inject_adapters(model, AdapterSpec(rank=RANK))
    once = counted(model)
    hf._enable_checkpointing(model.train())
    assert counted(model) > 1.2 * once
    assert expected(model) == near(once + KEYS_AND_VALUES)


def test_operations_add_up_by_tokens_and_by_examples():
    frozen, trained = LinearMap(3, 5, False, True), LinearMap(2, 7, True, True)
    assert training_flops([frozen], tokens=11) == 4 * 11 * 15
    assert training_flops([frozen, trained], tokens=11) == 4 * 11 * 15 + 6 * 11 * 14
    assert training_flops([], 0, squared_lengths=16 + 9, attention_width=10) == 12 * 250


def test_the_attention_of_other_architectures():
    assert attention_width({"n_embd": 48, "n_layer": 5, "n_head": 6}) == 5 * 48
    wide = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 48}
    assert attention_width({"text_config": wide}) == 2 * 4 * 48
    assert attention_width({}) == 0


# The orders of an adapted layer


def random_shape(draw: random.Random) -> LayerShape:
    n, m, r, tokens = (draw.randint(1, 300) for _ in range(4))
    return LayerShape(n, m, r, tokens, *(draw.random() < 0.7 for _ in range(3)))


def test_the_first_order_is_the_usual_one():
    assert ORDERS[0] == USUAL_ORDER == Order(False, False, False)
    assert len(set(ORDERS)) == 8


def test_the_cost_by_hand():
    shape, everything = LayerShape(2, 3, 5, 7), Order(True, True, True)
    base, adapter, merge = 2 * 7 * 6, 2 * 7 * 5 * (2 + 3), 2 * 5 * 6
    assert layer_cost(shape, USUAL_ORDER) == 2 * base + 3 * adapter
    assert not keeps_merged(shape._replace(rank=0), everything)
    assert keeps_merged(shape, everything)  # 6 entries, and A x has 35
    assert layer_cost(shape, everything) == 3 * base + 3 * merge


def test_few_tokens_take_the_usual_order():
    """Where T < in out / (in + out), whatever the rank and the gradients."""
    draw = random.Random(0)
    for _ in range(2000):
        shape = random_shape(draw)
        n, m, _, tokens, *_ = shape
        if tokens * (n + m) < n * m:
            assert cheapest_order(shape) == USUAL_ORDER


@pytest.mark.parametrize("rank", [1, 8, 999])
def test_an_evaluation_merges_where_the_tokens_exceed_half_the_harmonic_mean(rank):
    shape = LayerShape(300, 600, rank, 200, input_gradient=False, adapter_gradient=False)
    for tokens, merged in ((199, False), (200, False), (201, True)):  # 200 = 300 600 / 900
        assert cheapest_order(shape._replace(tokens=tokens)).merged_forward is merged


@pytest.mark.parametrize("rank", [1, 8, 60])
def test_training_merges_where_the_tokens_exceed_the_width(rank):
    """A x and B^T dy are made in any case, so W' saves B's half of y, and A's half of dx."""
    shape = LayerShape(300, 600, rank, 0)
    for tokens in (299, 301, 599, 601, 2000):
        order = cheapest_order(shape._replace(tokens=tokens))
        assert order == Order(tokens > 300, tokens > 600, False)


@pytest.mark.parametrize(("rank", "full"), [(1, False), (99, False), (101, True), (999, True)])
def test_very_many_tokens_merge_all_at_high_rank(rank, full):
    assert cheapest_order(LayerShape(300, 600, rank, 10**7)) == Order(True, True, full)


def test_of_equal_orders_the_first_and_only_of_those_asked():
    shape = LayerShape(300, 600, 8, 10**4, input_gradient=False)
    assert cheapest_order(shape) == Order(True, False, False)
    assert cheapest_order(shape, ORDERS[::-1]) == Order(True, True, False)
    assert cheapest_order(shape, ORDERS[:4]) == USUAL_ORDER


def test_no_order_keeps_more_than_the_usual_one():
    draw = random.Random(2)
    for _ in range(500):
        shape = random_shape(draw)
        usual = kept_entries(shape, USUAL_ORDER)
        assert usual == (shape.tokens * shape.rank if shape.adapter_gradient else 0)
        for order in ORDERS:
            assert kept_entries(shape, order) <= usual


@pytest.mark.parametrize(("tokens", "kept"), [(199, False), (200, True)])
def test_the_merged_weight_waits_where_it_is_no_larger_than_a_x(tokens, kept):
    shape, both = LayerShape(20, 30, 3, tokens), Order(True, True, False)  # 20 30 = 3 200
    assert keeps_merged(shape, both) is kept
    assert kept_entries(shape, both) == (600 if kept else 0)
    merge = 2 * 3 * 20 * 30
    backward_only = shape._replace(adapter_gradient=False)
    assert layer_cost(backward_only, both) == 4 * tokens * 600 + 2 * merge
    split = 2 * tokens * 3 * 50 * 2  # A x, B^T dy, dA and dB
    assert layer_cost(shape, both) == 4 * tokens * 600 + (1 if kept else 2) * merge + split
    for order in (Order(True, False, False), Order(False, True, True)):
        assert not keeps_merged(shape, order)
        assert kept_entries(shape, order) == 0
    assert not keeps_merged(shape._replace(input_gradient=False), both)
    assert not keeps_merged(backward_only, both)
