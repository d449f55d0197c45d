"""Every order of the adapted layer against its formula in float64, differentiated by autograd."""

import copy
import random
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from rslightning.cost import (
    ORDERS,
    USUAL_ORDER,
    LayerShape,
    Order,
    cheapest_order,
    kept_entries,
    layer_cost,
)
from rslightning.rslora import contraction
from rslightning.rslora.contraction import SPLIT_ORDERS, adapted_linear, choose_order
from rslightning.rslora.linear import LoRALinear
from rslightning.rslora.spec import ResolvedAdapter

BATCH, TOKENS, IN, OUT, RANK = 2, 5, 7, 11, 3
SIZES, RANKS = ((IN, OUT), (OUT, 5)), (RANK, 2)  # in and out of two layers, and their ranks
GAMMA = 0.7
MERGED = Order(True, True, True)
ROUNDING = 2.0**-8  # of an entry, at most, in bfloat16
ORDER_IDS = ["".join("12"[way] for way in order) for order in ORDERS]
PARTS = {  # whether there are W, a bias, and an addend as large as y
    "W and bias": (True, True, False),
    "W": (True, False, False),
    "W and addend": (True, False, True),
    "addend": (False, False, True),
    "bias": (False, True, False),
    "adapter": (False, False, False),
}

every_order = pytest.mark.parametrize("order", ORDERS, ids=ORDER_IDS)
every_part = pytest.mark.parametrize("parts", PARTS)


class Problem(NamedTuple):
    """The tensors of a layer, in the order of `adapted_linear`."""

    x: Any
    weight: Any
    addend: Any
    lora_a: Any
    lora_b: Any

    def double(self) -> "Problem":
        """Return copies in float64 that require the same gradients."""
        return Problem(*(None if t is None else as_leaf(t.double(), t.requires_grad) for t in self))


def as_leaf(tensor, requires_grad):
    return tensor.detach().clone().requires_grad_(requires_grad)


def make_problem(parts="W and bias", needed="xab", leading=(BATCH, TOKENS), sizes=None, seed=0):
    """Return random tensors in float64, about as large as a model's."""
    n, m, r = sizes or (IN, OUT, RANK)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, fan=1, letter=""):
        entries = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return entries.div_(fan**0.5).requires_grad_(letter != "" and letter in needed)

    has_weight, has_bias, has_addend = PARTS[parts]
    addend = draw(*leading, m, letter="x") if has_addend else None
    return Problem(
        draw(*leading, n, letter="x"),
        draw(m, n, fan=n) if has_weight else None,
        draw(m, letter="x") if has_bias else addend,
        draw(r, n, fan=n, letter="a"),
        draw(m, r, fan=r, letter="b"),
    )


def dense(x, weight, addend, lora_a, lora_b):
    """Return `(W + gamma B A) x + addend` in float64; the oracle."""
    matrix = GAMMA * lora_b @ lora_a + (0 if weight is None else weight)
    return x @ matrix.T + (0 if addend is None else addend)


def differentiate(function, problem, seed=1):
    """Return y and the gradients of what requires them, for a random gradient of y."""
    y = function(*problem)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    leaves = [t for t in problem if t is not None and t.requires_grad]
    return y, torch.autograd.grad((y.double() * weights).sum(), leaves)


def ordered(order):
    return lambda *tensors: adapted_linear(*tensors, GAMMA, order=order)


def assert_same(problem, order, rtol=1e-12):
    y, gradients = differentiate(ordered(order), problem)
    truth, exact = differentiate(dense, problem.double())
    assert len(gradients) == len(exact) > 0
    for ours, reference in zip((y, *gradients), (truth, *exact), strict=True):
        assert ours.shape == reference.shape
        assert relative_error(ours, reference) < rtol


def relative_error(ours, reference):
    return ((ours.double() - reference).norm() / reference.norm()).item()


def subsets(letters):
    return ["".join(c) for size in range(1, 4) for c in combinations(letters, size)]


