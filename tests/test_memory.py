"""The estimated memory, by part, against tensors, what autograd saves, and the profiler's peak."""

import importlib.util
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rslightning import cost, hf, memory
from rslightning.cost import GIB
from rslightning.memory import MemoryEstimate, estimate_memory
from rslightning.model_shape import read_shape
from rslightning.rslora import AdapterSpec, inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.training_step import Optimizer, Sharding, TrainingStep

B, T = 3, 50
SIZES = {"vocab_size": 53, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "grouped queries": {
        **SIZES,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "wide MLP": {**SIZES, "intermediate_size": 224},
    "wide heads": {**SIZES, "intermediate_size": 80, "head_dim": 48},
    "deep": {**SIZES, "intermediate_size": 160, "num_hidden_layers": 12},
}


def build(shape, rank=4, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(dtype)
    inject_adapters(model, AdapterSpec(rank=rank, **options))
    return model.train()


def step_of(model, width=4, **changes):
    ranks = {path: layer.rank for path, layer in adapter_layers(model)}
    step = TrainingStep(
        rows=B,
        length=T,
        ranks=ranks or None,
        base_bytes=model.dtype.itemsize,
        compute_bytes=width,
        keeps_gradients=True,
        on_cpu=True,
    )
    return replace(step, **changes)


def estimate(model, *width, **changes):
    return estimate_memory(read_shape(model.config.to_dict()), step_of(model, *width, **changes))


def saved_bytes(model, mixed=False):
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


@pytest.mark.parametrize("options", [{}, {"rank": 64}, {"dropout": 0.2}, {"targets": "attention"}])
@pytest.mark.parametrize("shape", ["grouped queries", "wide MLP", "wide heads"])
def test_activations_are_those_that_autograd_saves(shape, options):
    model = build(shape, **options)
    found = estimate(model, dropout="dropout" in options).activations
    assert found == pytest.approx(saved_bytes(model), rel=0.1)


def test_adapters_in_the_mlp_alone():
    model = build("deep", targets="mlp")  # of its first layer, the attention keeps nothing
    assert estimate(model).activations == pytest.approx(saved_bytes(model), rel=0.1)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_activations_under_mixed_precision(base):
    model = build("grouped queries", dtype=base)
    measured = saved_bytes(model, mixed=True)
    assert estimate(model, 2).activations == pytest.approx(measured, rel=0.1)


def test_activation_checkpointing_keeps_the_inputs_of_all_layers_and_one_layer_is_whole():
    model = build("grouped queries")
    one_layer = saved_bytes(model) / 3
    hf._enable_checkpointing(model)
    found = estimate(model, activation_checkpointing=True)
    last_norm = B * T * 96 * 4  # is over when the first layer is recomputed
    assert found.activations == pytest.approx(saved_bytes(model) - last_norm, rel=0.1)
    assert found.work == pytest.approx(one_layer + 2 * B * T * 160 * 4, rel=0.15)


@pytest.mark.parametrize("rank", [4, 400])
def test_gradients_take_the_room_that_activations_leave(rank):
    model = build("wide MLP", rank)
    both = estimate(model)
    found = estimate(model, keeps_gradients=False)
    assert found.total == both.total - min(both.activations, both.gradients)
    with_zero = estimate(model, keeps_gradients=False, sharding=Sharding(1, masters=True))
    assert with_zero.activations == both.activations


def test_of_a_trained_head_gradients_come_before_activations_go():
    model = LlamaForCausalLM(LlamaConfig(**SHAPES["wide MLP"]))
    both = estimate(model)
    found = estimate(model, keeps_gradients=False)
    late = both.gradients - model.lm_head.weight.nbytes
    assert found.activations == both.activations - late > 0


def test_weights_gradients_and_moments():
    model = build("wide MLP")
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.zeros(1, 2, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    found = estimate(model)
    assert (found.frozen, found.trained) == (frozen, sum(p.nbytes for p in trained))
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    moments = [optimizer.state[p][key].nbytes for p in trained for key in ("exp_avg", "exp_avg_sq")]
    assert found.optimizer == sum(moments)


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_trains_everything(tied):
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **SHAPES["wide MLP"]))
    found = estimate(model)
    size = sum(p.nbytes for p in model.parameters())
    assert (found.frozen, found.trained, found.gradients) == (0, size, size)
    assert found.optimizer == 2 * size


SHARED = {
    "ddp": (Sharding(2, buckets=True), 1, 1, 1, 1),
    "zero1": (Sharding(2, optimizer=True), 1, 1, 1, 2),
    "zero2": (Sharding(2, optimizer=True, gradients=True), 1, 1, 2, 2),
    "zero3": (Sharding(2, optimizer=True, gradients=True, weights=True), 2, 2, 2, 2),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_out_is_divided(name):
    sharding, *divisors = SHARED[name]
    model = build("wide MLP")
    alone, found = estimate(model), estimate(model, sharding=sharding)
    parts = ("frozen", "trained", "gradients", "optimizer")
    for part, divisor in zip(parts, divisors, strict=True):
        assert getattr(found, part) == getattr(alone, part) // divisor
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())  # adapters, too
    exchanged = {"ddp": alone.gradients, "zero3": 2 * layer}
    assert found.exchange == exchanged.get(name, 0)
    assert alone.exchange == 0


def test_deepspeed_trains_16_bit_copies_of_float32_masters():
    model = build("wide MLP", dtype=torch.bfloat16)
    alone = estimate(model, 2)
    entries = alone.trained // 4
    found = estimate(model, 2, sharding=Sharding(4, optimizer=True, gradients=True, masters=True))
    assert (found.trained, found.gradients) == (2 * entries, 2 * entries // 4)
    assert found.optimizer == (4 + 8) * entries // 4
    wide = estimate(build("wide MLP"), sharding=Sharding(1, masters=True))
    assert (wide.trained, wide.optimizer) == (4 * entries, 8 * entries)


def test_what_is_offloaded_is_the_hosts():
    model = build("wide MLP")
    alone = estimate(model)
    optimizer = estimate(model, sharding=Sharding(optimizer=True, optimizer_on_host=True))
    assert (optimizer.optimizer, optimizer.host) == (0, alone.optimizer)
    assert optimizer.total == alone.total - alone.optimizer
    offload = {"optimizer_on_host": True, "weights_on_host": True}
    everything = estimate(model, sharding=Sharding(weights=True, **offload))
    assert (everything.frozen, everything.trained) == (0, 0)
    assert everything.host == alone.optimizer + alone.frozen + alone.trained
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert (everything.exchange, optimizer.exchange) == (2 * layer, 0)  # comes from the host
    mixed = build("wide MLP", dtype=torch.bfloat16)
    masters = Sharding(2, optimizer=True, gradients=True, weights=True, masters=True)
    entries = sum(p.numel() for p in mixed.model.layers[0].parameters())
    found = estimate(mixed, 2, sharding=masters)
    assert found.exchange == 2 * 2 * entries + 400_000_000  # a bucket of DeepSpeed's


ZERO2 = Sharding(4, optimizer=True, gradients=True, masters=True)
ZERO3 = replace(ZERO2, weights=True)


@pytest.mark.parametrize(("width", "buckets"), [(2, 800_000_000), (4, 1_600_000_000)])
def test_zero_2_has_two_buckets_and_zero_3_one(width, buckets, monkeypatch):
    dtype = torch.bfloat16 if width == 2 else torch.float32
    model = build("wide MLP", dtype=dtype)
    assert estimate(model, width, sharding=ZERO2).exchange == buckets
    assert estimate(model, width, sharding=replace(ZERO2, gradients=False)).exchange == buckets
    found = estimate(model, width, sharding=ZERO3).exchange
    monkeypatch.setattr(memory, "DEEPSPEED_BUCKET", 0)
    assert found - estimate(model, width, sharding=ZERO3).exchange == buckets // 2


@pytest.mark.parametrize("sharding", [ZERO2, ZERO3])
@pytest.mark.parametrize(("width", "copies"), [(2, 2 + 4), (4, 4)])
def test_deepspeeds_step_copies_its_part_of_the_gradients(sharding, width, copies, monkeypatch):
    monkeypatch.setattr(memory, "DEEPSPEED_BUCKET", 1000)
    dtype = torch.bfloat16 if width == 2 else torch.float32
    model = build("deep", rank=96, dtype=dtype)
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    few = {"rows": 1, "length": 2, "activation_checkpointing": True}
    found = estimate(model, width, sharding=sharding, **few)
    bucket = 1000 * width * sharding.weights  # which is there in every moment
    assert found.activations + found.work + found.exchange == copies * entries // 4 + bucket
    offloaded = estimate(model, width, sharding=replace(sharding, optimizer_on_host=True), **few)
    assert offloaded.work < found.work
    many = estimate(model, width, sharding=sharding)  # activations take more than the step does
    offloaded = estimate(model, width, sharding=replace(sharding, optimizer_on_host=True))
    assert many.work == offloaded.work


def test_zero_3_keeps_what_is_used_again_soon(monkeypatch):
    model = build("deep", dtype=torch.bfloat16)
    layer, *_ = [sum(p.numel() for p in x.parameters()) for x in model.model.layers]
    sizes = {"BUCKET": 0, "REUSE": 14 * layer, "PREFETCH": 321}
    for name, size in sizes.items():
        monkeypatch.setattr(memory, f"DEEPSPEED_{name}", size)
    largest = 160 * 64
    kept = estimate(model, 2, sharding=ZERO3).exchange
    assert kept == 2 * (7 * layer + 321 + largest)
    assert estimate(model, 2, sharding=ZERO3, activation_checkpointing=True).exchange == 4 * layer
    monkeypatch.setattr(memory, "DEEPSPEED_REUSE", layer)
    assert estimate(model, 2, sharding=ZERO3).exchange == 4 * layer
    monkeypatch.setattr(memory, "DEEPSPEED_REUSE", 100 * layer)
    assert estimate(model, 2, sharding=ZERO3).exchange == 2 * 12 * layer


@pytest.mark.parametrize("rank", [64, None])
def test_fsdp2_has_whole_gradients_of_two_layers(rank):
    model = build("wide MLP", rank=64) if rank else LlamaForCausalLM(LlamaConfig(**SIZES))
    few = {"rows": 1, "length": 2, "activation_checkpointing": True}
    shared = Sharding(4, optimizer=True, gradients=True, weights=True)
    alone, found = (estimate(model, sharding=x, **few) for x in (Sharding(4), shared))
    layer = sum(p.nbytes for p in model.model.layers[0].parameters() if p.requires_grad)
    without = replace(shared, weights=False)
    extra = memory._layer_bytes(read_shape(model.config.to_dict()), step_of(model, **few))
    assert found.work == extra + 2 * layer > alone.work
    assert estimate(model, sharding=without, **few).work == alone.work


def test_a_quantized_base_keeps_embeddings_norms_and_head_as_they_are():
    model = build("wide MLP", dtype=torch.bfloat16)
    shape = read_shape(model.config.to_dict())
    maps = sum(each.entries for each in shape.maps if each.group != "head")
    found = estimate(model, 2, map_bytes=0.5)
    assert found.frozen == maps // 2 + 2 * (shape.parameters - maps)


def test_eager_attention_keeps_the_scores():
    model = build("wide MLP")
    extra = estimate(model, eager_attention=True).activations - estimate(model).activations
    assert extra == 2 * B * 4 * T * T * 4  # two layers, four heads


def test_an_estimate_reads_as_one_line():
    found = MemoryEstimate(GIB, GIB // 2, 0, 0, 0, GIB // 4, host=GIB)
    assert found.total == 7 * GIB // 4
    assert str(found) == "1.75 GiB (frozen 1.00, trained 0.50, work 0.25)"


def load_benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "plan.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_plan", path)
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()


def peaks(case, folder):
    measured = BENCHMARK.measure(case, folder)
    predicted = BENCHMARK.predict(case, folder)
    assert {name: predicted[name] for name in BENCHMARK.COUNTED} == {
        name: measured[name] for name in BENCHMARK.COUNTED
    }
    return sum(predicted.values()), sum(measured.values())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("case", BENCHMARK.cases(width=128, layers=3), ids=lambda case: case.name)
def test_the_plans_peak_is_the_measured_one(case, tmp_path):
    predicted, measured = peaks(case, tmp_path)
    assert predicted == pytest.approx(measured, rel=0.1)


LAYERS = 6
MEASURED = [
    case
    for case in BENCHMARK.processes_cases(128, LAYERS, processes=2)
    if "no checkpointing" not in case.name and ("512" not in case.name or "zero2" in case.name)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_the_plans_peak_is_that_of_each_of_two_processes(case, tmp_path):
    if "deepspeed" in case.strategy:
        pytest.importorskip("deepspeed_cpu")
    processes = BENCHMARK.measure_processes(case, tmp_path)
    built = [measured.pop("construction") for measured in processes]
    with BENCHMARK.scaled():
        predicted = BENCHMARK.predict(case, tmp_path)
    if case.strategy == "deepspeed_zero1":  # has them whole where a step has several micro-batches
        predicted["gradients"] //= 2
    for measured in processes:
        for name in BENCHMARK.COUNTED:
            assert measured[name] == pytest.approx(predicted[name], rel=0.01)
        # Gloo's threads keep what they sent for a while, here layers' gradients.
        tolerance = 0.2 if case.strategy == "fsdp2" else 0.1
        assert sum(measured.values()) == pytest.approx(sum(predicted.values()), rel=tolerance)
    if case.strategy in ("fsdp2", "deepspeed_zero3"):  # the last one never has more than a layer
        share = predicted["frozen"] + predicted["trained"]
        assert share < built[1] < share + 2 * share / LAYERS * 1.2 < built[0]


GPT = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 160, "rotary_dim": 8}
DROPOUTS = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "gpt2": {"architectures": ["GPT2LMHeadModel"], **GPT, **DROPOUTS},
    "gptj": {"architectures": ["GPTJForCausalLM"], **GPT},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "head_dim": 12},
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], "head_dim": 12},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 12},
    "mixtral": {"architectures": ["MixtralForCausalLM"], **MIXTURE},
}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.filterwarnings("ignore:.* are bare parameters, which adapters:UserWarning")
@pytest.mark.parametrize(
    ("family", "rank", "mixed"),
    [
        *((family, 16, False) for family in FAMILIES),
        ("mixtral", None, False),
        ("mixtral", None, True),
    ],
)
def test_the_peak_of_other_families(family, rank, mixed, tmp_path):
    @dataclass(frozen=True)
    class OfFamily(BENCHMARK.Case):
        def config(self):
            sizes = {"vocab_size": self.words} if "gpt" in family else super().config()
            return {**sizes, "pad_token_id": 0, "model_type": family, **FAMILIES[family]}

    predicted, measured = peaks(OfFamily(family, rank, 64, 4, mixed=mixed), tmp_path)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rank", [8, None])
def test_the_peak_where_logits_come_in_chunks(rank, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "CHUNK_BYTES", 2**22)
    monkeypatch.setattr(cost, "CPU_PART_BYTES", 2**20)
    case = BENCHMARK.Case("chunks", rank, 64, 2, words=6000, mixed=mixed)
    predicted, measured = peaks(case, tmp_path)
    assert 640 * 6000 * 4 > 3 * 2**22
    assert predicted == pytest.approx(measured, rel=0.1)


def test_the_profilers_sum_forgets_what_was_freed():
    def event(ts, size, address):
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": size, "Addr": address}}

    events = [
        {"name": "training", "ts": 2, "dur": 5},
        event(0, 70, 1),
        event(1, 100, 2),
        event(1.5, -100, 2),
        event(3, 5, 3),
        event(4, -9, 4),  # was allocated before the profile
        event(5, 11, 2),
        event(8, 1000, 5),
    ]
    assert BENCHMARK.peak_bytes(json.loads(json.dumps(events))) == 70 + 5 + 11


def test_an_unknown_optimizer_is_taken_for_adamw():
    model = build("wide MLP")
    found = estimate(model, optimizer=Optimizer("Sophia"))
    assert found.optimizer == estimate(model).optimizer
