"""AdaLoRA against PEFT's, and its parts against dense computations in float64."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

from rslightning.errors import UserError
from rslightning.rslora.adalora import RankAllocator, fold_values, orthogonality_gap
from rslightning.rslora.adapters import (
    Adapter,
    adapter_parameters,
    adapter_state_dict,
    collect_adapter,
    copy_adapter,
)
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import LoRALinear, adapter_layers
from rslightning.rslora.merge import merge_adapters
from rslightning.rslora.peft_format import read_adapter, write_adapter
from rslightning.rslora.rounding import lost_in_rounding
from rslightning.rslora.spec import AdapterSpec, RankAllocation, ResolvedAdapter

# PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

RANK, ALPHA, STEPS = 12, 5.0, 10
SIZES = (7, 11, 9, 13, 5)
PLAN = {"target_rank": 4, "warmup_steps": 2, "final_steps": 3}
BUDGETS = [48, 48, 48, 32, 22, 18, 16, 16, 16, 16]  # of steps 0 to 9, in PEFT 0.21.2
IDS = torch.arange(10).reshape(2, 5)


class Chain(nn.Module):
    """Four linear maps of distinct sizes, with a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(map(nn.Linear, SIZES[:-1], SIZES[1:]))

    def forward(self, x, y):
        for layer in self.layers:
            x = layer(x).tanh()
        return SimpleNamespace(loss=(x - y).square().mean())


def adapted(model=None, **options):
    """Return a model with adapters under `PLAN`, drawn from a fixed seed."""
    model = Chain() if model is None else model
    torch.manual_seed(3)
    plan = RankAllocation(**(PLAN | options.pop("plan", {})))
    spec = {"rank": RANK, "alpha": ALPHA, "targets": "all_linear", "allocation": plan}
    inject_adapters(model, AdapterSpec(**(spec | options)))
    return model


