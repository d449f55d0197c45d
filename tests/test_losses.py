import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rslightning import cost, losses
from rslightning.batch import IGNORED
from rslightning.losses import linear_nats, token_nats

B, T, V = 3, 7, 11


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=generator)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :4] = IGNORED
    labels[1, 5:] = IGNORED
    labels[2] = IGNORED
    return logits, labels


def nats_by_loop(logits, labels):
    """Sum -log softmax in float64, one position after the other, next token from this position."""
    nats, targets = 0.0, 0
    for row, ids in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for scores, target in zip(row[:-1], ids[1:], strict=True):
            if target != IGNORED:
                nats += math.log(sum(math.exp(score) for score in scores)) - scores[target]
                targets += 1
    return nats, targets


def test_nats_are_those_of_a_float64_loop(scored):
    nats, targets = token_nats(*scored)
    expected_nats, expected_targets = nats_by_loop(*scored)
    assert int(targets) == expected_targets == 3 + 4
    assert float(nats) == pytest.approx(expected_nats, rel=1e-6)


def test_bfloat16_logits_are_summed_in_float32(scored):
    logits, labels = scored
    nats, _ = token_nats(logits.bfloat16(), labels)
    assert nats.dtype == torch.float32
    assert float(nats) == pytest.approx(nats_by_loop(logits.bfloat16(), labels)[0], rel=1e-6)


def test_parts_of_a_batch_add_up_to_the_whole(scored):
    logits, labels = scored
    whole = token_nats(logits, labels)
    parts = [token_nats(logits[rows], labels[rows]) for rows in (slice(0, 1), slice(1, 3))]
    for total, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(total, sum(pieces))


def test_positions_that_are_no_target_change_nothing(scored):
    logits, labels = scored
    is_target = (labels[:, 1:] != IGNORED).unsqueeze(-1)
    elsewhere = logits.clone()
    elsewhere[:, :-1] += 100.0 * ~is_target * torch.randn(B, T - 1, V)
    elsewhere[:, -1] = torch.nan  # nothing follows the last position
    assert [x.item() for x in token_nats(elsewhere, labels)] == [
        x.item() for x in token_nats(logits, labels)
    ]


def test_a_label_at_the_first_position_is_no_target(scored):
    logits, labels = scored
    labels[:] = IGNORED
    labels[:, 0] = 5
    nats, targets = token_nats(logits, labels)
    assert (float(nats), int(targets)) == (0.0, 0)


def test_no_target_gives_a_gradient_of_zero_and_not_nan(scored):
    logits, labels = scored
    logits.requires_grad_()
    nats, targets = token_nats(logits, torch.full_like(labels, IGNORED))
    (nats / targets.clamp(min=1)).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


# --- fused with the head ------------------------------------------------------------------------

N, H = 13, 5
BIASES = {"bias": True, "no bias": False}


