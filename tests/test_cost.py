import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rslightning import hf
from rslightning.callbacks.throughput import linear_maps
from rslightning.cost import (
    GIB,
    LinearMap,
    MemoryEstimate,
    attention_width,
    estimate_memory,
    training_flops,
)
from rslightning.rslora import AdapterSpec, inject_adapters

SHAPES = {
    "grouped queries": {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "wide MLP": {
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "wide heads": {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 48,
    },
}
B, T = 3, 50


def build(shape: str, rank: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=53, max_position_embeddings=64, **SHAPES[shape])
    model = LlamaForCausalLM(config).to(dtype)
    inject_adapters(model, AdapterSpec(rank=rank))
    return model.train()


def saved_bytes(model, mixed: bool = False) -> int:
    """Count the bytes that the forward pass saves, each storage once, weights left out."""
    weights = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {}

    def save(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept alive
        return tensor

    ids = torch.randint(0, 53, (B, T))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), hooks:
        model.model(ids, attention_mask=mask, use_cache=False)
    return sum(x.nbytes() for pointer, x in storages.items() if pointer not in weights)


def estimated_activations(model, rank: int, **options) -> int:
    ranks = 7 * rank * model.config.num_hidden_layers
    options = {"adapter_ranks": ranks, "activation_bytes": 4, **options}
    return estimate_memory(model.config.to_dict(), 0, 0, B * T, **options).activations


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_those_that_autograd_saves(shape, rank):
    model = build(shape, rank)
    assert estimated_activations(model, rank) == pytest.approx(saved_bytes(model), rel=0.1)


def test_activations_under_mixed_precision():
    model = build("grouped queries", 4, torch.bfloat16)
    measured = saved_bytes(model, mixed=True)
    assert estimated_activations(model, 4, activation_bytes=2) == pytest.approx(measured, rel=0.1)


def test_activation_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    model = build("grouped queries", 4)
    one_layer = saved_bytes(model) / 3
    hf._enable_checkpointing(model)
    inputs = saved_bytes(model)
    estimate = estimated_activations(model, 4, activation_checkpointing=True)
    assert inputs < one_layer
    assert estimate == pytest.approx(one_layer + inputs, rel=0.1)


def test_weights_gradients_and_moments():
    model = build("wide MLP", 4)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    model(torch.zeros(1, 2, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    estimate = estimate_memory(
        model.config.to_dict(), frozen, sum(p.numel() for p in trainable), tokens=1, frozen_bytes=4
    )
    moments = [optimizer.state[p][key] for p in trainable for key in ("exp_avg", "exp_avg_sq")]
    held = [*trainable, *(p.grad for p in trainable), *moments]
    assert estimate.trainable == sum(tensor.nbytes for tensor in held)
    assert estimate.base == sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def test_logits_their_copy_and_their_gradient():
    estimate = estimate_memory({"vocab_size": 53, "hidden_size": 8}, 0, 0, tokens=7)
    assert estimate.logits == 7 * 53 * (2 + 4 + 4)


def test_names_of_other_architectures_mean_the_same():
    llama = {
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "intermediate_size": 192,
        "vocab_size": 53,
    }
    gpt2 = {"n_embd": 48, "n_layer": 5, "n_head": 6, "n_inner": None, "vocab_size": 53}
    vision = {"text_config": llama, "vocab_size": 1}
    estimates = {estimate_memory(config, 1, 1, 11) for config in (llama, gpt2, vision)}
    assert len(estimates) == 1


def test_an_estimate_reads_as_one_line():
    estimate = MemoryEstimate(base=GIB, trainable=GIB // 2, activations=0, logits=GIB // 4)
    assert estimate.total == 7 * GIB // 4
    assert str(estimate) == (
        "1.75 GiB (base 1.00, trainable with gradients and AdamW 0.50, logits 0.25)"
    )


ROWS, LENGTH, RANK = 3, 11, 5
TOKENS = ROWS * LENGTH
HIDDEN, KEYS, INNER = 24, 12, 40  # of `make_llama`
EAGER = {"attn_implementation": "eager"}  # torch's counter does not know the CPU's fused kernels


def counted(model) -> int:
    """Return the operations that torch sees in a forward and a backward pass."""
    ids = torch.randint(2, 53, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def expected(model) -> int:
    width = attention_width(model.config.to_dict())
    return training_flops(linear_maps(model), TOKENS, ROWS * LENGTH**2, width)


def input_gradient(features: int) -> int:
    """Return the operations of the gradient into the input of a map with an adapter."""
    return 2 * TOKENS * HIDDEN * (features + RANK)


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
    assert expected(model) == counted(model) + SURPLUS[targets]


def test_operations_of_pefts_adapters(make_llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_llama(53, **EAGER), config)
    assert expected(model) == counted(model) + KEYS_AND_VALUES


def test_operations_of_gpt2_whose_queries_keys_and_values_are_one_map(make_gpt2):
    model = make_gpt2(**EAGER)
    inject_adapters(model, AdapterSpec(rank=RANK))
    assert expected(model) == counted(model)


@pytest.mark.parametrize("tied", [False, True])
def test_operations_of_full_fine_tuning(make_llama, make_gpt2, tied):
    for model in (make_llama(53, tie_word_embeddings=tied, **EAGER), make_gpt2(**EAGER)):
        assert expected(model) == counted(model)


def test_recomputation_is_no_operation_of_the_model(make_llama):
    model = make_llama(53, **EAGER)
    inject_adapters(model, AdapterSpec(rank=RANK))
    once = counted(model)
    hf._enable_checkpointing(model.train())
    assert counted(model) > 1.2 * once
    assert expected(model) == once + KEYS_AND_VALUES


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