def randomize(model, pruned=lambda path, layer: []):
    """Give E random entries, but zeros at the ranks that `pruned(path, layer)` lists."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, layer in adapter_layers(model):
            layer.lora_e.normal_(generator=generator)
            layer.lora_e[pruned(path, layer)] = 0.0
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, SIZES[0], generator=generator), torch.randn(
        6, SIZES[-1], generator=generator
    )


# --- against PEFT ---------------------------------------------------------------------------------


def peft_model(ours, scaling, every_n_steps=1):
    """Return PEFT's AdaLoRA with the same matrices and gamma."""
    config = AdaLoraConfig(
        target_modules=r"layers\.\d",
        init_r=RANK,
        target_r=PLAN["target_rank"],
        tinit=PLAN["warmup_steps"],
        tfinal=PLAN["final_steps"],
        deltaT=every_n_steps,
        total_step=STEPS,
        lora_alpha=ALPHA * (math.sqrt(RANK) if scaling == "rslora" else 1.0),
        orth_reg_weight=0.5,
        beta1=0.85,
        beta2=0.85,
    )
    theirs = get_peft_model(Chain(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if (part := matrix_of(ours, name)) is not None:
                parameter.copy_(part.reshape(parameter.shape))
    return theirs


def matrix_of(ours, name):
    """Return our matrix for a name such as `base_model.model.layers.0.lora_A.default`."""
    layers = dict(adapter_layers(ours))
    path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
    return getattr(layers[path], f"lora_{rest[0].lower()}") if rest else None


# PEFT's wrapper goes past the regularizer, which is in `base_model`'s forward.
def train(model, loss_of, allocate, optimizer):
    """Train in PEFT's order of calls; return what `allocate` returns at each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, returned = optimizer(trained), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()
        returned.append(allocate(step))
    return returned


@pytest.mark.parametrize(
    ("scaling", "every_n_steps", "optimizer"),
    [
        ("lora", 1, lambda p: torch.optim.SGD(p, lr=0.5)),
        ("rslora", 1, lambda p: torch.optim.AdamW(p, lr=1e-2)),
        ("rslora", 2, lambda p: torch.optim.AdamW(p, lr=1e-2)),
    ],
)
def test_ten_steps_are_those_of_peft(scaling, every_n_steps, optimizer):
    ours = adapted(scaling=scaling, plan={"every_n_steps": every_n_steps})
    theirs = peft_model(ours, scaling, every_n_steps)
    allocator = RankAllocator(ours, RankAllocation(**PLAN, every_n_steps=every_n_steps), STEPS)
    masks, peft_masks = [], []

    def allocate(step):
        budget = allocator.update(step)
        masks.append([layer.lora_e.ne(0).tolist() for layer in allocator.layers.values()])
        return budget

    def peft_allocate(step):
        theirs.base_model.update_and_allocate(step)
        values = [p for name, p in theirs.named_parameters() if "lora_E" in name]
        peft_masks.append([value.ne(0).flatten().tolist() for value in values])
        return theirs.base_model.rankallocator.budget_schedule(step)[0]

    budgets = train(
        ours, lambda step: ours(*batch(step)).loss + allocator.penalty(), allocate, optimizer
    )
    their_loss = lambda step: theirs.base_model(*batch(step)).loss  # noqa: E731
    assert budgets == train(theirs, their_loss, peft_allocate, optimizer) == BUDGETS
    assert masks == peft_masks
    kept = [sum(map(sum, mask)) for mask in masks]
    assert kept[:3] == [48] * 3
    assert all(n == b for step, (n, b) in enumerate(zip(kept, BUDGETS, strict=True)) if step >= 7)
    assert (kept == BUDGETS) == (every_n_steps == 1)  # between allocations ranks come back
    compared = 0
    for name, parameter in theirs.named_parameters():
        if (part := matrix_of(ours, name)) is not None and "ranknum" not in name:
            torch.testing.assert_close(part.reshape(parameter.shape), parameter, rtol=0, atol=1e-5)
            compared += 1
    assert compared == 12


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_the_function_is_that_of_peft(scaling):
    ours = randomize(adapted(scaling=scaling))
    theirs = peft_model(ours, scaling)
    x, y = batch(0)
    for (_, layer), module in zip(
        adapter_layers(ours), theirs.base_model.model.layers, strict=True
    ):
        torch.testing.assert_close(
            layer.gamma * layer.scaled_b @ layer.lora_a,
            module.get_delta_weight("default"),
            rtol=1e-5,
            atol=1e-8,
        )
    gap = orthogonality_gap(layer for _, layer in adapter_layers(ours))
    loss = ours(x, y).loss + 0.5 * gap
    assert loss.item() == pytest.approx(theirs.base_model(x, y).loss.item(), rel=1e-6)


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_output_and_gradients_are_those_of_float64(whole):
    torch.manual_seed(0)
    layer = LoRALinear(
        nn.Linear(7, 11).requires_grad_(False),
        ResolvedAdapter(5, 3.0, "rslora"),
        dropout=0.0 if whole else 1e-9,  # with dropout the base is called
        singular_values=True,
    )
    layer.reset_adapter("layer")
    nn.init.normal_(layer.lora_e)
    x, dy = torch.randn(13, 7), torch.randn(13, 11)
    a, b, e = (
        p.detach().double().requires_grad_() for p in (layer.lora_a, layer.lora_b, layer.lora_e)
    )
    update = 3.0 / math.sqrt(5) * b @ e.diag() @ a
    expected = x.double() @ (layer.weight.double() + update).T + layer.bias.double()
    expected.backward(dy.double())
    y = layer(x)
    y.backward(dy)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in ((layer.lora_a, a), (layer.lora_b, b), (layer.lora_e, e)):
        assert theirs.grad.abs().max() > 1e-3
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_adapters_start_as_no_op_with_normal_entries():
    model, plain = adapted(rank=400), Chain()
    assert model(*batch(0)).loss.equal(plain(*batch(0)).loss)
    for _, layer in adapter_layers(model):
        assert not layer.lora_e.any()
        for matrix in (layer.lora_a, layer.lora_b):
            assert matrix.mean().item() == pytest.approx(0, abs=2e-3)
            assert matrix.std().item() == pytest.approx(0.02, rel=0.05)
    first, second = (layer.lora_a[:, :7] for _, layer in list(adapter_layers(model))[:2])
    assert not torch.equal(first, second)


def test_a_rank_s_first_entries_do_not_depend_on_the_others():
    low, high = adapted(), adapted(rank=17)
    for (_, few), (_, many) in zip(adapter_layers(low), adapter_layers(high), strict=True):
        assert torch.equal(few.lora_a, many.lora_a[:RANK])
        assert torch.equal(few.lora_b, many.lora_b[:, :RANK])


def test_the_report_counts_the_singular_values():
    report = inject_adapters(Chain(), AdapterSpec(rank=RANK, allocation=RankAllocation(**PLAN)))
    model = adapted()
    assert report.trainable_parameters == sum(p.numel() for p in adapter_parameters(model).values())
    assert report.trainable_parameters == RANK * (sum(SIZES[:-1]) + sum(SIZES[1:]) + len(SIZES) - 1)
    assert report.total_parameters == sum(p.numel() for p in model.parameters())


def test_what_is_merged_or_rounded_is_the_update_with_e():
    model = randomize(adapted())
    expected = model(*batch(0)).loss.item()
    for _, layer in adapter_layers(model):
        update = layer.gamma * layer.lora_b @ layer.lora_e.diag() @ layer.lora_a
        exact = layer.weight + update
        lost = (exact.bfloat16().float() - exact).norm() / update.norm()
        assert lost_in_rounding(layer, torch.bfloat16).item() == pytest.approx(
            lost.item(), rel=1e-4
        )
    merge_adapters(model)
    assert model(*batch(0)).loss.item() == pytest.approx(expected, rel=1e-5)


# --- the regularizer ------------------------------------------------------------------------------


def dense_gap(matrices):
    gaps = [
        ((x @ x.T if k % 2 == 0 else x.T @ x) - torch.eye(RANK).double())
        for k, x in enumerate(matrices)
    ]
    return sum(gap.square().sum().sqrt() for gap in gaps) / len(gaps)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gap_and_its_gradient_are_those_of_float64(autocast):
    layers = [layer for _, layer in adapter_layers(adapted())]
    for layer in layers:
        nn.init.normal_(layer.lora_a, std=0.3)
    own = [matrix for layer in layers for matrix in (layer.lora_a, layer.lora_b)]
    wide = [matrix.detach().double() for matrix in own]
    with torch.autocast("cpu", enabled=autocast):
        gap = orthogonality_gap(layers)
    gap.backward()
    assert gap.item() == pytest.approx(dense_gap(wide).item(), rel=1e-6)
    for index, matrix in enumerate(own):
        for place in ((0, 1), (3, 2)):
            shifted = []
            for sign in (1, -1):
                moved = [x.clone() for x in wide]
                moved[index][place] += sign * 1e-6
                shifted.append(dense_gap(moved).item())
            slope = (shifted[0] - shifted[1]) / 2e-6
            assert matrix.grad[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_orthogonal_matrices_have_no_gap_and_no_weight_no_penalty():
    model = Chain()
    inject_adapters(model, AdapterSpec(rank=4, allocation=RankAllocation(3, 2, 3, orthogonality=0)))
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        nn.init.orthogonal_(layer.lora_a)
        nn.init.orthogonal_(layer.lora_b)
    assert orthogonality_gap(layers).item() == pytest.approx(0, abs=1e-5)
    assert RankAllocator(adapted(), RankAllocation(3, 2, 3, orthogonality=0), 9).penalty() == 0


# --- the allocator --------------------------------------------------------------------------------


def make_allocator(model, total=STEPS, **plan):
    return RankAllocator(model, RankAllocation(**(PLAN | plan)), total)


def step_once(model, allocator, step, scale=1.0):
    model.zero_grad()
    (scale * model(*batch(step)).loss).backward()
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter -= 0.1 * parameter.grad
    return allocator.update(step)


def test_an_allocator_goes_on_where_another_one_was():
    straight, stopped = adapted(), adapted()
    first, before = make_allocator(straight), make_allocator(stopped)
    for step in range(1, STEPS + 1):
        step_once(straight, first, step)
        step_once(stopped, before, step)
        restored = make_allocator(stopped)
        restored.load_state_dict(copy.deepcopy(before.state_dict()))
        before = restored
        for name, matrix in adapter_state_dict(straight).items():
            assert torch.equal(matrix, adapter_state_dict(stopped)[name]), (step, name)
    assert first.kept_ranks() == restored.kept_ranks() == 16
    assert restored.means == {}  # no memory for what is over


def test_no_step_is_needed_to_make_the_choice_final():
    """Float16's scaler may skip the very step at which the choice was due."""
    model = adapted()
    allocator = make_allocator(model)
    for step in (1, 2, 3, 4, 5, 6, 8):
        step_once(model, allocator, step)
    kept = [layer.lora_e.ne(0) for layer in allocator.layers.values()]
    assert sum(int(x.sum()) for x in kept) == 16
    for step in (9, 10):
        step_once(model, allocator, step)
        assert all(
            x.equal(y.lora_e.ne(0)) for x, y in zip(kept, allocator.layers.values(), strict=True)
        )


def test_without_final_steps_the_last_one_leaves_the_target():
    model = adapted()
    allocator = make_allocator(model, final_steps=0, every_n_steps=4)
    budgets = [step_once(model, allocator, step) for step in range(1, STEPS + 1)]
    assert budgets[-2:] == [16, 16]
    assert allocator.kept_ranks() == 16


def test_equal_scores_leave_the_budget_and_not_less():
    model = randomize(adapted())
    allocator = make_allocator(model)
    model.zero_grad()  # no gradient: all scores are zero
    assert allocator.update(7) == 16
    assert [int(x.lora_e.count_nonzero()) for x in allocator.layers.values()] == [12, 4, 0, 0]


def test_scores_of_16_bit_adapters_are_kept_in_float32():
    model = adapted()
    for name, parameter in adapter_parameters(model).items():
        if not name.endswith("lora_e"):
            nn.init.normal_(parameter)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    allocator = make_allocator(model)
    parameters = list(allocator.parameters.values())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.3)
    allocator.update(1)
    for parameter, mean in zip(parameters, allocator.means.values(), strict=True):
        product = (parameter.float() * parameter.grad.float()).abs()
        torch.testing.assert_close(mean, 0.15 * product, rtol=1e-6, atol=0)


def test_a_run_without_steps_between_is_refused():
    with pytest.raises(
        UserError, match="warmup_steps 2 and final_steps 3 leave none of the run's 5"
    ):
        make_allocator(adapted(), total=5)
    make_allocator(adapted(), total=6)


# --- plain LoRA and back --------------------------------------------------------------------------


def odd_or_all(path, layer):
    """Prune the odd ranks, of one module all of them."""
    return slice(None) if "up_proj" in path else slice(1, None, 2)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("scaling", ["lora", "rslora", "quarter_root"])
def test_peft_computes_the_folded_adapter_as_plain_lora(tiny_llama, tmp_path, scaling):
    base = copy.deepcopy(tiny_llama)
    plain = logits(base)
    randomize(adapted(tiny_llama, scaling=scaling, plan={"target_rank": 3}), odd_or_all)
    adapter = collect_adapter(tiny_llama)
    for path, layer in adapter_layers(tiny_llama):
        b, e, a = (x.detach().double() for x in (layer.lora_b, layer.lora_e, layer.lora_a))
        dense = layer.gamma * b @ e.diag() @ a
        found = adapter.layers[path]
        folded = found.numbers.gamma * found.lora_b.double() @ found.lora_a.double()
        torch.testing.assert_close(folded, dense, rtol=1e-6, atol=1e-9)
        assert found.numbers.rank == len(found.lora_a) == (1 if "up_proj" in path else 6)
        assert found.numbers.gamma == pytest.approx(layer.gamma, rel=1e-12)
    write_adapter(adapter, tmp_path / "adapter")
    ours, theirs = logits(tiny_llama), logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert (ours - plain).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_nothing_left_is_one_rank_that_does_nothing():
    a, b, numbers = torch.randn(5, 7), torch.randn(11, 5), ResolvedAdapter(5, 3.0, "lora")
    kept_a, kept_b, folded = fold_values(a, b, torch.zeros(5), numbers)
    assert torch.equal(kept_a, a[:1])
    assert kept_b.shape == (11, 1)
    assert not kept_b.any()
    assert (folded.rank, folded.gamma) == (1, pytest.approx(numbers.gamma))


@pytest.mark.parametrize("alpha", [ALPHA, 2.0])
def test_a_plain_adapter_is_taken_back_as_it_was(tmp_path, alpha):
    trained = randomize(adapted(alpha=alpha), lambda path, layer: slice(1, None, 2))
    write_adapter(collect_adapter(trained), tmp_path / "adapter")
    model = randomize(adapted())
    before = {path: layer.lora_a.detach().clone() for path, layer in adapter_layers(model)}
    copy_adapter(model, read_adapter(tmp_path / "adapter"))
    assert model(*batch(0)).loss.item() == pytest.approx(trained(*batch(0)).loss.item(), rel=1e-6)
    for path, layer in adapter_layers(model):
        assert layer.lora_e.count_nonzero() == 6
        assert torch.equal(layer.lora_a[6:], before[path][6:])  # to be trained from there


def test_adapters_that_do_not_fit_are_refused():
    model = adapted()
    small = adapted(rank=5)
    saved = collect_adapter(randomize(adapted()))
    with pytest.raises(UserError, match=r"layers\.0 has rank 12 and gamma .* rank 5 and gamma"):
        copy_adapter(small, saved)
    with pytest.raises(UserError, match=r"saved state lacks layers\.3\.lora_a"):
        copy_adapter(model, Adapter({p: x for p, x in saved.layers.items() if p != "layers.3"}))
    turned = Adapter(saved.layers | {"layers.0": saved.layers["layers.1"]})
    with pytest.raises(UserError, match="fit a linear map of 11 -> 9, the model has 7 -> 11"):
        copy_adapter(model, turned)
    plain = Chain()
    inject_adapters(plain, AdapterSpec(rank=11))
    with pytest.raises(UserError, match=r"rank 12 and gamma .* rank 11"):
        copy_adapter(plain, saved)


# --- the configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"target_rank": 0}, "allocation.target_rank must be a positive integer, got 0."),
        ({"warmup_steps": -1}, "allocation.warmup_steps is a number of steps, got -1."),
        ({"final_steps": 1.5}, "allocation.final_steps is a number of steps, got 1.5."),
        ({"every_n_steps": 0}, "allocation.every_n_steps must be a positive integer, got 0."),
        ({"orthogonality": -0.1}, "allocation.orthogonality must be 0 or positive and finite, got"),
        ({"orthogonality": math.inf}, "allocation.orthogonality must be 0 or positive and finite,"),
        ({"beta1": 1.0}, "allocation.beta1 must be in [0, 1), got 1.0."),
        ({"beta2": -0.1}, "allocation.beta2 must be in [0, 1), got -0.1."),
    ],
)
def test_a_plan_out_of_range_is_refused(plan, message):
    with pytest.raises(UserError) as error:
        RankAllocation(**(PLAN | plan))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 4}, "target_rank is 4, which leaves nothing to take away from rank 4"),
        ({"rank": 3}, "target_rank is 4, which leaves nothing to take away from rank 3"),
        ({"rank_pattern": {"0": 5}}, "allocation chooses the rank of each module"),
        ({"init": "rank_corrected"}, "init is 'rank_corrected', but with allocation A and B are"),
        ({"init": "gaussian"}, "init is 'gaussian', but with allocation A and B are drawn"),
    ],
)
def test_what_an_allocation_does_not_go_with_is_refused(fields, message):
    with pytest.raises(UserError) as error:
        AdapterSpec(**({"rank": RANK, "allocation": PLAN} | fields))
    assert message in str(error.value)


def test_a_checkpoint_s_mapping_is_the_plan():
    spec = AdapterSpec(rank=RANK, allocation=PLAN)
    assert spec.allocation == RankAllocation(4, 2, 3, 1, 0.5, 0.85, 0.85)
