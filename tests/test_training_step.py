"""What optimizers keep, against torch; what strategies share out; operations, against counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rslightning import hf
from rslightning.errors import UserError
from rslightning.model_shape import read_shape
from rslightning.rslora import AdapterSpec, inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.training_step import (
    Optimizer,
    Sharding,
    TrainingStep,
    quantized_bytes,
    read_optimizer,
    read_sharding,
    step_operations,
)

MATRICES = ((7, 11), (5, 3), (13, 1))  # the last one stands for a vector

OPTIMIZERS = {
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9},
    "Adafactor": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizers_state_is_torchs(name, plain, dtype):
    options = {} if plain else OPTIMIZERS[name]
    shapes = [*MATRICES[:-1], (13,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in values if torch.is_tensor(value) and value.numel() > 1]
    found = read_optimizer(f"torch.optim.{name}", options)
    assert found.is_known
    assert found.state_bytes(MATRICES, dtype.itemsize) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("name", "slots"), [("AdamW8bit", 2), ("PagedAdamW8bit", 2)])
def test_an_8_bit_optimizers_state(name, slots):
    optimizer = read_optimizer(f"bitsandbytes.optim.{name}", {"lr": 0.1})
    blocks = 77 * 128 / 256  # of 256 entries, with a float32 scale each
    assert optimizer.is_known
    assert optimizer.state_bytes([(77, 128)], 4) == slots * (77 * 128 + 4 * blocks)


def test_an_unknown_optimizer_is_a_guess():
    optimizer = read_optimizer("somewhere.Sophia", {})
    assert not optimizer.is_known
    assert optimizer.state_bytes(MATRICES, 4) == 2 * 4 * (77 + 15 + 13)


ZERO3 = {"optimizer": True, "gradients": True, "weights": True, "masters": True}
STRATEGIES = {
    ("auto", 1): Sharding(),
    ("ddp", 4): Sharding(4, buckets=True),
    ("auto", 4): Sharding(4, buckets=True),
    ("ddp_find_unused_parameters_true", 4): Sharding(4, buckets=True),
    ("lightning.pytorch.strategies.DDPStrategy", 4): Sharding(4, buckets=True),
    ("lightning.pytorch.strategies.ModelParallelStrategy", 4): Sharding(
        4, optimizer=True, gradients=True, weights=True
    ),
    ("rslightning.strategies.FSDP2Strategy", 4): Sharding(
        4, optimizer=True, gradients=True, weights=True
    ),
    ("rslightning.strategies.FSDP2Strategy", 1): Sharding(),
    ("rslightning.strategies.ZeroStrategy", 4): Sharding(
        4, optimizer=True, gradients=True, masters=True
    ),
    ("deepspeed_stage_1", 4): Sharding(4, optimizer=True, masters=True),
    ("deepspeed", 4): Sharding(4, optimizer=True, gradients=True, masters=True),
    ("deepspeed_stage_2_offload", 1): Sharding(
        1, optimizer=True, gradients=True, masters=True, optimizer_on_host=True
    ),
    ("deepspeed_stage_3", 4): Sharding(4, **ZERO3),
    ("deepspeed_stage_3_offload", 4): Sharding(
        4, optimizer_on_host=True, weights_on_host=True, **ZERO3
    ),
}


@pytest.mark.parametrize(("name", "processes"), STRATEGIES)
def test_who_keeps_what(name, processes):
    assert read_sharding(name, {}, processes) == STRATEGIES[name, processes]


def test_arguments_of_a_strategy():
    assert read_sharding("DDPStrategy", {"gradient_as_bucket_view": True}, 4) == Sharding(4)
    options = {"stage": 3, "offload_optimizer": True}
    found = read_sharding("DeepSpeedStrategy", options, 4)
    assert found == Sharding(4, optimizer_on_host=True, **ZERO3)


@pytest.mark.parametrize("weights", ["offload_parameters", "offload_param"])
def test_arguments_of_our_zero(weights):  # as recipes say it, and as DeepSpeed's own file does
    name = "rslightning.strategies.ZeroStrategy"
    assert read_sharding(name, {"stage": 1}, 4) == Sharding(4, optimizer=True, masters=True)
    options = {"stage": 3, "offload_optimizer": {"device": "cpu"}, weights: {"device": "cpu"}}
    found = read_sharding(name, options, 4)
    assert found == Sharding(4, optimizer_on_host=True, weights_on_host=True, **ZERO3)
    assert not read_sharding(name, options | {"stage": 2}, 4).weights_on_host


def test_an_unknown_strategy_is_refused():
    message = (
        r"keeps under the strategy fsdp is not known here; known are auto, ddp, FSDP2Strategy, "
        r"ZeroStrategy, ModelParallelStrategy and deepspeed_stage_1 to 3\.$"
    )
    with pytest.raises(UserError, match=message):
        read_sharding("fsdp", {}, 4)


def test_shares_are_rounded_up():
    assert [Sharding(3).share(10, True), Sharding(3).share(10, False)] == [4, 10]


@pytest.mark.parametrize(
    ("quantization", "size"),
    [
        (None, None),
        ({"load_in_8bit": True}, 1),
        ({"load_in_4bit": True}, 0.5 + 4 / 64),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 0.5 + 1 / 64 + 4 / 16384),
    ],
)
def test_bytes_of_a_quantized_entry(quantization, size):
    assert quantized_bytes(quantization) == size


def test_bytes_of_a_quantized_matrix_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    for double in (False, True):
        options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": double}
        packed, state = functional.quantize_4bit(torch.randn(512, 384), **options)
        scales = [state.absmax] + ([state.state2.absmax] if double else [])
        held = sum(tensor.nbytes for tensor in (packed, *scales))
        name = {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
        assert quantized_bytes(name) * 512 * 384 == held


ROWS, LENGTH = 3, 11


def counted(model):
    ids = torch.randint(2, 53, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def planned(model, **options):
    ranks = {path: layer.rank for path, layer in adapter_layers(model)}
    step = TrainingStep(ROWS, LENGTH, ranks or None, compute_bytes=4, **options)
    return step_operations(read_shape(model.config.to_dict()), step)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 2, 9])
def test_operations_are_those_that_torch_counts(make_llama, rank, checkpointing):
    changes = {"num_hidden_layers": 8, "attn_implementation": "eager"}
    model = make_llama(53, **changes).train()
    if rank:
        inject_adapters(model, AdapterSpec(rank=rank))
    if checkpointing:
        hf._enable_checkpointing(model)
    found = planned(model, activation_checkpointing=checkpointing)
    assert found == pytest.approx(counted(model), rel=0.06)


def test_a_step_says_which_order_its_maps_have(make_llama):
    shape = read_shape(make_llama(53).config.to_dict())
    ranks = {linear.path: 8 for linear in shape.maps[:-1]}
    step = TrainingStep(ROWS, LENGTH, ranks, compute_bytes=4)
    layer = step.layer(shape.maps[0])
    assert (layer.in_features, layer.out_features, layer.rank) == (24, 24, 8)
    assert (layer.tokens, layer.base) == (ROWS * LENGTH, True)
    assert step.order(layer).merged_forward
    plain = TrainingStep(ROWS, LENGTH, ranks, compute_bytes=2)
    assert not any(plain.order(layer)[:2])
    for alone in ({"dropout": True}, {"map_bytes": 0.5}, {"sharding": Sharding(2, weights=True)}):
        assert not TrainingStep(ROWS, LENGTH, ranks, **alone).layer(shape.maps[0]).base
    assert Optimizer() == step.optimizer


def test_nodes_that_replicate_share_out_within_themselves():
    options = {"replicate_nodes": True}
    sharding = read_sharding("rslightning.strategies.FSDP2Strategy", options, 16, nodes=2)
    assert (sharding.processes, sharding.parts) == (16, 8)
    assert sharding.share(1001, is_shared=True) == 126
    assert read_sharding("FSDP2Strategy", {}, 16, nodes=2).share(1001, is_shared=True) == 63