@every_part
@every_order
def test_outputs_and_gradients_are_the_dense_ones(order, parts):
    for needed in subsets("xab"):
        assert_same(make_problem(parts, needed), order)


@every_part
@every_order
def test_gradients_are_those_of_finite_differences(order, parts):
    problem = make_problem(parts)
    assert torch.autograd.gradcheck(ordered(order), tuple(problem), check_batched_grad=True)


@pytest.mark.parametrize("seed", range(12))
def test_any_sizes(seed):
    draw = random.Random(seed)
    tokens, n, m, r = draw.sample(range(1, 40), 4)
    tokens, r = (1 if seed % 3 == 0 else tokens), (1, 41, r)[seed % 4 % 3]
    problem = make_problem(draw.choice(list(PARTS)), leading=(tokens,), sizes=(n, m, r), seed=seed)
    for order in ORDERS:
        assert_same(problem, order)


@every_order
def test_the_sizes_at_which_products_vanish(order):
    """No tokens, one token without a leading dimension, and one of everything."""
    assert_same(make_problem(leading=()), order)
    assert_same(make_problem(leading=(1,), sizes=(1, 1, 1)), order)
    problem = make_problem(leading=(0,))
    y, gradients = differentiate(ordered(order), problem)
    assert y.shape == (0, OUT)
    assert [g.shape for g in gradients] == [t.shape for t in problem if t.requires_grad]
    assert not any(g.any() for g in gradients)


