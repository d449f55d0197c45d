import numpy as np
import torch

from rslightning.batch import IGNORED
from rslightning.data.blocks import Block
from rslightning.data.collate import collate_blocks, pad_prompts, positions
from rslightning.losses import token_nats


def block(*examples) -> Block:
    """Return a block of (ids, labels) pairs."""
    ids = [token for ids, _ in examples for token in ids]
    labels = [label for _, labels in examples for label in labels]
    return Block(np.array(ids), np.array(labels), np.array([len(ids) for ids, _ in examples]))


FIRST, SECOND = ([1, 5, 6, 2], [IGNORED, IGNORED, 6, 2]), ([1, 7], [IGNORED, 7])


def test_blocks_are_padded_on_the_right():
    batch = collate_blocks([block(FIRST), block(SECOND)], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 7, 9, 9]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 6, 2], [IGNORED, 7, IGNORED, IGNORED]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch.step_targets is None
    assert {tensor.dtype for tensor in batch[:4]} == {torch.int64}


def test_positions_start_anew_in_each_example():
    batch = collate_blocks([block(FIRST, SECOND), block(SECOND)], 2.5, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2, 1, 7], [1, 7, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert float(batch.step_targets) == 2.5
    assert positions([3, 1, 2]).tolist() == [0, 1, 2, 0, 0, 1]
    assert positions([]).tolist() == []


def test_a_missing_row_is_all_padding():
    batch = collate_blocks([block(SECOND), None], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 7], [9, 9]]
    assert batch.labels[1].tolist() == [IGNORED, IGNORED]
    assert batch.attention_mask.sum(1).tolist() == [2, 0]
    assert collate_blocks([None], pad_id=9).input_ids.tolist() == [[9]]


def test_prompts_are_padded_on_the_left():
    batch = pad_prompts([[1, 5, 6], [1]], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 5, 6], [9, 9, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.position_ids is None
    assert (batch.labels == IGNORED).all()


@torch.no_grad()
def test_padding_changes_no_loss(tiny_llama):
    def nats(blocks):
        batch = collate_blocks(blocks, pad_id=0)
        logits = tiny_llama(batch.input_ids, position_ids=batch.position_ids).logits
        return token_nats(logits, batch.labels)

    rows = [block(FIRST), block(SECOND), None]
    together, apart = nats(rows), [nats([row]) for row in rows]
    assert int(together[1]) == sum(int(targets) for _, targets in apart) == 3
    torch.testing.assert_close(together[0], sum(part for part, _ in apart))