def head_inputs(bias=True, dtype=torch.float32, scale=1.0):
    """Return hidden [N, H], weight [V, H], bias [V] or None, that require gradients, and targets.

    Eight of the thirteen positions are targets.
    """
    generator = torch.Generator().manual_seed(1)
    hidden, weight, offset = (
        (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        for shape in ((N, H), (V, H), (V,))
    )
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[[0, 3, 4, 9, 12]] = IGNORED
    return [hidden, weight, offset if bias else None], targets


def dense(tensors, targets):
    """Return the nats and their gradients, by whole logits and autograd in float64."""
    tensors = [x if x is None else x.detach().double().requires_grad_() for x in tensors]
    nats = F.cross_entropy(F.linear(*tensors), targets, reduction="sum", ignore_index=IGNORED)
    return nats.detach(), torch.autograd.grad(nats, [x for x in tensors if x is not None])


def fused(tensors, targets):
    nats = linear_nats(*tensors, targets)
    return nats.detach(), torch.autograd.grad(nats, [x for x in tensors if x is not None])


@pytest.fixture(
    params=[(1, 1), (3, 2), (8, 3), (8, 8), (100, 5), (100, 100)],
    ids=lambda rows: "{} rows, {} at a time".format(*rows),
)
def chunk(request, monkeypatch):
    """Let a chunk of logits and its softmax, a part of it at a time, have so many rows."""
    chunk_rows, part_rows = request.param
    monkeypatch.setattr(cost, "CHUNK_BYTES", chunk_rows * V * 4 + 3)
    monkeypatch.setattr(cost, "CPU_PART_BYTES", part_rows * V * 4 + 3)
    assert cost.loss_rows(V, on_cpu=True, trains_head=True) == request.param
    assert cost.loss_rows(V, on_cpu=False, trains_head=False) == (chunk_rows, chunk_rows)


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_fused_nats_are_dense_ones(chunk, bias):
    tensors, targets = head_inputs(bias)
    nats, gradients = fused(tensors, targets)
    expected_nats, expected_gradients = dense(tensors, targets)
    assert float(nats) == pytest.approx(float(expected_nats), rel=1e-6)
    assert len(gradients) == 2 + bias
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_fused_gradients_are_numerical_ones(monkeypatch, bias):
    monkeypatch.setattr(cost, "CHUNK_BYTES", 3 * V * 8)
    tensors, targets = head_inputs(bias, torch.float64)
    chosen = [x for x in tensors if x is not None]
    rest = [None] * (3 - len(chosen))
    assert torch.autograd.gradcheck(lambda *x: 0.7 * linear_nats(*x, *rest, targets), chosen)


def test_a_chunk_on_a_cpu_reads_the_head_for_512_rows():
    assert cost.loss_rows(16_000, on_cpu=True, trains_head=False) == (512, 65)
    assert cost.loss_rows(256_000, on_cpu=True, trains_head=False) == (262, 4)
    assert cost.loss_rows(2**22, on_cpu=True, trains_head=False) == (16, 1)
    assert cost.loss_rows(16_000, on_cpu=True, trains_head=True) == (4194, 65)
    assert cost.loss_rows(16_000, on_cpu=False, trains_head=False) == (4194, 4194)


def test_positions_that_are_no_target_have_a_gradient_of_zero():
    tensors, targets = head_inputs()
    _, (by_hidden, _, _) = fused(tensors, targets)
    assert torch.equal(by_hidden.ne(0).any(1), targets != IGNORED)


@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 1], [0, 2]])
def test_only_what_is_trained_gets_a_gradient(trained):
    tensors, targets = head_inputs()
    _, expected = fused(tensors, targets)
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index in trained)
    linear_nats(*tensors, targets).backward()
    for index, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (index in trained)
        assert tensor.grad is None or torch.equal(tensor.grad, expected[index])


def test_huge_logits_stay_finite():
    tensors, targets = head_inputs(scale=1e3)
    nats, gradients = fused(tensors, targets)
    expected_nats, expected_gradients = dense(tensors, targets)
    assert expected_nats > 1e6
    assert float(nats) == pytest.approx(float(expected_nats), rel=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-3)


def test_in_bfloat16_only_the_products_are_rounded(chunk):
    tensors, targets = head_inputs(dtype=torch.bfloat16)
    nats, gradients = fused(tensors, targets)
    logits = F.linear(*tensors).detach().double()
    expected = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    assert nats.dtype == torch.float32
    assert float(nats) == pytest.approx(float(expected), rel=1e-6)
    for gradient, expected in zip(gradients, dense(tensors, targets)[1], strict=True):
        assert gradient.dtype == torch.bfloat16
        # Eight bits of mantissa, in the logits, their gradient, the product and its scaling.
        torch.testing.assert_close(gradient.double(), expected, rtol=2**-6, atol=2**-6)


def test_the_gradient_of_a_16_bit_weight_is_summed_in_float32(monkeypatch):
    """One row per chunk: 4,096 equal gradients of about -0.9; bfloat16's sum stops at 256."""
    monkeypatch.setattr(cost, "CHUNK_BYTES", 1)
    rows = 4096
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(V, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_nats(hidden, weight, None, torch.zeros(rows, dtype=torch.int64)).backward()
    assert weight.grad[0].item() == pytest.approx(-rows * (1 - 1 / V), rel=2**-7)


def test_autocast_multiplies_in_its_dtype():
    tensors, targets = head_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        nats, gradients = fused(tensors, targets)
        logits = F.linear(*tensors).detach()
    rounded = F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORED)
    assert logits.dtype == torch.bfloat16
    assert float(nats) == pytest.approx(float(rounded), rel=1e-6)
    assert float(nats) != pytest.approx(float(dense(tensors, targets)[0]), rel=1e-6)
    for gradient, expected in zip(gradients, dense(tensors, targets)[1], strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), expected, rtol=2**-6, atol=2**-6)


