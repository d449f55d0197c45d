import math

import pytest
import torch

from rslightning.batch import IGNORED
from rslightning.losses import token_nats

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
