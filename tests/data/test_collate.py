import torch

from rslightning.batch import IGNORED
from rslightning.data.collate import pad_batch, pad_prompts
from rslightning.data.encode import Example
from rslightning.losses import token_nats

EXAMPLES = [Example([1, 5, 6, 2], [IGNORED, IGNORED, 6, 2]), Example([1, 7], [IGNORED, 7])]


def test_examples_are_padded_on_the_right():
    batch = pad_batch(EXAMPLES, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 5, 6, 2], [1, 7, 9, 9]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 6, 2], [IGNORED, 7, IGNORED, IGNORED]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert {tensor.dtype for tensor in batch} == {torch.int64}


def test_prompts_are_padded_on_the_left():
    batch = pad_prompts([[1, 5, 6], [1]], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 5, 6], [9, 9, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert (batch.labels == IGNORED).all()


def test_padding_that_is_also_the_end_token_stays_no_target():
    batch = pad_batch(EXAMPLES, pad_id=2)
    assert batch.labels[1].tolist() == [IGNORED, 7, IGNORED, IGNORED]
    assert batch.attention_mask[1].tolist() == [1, 1, 0, 0]


@torch.no_grad()
def test_padding_changes_no_loss(tiny_llama):
    def nats(examples):
        batch = pad_batch(examples, pad_id=0)
        logits = tiny_llama(batch.input_ids, attention_mask=batch.attention_mask).logits
        return token_nats(logits, batch.labels)

    together, apart = nats(EXAMPLES), [nats([example]) for example in EXAMPLES]
    assert int(together[1]) == sum(int(targets) for _, targets in apart) == 3
    torch.testing.assert_close(together[0], sum(part for part, _ in apart))