def test_autocast_leaves_float64_alone_as_in_torch():
    tensors, targets = head_inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        nats, gradients = fused(tensors, targets)
        assert nats.dtype == F.linear(*tensors).dtype == torch.float64
    expected, truths = dense(tensors, targets)
    torch.testing.assert_close(nats, expected, rtol=1e-12, atol=0)
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)


def test_fused_without_targets(chunk):
    tensors, targets = head_inputs()
    nats, gradients = fused(tensors, torch.full_like(targets, IGNORED))
    assert float(nats) == 0.0
    for tensor, gradient in zip(tensors, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_a_target_outside_of_the_vocabulary_is_refused():
    tensors, targets = head_inputs()
    for word in (V, -1):
        targets[5] = word
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_nats(*tensors, targets)


def test_without_gradients_there_is_only_the_value(monkeypatch):
    tensors, targets = head_inputs()
    expected, _ = fused(tensors, targets)
    monkeypatch.setattr(losses, "_slopes_", None)
    with torch.no_grad():
        nats = linear_nats(*tensors, targets)
    assert torch.equal(nats, expected)
    assert not nats.requires_grad


def test_the_backward_pass_reads_no_weight():
    tensors, targets = head_inputs()
    _, expected = fused(tensors, targets)
    nats = linear_nats(*tensors, targets)
    with torch.no_grad():
        for tensor in tensors:  # as sharded strategies free it
            tensor.fill_(torch.nan)
    gradients = torch.autograd.grad(nats, tensors)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_two_backward_passes_are_the_same():
    tensors, targets = head_inputs()
    nats = 3.0 * linear_nats(*tensors, targets)
    first, second = (torch.autograd.grad(nats, tensors, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    _, expected = fused(tensors, targets)
    torch.testing.assert_close(first, tuple(3.0 * gradient for gradient in expected))


def test_a_second_derivative_is_refused():
    tensors, targets = head_inputs()
    with pytest.raises(RuntimeError, match=r"^linear_nats cannot be differentiated twice: leave"):
        torch.autograd.grad(linear_nats(*tensors, targets), tensors, create_graph=True)


def test_recomputing_changes_no_gradient():
    tensors, targets = head_inputs()
    _, expected = fused(tensors, targets)
    nats = checkpoint(linear_nats, *tensors, targets, use_reentrant=False)
    gradients = torch.autograd.grad(nats, tensors)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_torch_compile_takes_it_as_a_whole():
    tensors, targets = head_inputs()

    def twice(hidden, weight, bias, targets):
        return linear_nats(2.0 * hidden, weight, bias, targets)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for used in (targets, targets.roll(1), targets.clamp(min=0)):  # also another number of targets
        gradients = torch.autograd.grad(compiled(*tensors, used), tensors)
        expected = torch.autograd.grad(twice(*tensors, used), tensors)
        torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("gradient", [True, False])
def test_whole_logits_are_never_made(monkeypatch, largest_allocation, gradient):
    rows, words, chunk_rows = 301, 2003, 10
    whole = rows * words * 4
    monkeypatch.setattr(cost, "CHUNK_BYTES", chunk_rows * words * 4)
    hidden = torch.randn(rows, H, requires_grad=gradient)
    weight, targets = torch.randn(words, H), torch.arange(rows)

    def run(nats):
        return lambda: nats().backward() if gradient else nats()

    plain = run(lambda: F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum"))
    chunked = run(lambda: linear_nats(hidden, weight, None, targets))
    assert largest_allocation(plain) >= whole
    assert largest_allocation(chunked) <= 2 * whole * chunk_rows / rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [-304.0, -12.0, 8.0, 12.0, 304.0])
def test_a_target_far_from_the_others_is_as_exact(lead, dtype):
    """The target's logit is 1000 + `lead`, all others are 1000."""
    weight, bias = torch.zeros(V, 1, dtype=dtype), torch.full((V,), 1000.0, dtype=dtype)
    weight[0] = lead
    hidden = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    nats = linear_nats(hidden, weight, bias, torch.tensor([0]))
    nats.backward()
    others = (V - 1) * math.exp(-lead)  # by the target's
    assert nats.item() == pytest.approx(math.log1p(others), rel=1e-3, abs=1e-6)
    slope = -lead * others / (1 + others)  # (softmax - 1) lead
    assert hidden.grad.item() == pytest.approx(slope, rel=1e-2, abs=1e-5)