@every_order
def test_any_layout_in_memory(order):
    x, weight, addend, lora_a, lora_b = make_problem("W and addend")
    strided = Problem(
        as_leaf(x.transpose(0, 1).contiguous(), True).transpose(0, 1),
        weight.T.contiguous().T,
        as_leaf(addend.mT.contiguous(), True).mT,
        as_leaf(lora_a.T.contiguous(), True).T,
        as_leaf(lora_b.T.contiguous(), True).T,
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_same(strided, order)


@every_order
def test_an_expanded_gradient(order):
    problem = make_problem()
    leaves = [t for t in problem if t.requires_grad]
    ours = torch.autograd.grad(ordered(order)(*problem).sum(), leaves)
    for found, exact in zip(ours, torch.autograd.grad(dense(*problem).sum(), leaves), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_no_order_is_the_cheapest_and_none_is_needed():
    problem = make_problem()
    torch.testing.assert_close(ordered(None)(*problem), dense(*problem), rtol=1e-12, atol=1e-12)


# dtypes

WIDE, NARROW = torch.float32, torch.bfloat16
DTYPES = {  # of x, of W and addend, of A and B, and whether under autocast
    "float32": (WIDE, WIDE, WIDE, False),
    "bfloat16": (NARROW, NARROW, NARROW, False),
    "bfloat16, adapters float32": (NARROW, NARROW, WIDE, False),
    "autocast, x bfloat16": (NARROW, NARROW, WIDE, True),
    "autocast, x float32": (WIDE, NARROW, WIDE, True),
    "autocast, all float32": (WIDE, WIDE, WIDE, True),
}


def cast(problem, x, base, adapter):
    dtypes = (x, base, base, adapter, adapter)
    return Problem(
        *(
            None if t is None else as_leaf(t.to(dtype), t.requires_grad)
            for t, dtype in zip(problem, dtypes, strict=True)
        )
    )


def mixed(order, autocast):
    def call(*tensors):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return adapted_linear(*tensors, GAMMA, order=order)

    return call


def errors_and_dtypes(order, parts, dtypes):
    """Return the relative errors and the dtypes of y and of all gradients."""
    *stored, autocast = DTYPES[dtypes]
    problem = cast(make_problem(parts, leading=(4, 41), sizes=(67, 53, 13)), *stored)
    y, gradients = differentiate(mixed(order, autocast), problem)
    truth, exact = differentiate(dense, problem.double())
    pairs = zip((y, *gradients), (truth, *exact), strict=True)
    assert [g.dtype for g in gradients] == [t.dtype for t in problem if t.requires_grad]
    return [relative_error(*pair) for pair in pairs], y.dtype


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("parts", ["W and bias", "W and addend"])
@every_order
def test_errors_are_those_of_the_dtype_and_of_the_usual_order(order, parts, dtypes):
    errors, dtype = errors_and_dtypes(order, parts, dtypes)
    usual, _ = errors_and_dtypes(USUAL_ORDER, parts, dtypes)
    assert dtype == (WIDE if dtypes == "float32" else NARROW)
    assert max(errors) < (1e-6 if dtype == WIDE else 1.2 * ROUNDING)
    # In float32 the order of the sums, which differs from processor to processor, moves it more.
    factor = 1.25 if dtype == WIDE else 1.1
    assert all(ours < factor * theirs for ours, theirs in zip(errors, usual, strict=True))


def test_a_merged_weight_loses_no_more_than_y_does_at_any_size_of_the_update():
    for update in (1.0, 0.1, 0.01):
        problem = make_problem("W and bias", leading=(97,), sizes=(131, 113, 17))
        problem.lora_b.data *= update
        problem = cast(problem, NARROW, NARROW, WIDE)
        exact = dense(*problem.double())
        usual, merged = (relative_error(ordered(o)(*problem), exact) for o in (USUAL_ORDER, MERGED))
        assert merged < 1.1 * usual < ROUNDING


def test_backward_inside_of_autocast_computes_in_the_dtype_of_the_forward_pass():
    problem = cast(make_problem(), WIDE, WIDE, WIDE)
    leaves = [t for t in problem if t.requires_grad]
    for order in ORDERS:
        loss = ordered(order)(*problem).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(loss, leaves, retain_graph=True)
        outside = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@every_order
def test_autocast_leaves_float64_alone_as_in_torch(order):
    problem = make_problem()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(problem, order)
        assert ordered(order)(*problem).dtype == (problem.x @ problem.weight.T).dtype


def test_shapes_without_data():
    problem = make_problem()
    shapes = Problem(*(t.detach().to("meta").requires_grad_(t.requires_grad) for t in problem))
    y = ordered(None)(*shapes)
    gradients = torch.autograd.grad(y.sum(), [shapes.x, shapes.lora_a, shapes.lora_b])
    assert y.shape == (BATCH, TOKENS, OUT)
    assert [g.shape for g in gradients] == [t.shape for t in (problem.x, *problem[3:])]


# What is computed and what is kept


def shape_of(problem):
    return LayerShape(
        IN,
        OUT,
        RANK,
        problem.x[..., 0].numel(),
        problem.x.requires_grad,
        problem.lora_a.requires_grad,
        problem.weight is not None,
    )


def counted_operations(problem, order):
    with FlopCounterMode(display=False) as counter:
        y = ordered(order)(*problem)
        if y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("needed", ["xab", "ab", "x", ""])
@pytest.mark.parametrize("parts", ["W and bias", "W and addend", "addend"])
@pytest.mark.parametrize("tokens", [5, 41])  # with 41, W' is no larger than A x
def test_the_cost_is_what_torch_counts(tokens, parts, needed):
    counts, shape = {}, None
    for order in ORDERS:
        problem = make_problem(parts, needed, leading=(tokens,))
        shape = shape_of(problem)
        counts[order] = counted_operations(problem, order)
        assert layer_cost(shape, order) == counts[order]
    cheapest = cheapest_order(shape)
    assert counts[cheapest] == min(counts.values())
    assert len(set(counts.values())) > 1


@pytest.mark.parametrize("needed", ["xa", "xb", "a", "b"])
@every_order
def test_only_what_is_needed_is_computed(order, needed):
    """With one of A and B the cost counts both: an upper bound."""
    problem = make_problem("W and bias", needed)
    shape = shape_of(problem)._replace(adapter_gradient=True)
    without = layer_cost(shape._replace(adapter_gradient=False), order)
    assert without < counted_operations(problem, order) < layer_cost(shape, order)


def kept_tensors(problem, order):
    """Return what autograd keeps beside the tensors of the problem, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in problem if t is not None}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ordered(order)(*problem)
    assert y.requires_grad
    return [tensor for pointer, tensor in kept.items() if pointer not in own]


@pytest.mark.parametrize("needed", ["xab", "ab", "x"])
@every_part
@pytest.mark.parametrize("tokens", [5, 41])
@every_order
def test_what_is_kept(order, tokens, parts, needed):
    problem = make_problem(parts, needed, leading=(tokens,))
    shape, kept = shape_of(problem), kept_tensors(problem, order)
    assert sum(t.numel() for t in kept) == kept_entries(shape, order)
    assert sum(t.numel() for t in kept) <= kept_entries(shape, USUAL_ORDER) <= tokens * RANK
    if not kept:
        return
    x, weight, _, lora_a, lora_b = problem
    down = x @ lora_a.T
    merged = GAMMA * lora_b @ lora_a + (0 if weight is None else weight)
    (tensor,) = kept
    torch.testing.assert_close(tensor, merged if tensor.shape == (OUT, IN) else down)


def test_that_is_one_of_a_x_and_the_merged_weight():
    sizes = {
        (tokens, order): [tuple(t.shape) for t in kept_tensors(problem, order)]
        for tokens in (5, 41)
        for order in ORDERS
        for problem in [make_problem(leading=(tokens,))]
    }
    assert {key for key, shapes in sizes.items() if shapes == [(OUT, IN)]} == {
        (41, Order(True, True, False)),
        (41, Order(True, True, True)),
    }
    assert {key for key, shapes in sizes.items() if shapes == [(key[0], RANK)]} == {
        (tokens, Order(False, merged, False)) for tokens in (5, 41) for merged in (False, True)
    }


def test_nothing_is_kept_without_gradients():
    problem = make_problem()
    with torch.no_grad():
        y = ordered(None)(*problem)
    assert y.grad_fn is None


def test_16_bit_goes_through_the_merged_weight_where_that_is_allowed():
    shape = LayerShape(IN, OUT, RANK, 10**5)
    assert choose_order(shape, True).merged_forward
    assert choose_order(shape, False) in SPLIT_ORDERS
    assert set(ORDERS) - set(SPLIT_ORDERS) == {o for o in ORDERS if any(o[:2])}


@pytest.mark.parametrize(
    ("parts", "dtype", "merges_in_16_bit", "allowed"),
    [
        ("W", torch.float32, False, True),
        ("W", torch.bfloat16, False, False),
        ("W", torch.float16, False, False),
        ("W", torch.bfloat16, True, True),
        ("adapter", torch.bfloat16, False, True),
    ],
)
def test_where_the_merged_weight_is_allowed(monkeypatch, parts, dtype, merges_in_16_bit, allowed):
    asked = spy_on_choices(monkeypatch)
    problem = cast(make_problem(parts), dtype, dtype, WIDE)
    adapted_linear(*problem, GAMMA, merges_in_16_bit)
    shape = LayerShape(IN, OUT, RANK, BATCH * TOKENS, base=parts == "W")
    assert asked == [(shape, allowed)]


def spy_on_choices(monkeypatch):
    """Return the list that the arguments of each automatic choice will be put on."""
    asked = []

    def choose(*arguments):
        asked.append(arguments)
        return choose_order(*arguments)

    monkeypatch.setattr(contraction, "choose_order", choose)
    return asked


@pytest.mark.parametrize("needed", ["xab", "x", "a", "b", ""])
@pytest.mark.parametrize("recording", [True, False])
def test_the_choice_knows_which_gradients_are_needed(monkeypatch, needed, recording):
    asked = spy_on_choices(monkeypatch)
    with torch.set_grad_enabled(recording):
        ordered(None)(*make_problem(needed=needed))
    ((shape, *_),) = asked
    assert shape.input_gradient is (recording and "x" in needed)
    assert shape.adapter_gradient is (recording and bool({"a", "b"} & set(needed)))


# Under what else computes with it


@every_order
def test_activation_checkpointing(order):
    problem = make_problem()

    def block(*tensors):
        return ordered(order)(*tensors).tanh()

    def recomputed(*tensors):
        return checkpoint(block, *tensors, use_reentrant=False)

    plain, again = differentiate(block, problem), differentiate(recomputed, problem)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))


# Of Inductor's imports.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilation_without_graph_breaks(backend, dynamic):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*map(make_layer, SIZES, RANKS))
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    leaves = [m for layer in model for m in (layer.lora_a, layer.lora_b)]
    for tokens in (2, 500):
        x = torch.randn(tokens, IN)
        y, exact = compiled(x), model(x)
        torch.testing.assert_close(y, exact)
        found = torch.autograd.grad(y.square().mean(), leaves)
        truth = torch.autograd.grad(exact.square().mean(), leaves)
        assert max(map(relative_error, found, truth)) < 1e-5


def test_a_compiler_is_not_asked_to_compare_symbols():
    chosen = []

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def choose(x):
        chosen.append(choose_order(LayerShape(IN, OUT, RANK, x.shape[0])))
        return x + 1

    choose(torch.ones(10**6))
    assert choose_order(LayerShape(IN, OUT, RANK, 10**6)).merged_forward
    assert chosen == [USUAL_ORDER]


def make_layer(sizes=(IN, OUT), rank=RANK):
    base = nn.Linear(*sizes).requires_grad_(False)
    layer = LoRALinear(base, ResolvedAdapter(rank, alpha=4.0, scaling="rslora"))
    for matrix in (layer.lora_a, layer.lora_b):
        nn.init.normal_(matrix, std=0.3)
    return layer


@pytest.fixture
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def loss_of_one(order, oracle=False):
    """Return the loss of one example as a function of A, B and the example."""
    _, weight, bias, *_ = make_problem()

    def loss(lora_a, lora_b, x):
        tensors = (x, weight.detach(), bias.detach(), lora_a, lora_b)
        return (dense(*tensors) if oracle else ordered(order)(*tensors)).square().sum()

    return loss


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@every_order
def test_gradients_per_example(order):
    x, _, _, *adapter = (t.detach() for t in make_problem())
    for wanted in ((0, 1), (0, 1, 2), (2,), (1,)):
        transform = torch.func.vmap(torch.func.grad(loss_of_one(order), wanted), (None, None, 0))
        for index, example in enumerate(x):
            leaves = [as_leaf(t, True) for t in (*adapter, example)]
            truth = torch.autograd.grad(
                loss_of_one(order, oracle=True)(*leaves), [leaves[i] for i in wanted]
            )
            for found, exact in zip(transform(*adapter, x), truth, strict=True):
                torch.testing.assert_close(found[index], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@every_order
def test_stacked_adapters(order):
    problems = [Problem(*(t.detach() for t in make_problem(seed=seed))) for seed in range(4)]
    x, weight, bias, *_ = problems[0]
    stacks = [torch.stack([p.lora_a for p in problems]), torch.stack([p.lora_b for p in problems])]

    def adapted(lora_a, lora_b):
        return ordered(order)(x, weight, bias, lora_a, lora_b)

    for index, y in enumerate(torch.func.vmap(adapted)(*stacks)):
        exact = dense(x, weight, bias, *problems[index][3:])
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)


def test_a_functional_call_of_the_module():
    layer = make_layer().double()
    x = make_problem().x.detach()

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, x).square().sum()

    parameters = {name: getattr(layer, name).detach() for name in ("lora_a", "lora_b")}
    found = torch.func.grad(loss)(parameters)
    loss({name: getattr(layer, name) for name in parameters}).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, getattr(layer, name).grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", subsets("xab"))
@every_order
def test_a_second_derivative_is_refused(order, needed):
    problem = make_problem(needed=needed)
    leaves = [t for t in (problem.x, *problem[3:]) if t.requires_grad]
    loss = ordered(order)(*problem).square().sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=r"first derivative only: .* \(create_graph=True\)"):
            gradient.sum().backward(retain_graph=True)


# In two processes

STEPS, RATE = 2, 0.05


def micro_batch(process, step, tokens):
    """Return input [tokens, 7] and target [tokens, 5]."""
    generator = torch.Generator().manual_seed(100 * process + step)
    return [torch.randn(tokens, n, generator=generator) for n in (7, 5)]


class TwoLayers(LightningModule):
    """Two adapted layers; sharded by FSDP2 where there is a mesh for it."""

    def __init__(self, tokens, folder):
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.folder = tokens, folder
        self.net = nn.Sequential(*map(make_layer, SIZES, RANKS))
        self.is_sharded = False

    def configure_model(self):
        if self.device_mesh is not None and not self.is_sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in self.net:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            self.is_sharded = True

    def training_step(self, batch, batch_idx):
        x, target = batch
        return nn.functional.mse_loss(self.net[1](self.net[0](x).tanh()), target)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=RATE)

    def train_dataloader(self):
        process = self.trainer.global_rank
        return DataLoader(
            [micro_batch(process, step, self.tokens) for step in range(STEPS)], batch_size=None
        )

    def on_train_end(self):
        trained = [whole(p) for p in self.parameters() if p.requires_grad]
        if self.trainer.is_global_zero:
            torch.save(trained, self.folder / "trained.pt")


def whole(parameter):
    """Return a copy of a parameter of which a process may keep a part only."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()


def trained_alone(tokens):
    """Return the matrices before and after the steps, by float64 autograd of the dense maps."""
    torch.manual_seed(1)
    layers = [make_layer(*each).double() for each in zip(SIZES, RANKS, strict=True)]
    matrices = [m.detach() for layer in layers for m in (layer.lora_a, layer.lora_b)]
    start = [m.clone() for m in matrices]
    for step in range(STEPS):
        matrices = [m.detach().requires_grad_() for m in matrices]
        losses = []
        for process in range(2):
            x, target = (t.double() for t in micro_batch(process, step, tokens))
            for i, layer in enumerate(layers):
                update = layer.gamma * matrices[2 * i + 1] @ matrices[2 * i]
                x = (x.tanh() if i else x) @ (layer.weight + update).T + layer.bias
            losses.append((x - target).square().mean())
        gradients = torch.autograd.grad(sum(losses) / 2, matrices)
        matrices = [m - RATE * g for m, g in zip(matrices, gradients, strict=True)]
    return start, matrices


def deepspeed_on_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "callbacks")
    return pytest.importorskip("deepspeed_cpu")


@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize(("tokens", "order"), [(3, USUAL_ORDER), (67, MERGED)])
def test_two_processes(make_trainer, run_processes, monkeypatch, tmp_path, strategy, tokens, order):
    cpu = deepspeed_on_the_cpu(monkeypatch) if strategy == "zero3" else None
    monkeypatch.setattr(contraction, "choose_order", lambda *_: order)

    def process(_):
        options = {"strategy": "ddp" if strategy == "ddp" else ModelParallelStrategy(2, 1)}
        if cpu is not None:
            options["strategy"] = cpu.CPUDeepSpeedStrategy(stage=3, logging_batch_size_per_gpu=1)
            options["plugins"] = [cpu.OnceScaledDeepSpeedPrecision("32-true")]
        trainer = make_trainer(devices=2, max_steps=STEPS, use_distributed_sampler=False, **options)
        trainer.fit(TwoLayers(tokens, tmp_path))

    assert run_processes(2, process) == [0, 0]
    found = torch.load(tmp_path / "trained.pt")
    for before, exact, trained in zip(*trained_alone(tokens), found, strict=True):
        assert relative_error(trained - before, exact - before) < 1e-5


def test_a_copied_layer_computes_the_same():
    layer = make_layer()
    x = torch.randn(BATCH, TOKENS, IN)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
