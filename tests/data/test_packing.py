import random

import pytest

from rslightning.data import GSM8K, OpenOrca
from rslightning.data.packing import pack


def first_fit_decreasing(lengths, block_length):
    """Return the number of blocks that the textbook method needs."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        for block, room in enumerate(rooms):
            if room >= length:
                rooms[block] -= length
                break
        else:
            rooms.append(block_length - length)
    return len(rooms)


def mixture(seed):
    rng = random.Random(seed)
    spread = rng.choice([0.3, 0.6, 1.0])
    return [min(97, max(1, int(rng.lognormvariate(3, spread)))) for _ in range(rng.randrange(400))]


@pytest.mark.parametrize("seed", range(12))
def test_every_example_is_in_one_block_that_holds_it(seed):
    lengths = mixture(seed)
    blocks = pack(lengths, 97)
    assert sorted(index for block in blocks for index in block) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in block) <= 97 for block in blocks)
    assert blocks == pack(lengths, 97)
    assert len(blocks) <= first_fit_decreasing(lengths, 97) + 1


def test_pairs_are_found_that_first_fit_misses():
    lengths = [50, 26, 24, 30, 20, 49, 28, 23]  # 250: 2.5 blocks
    assert first_fit_decreasing(lengths, 100) == 3
    assert len(pack(lengths, 100)) == 3
    thirds = [50, 40, 35, 34, 33, 33, 26, 25, 24]  # 300: three full blocks
    assert first_fit_decreasing(thirds, 100) == 4
    assert len(pack(thirds, 100)) == 3


def test_nothing_and_exact_fits():
    assert pack([], 5) == []
    assert pack([5, 5], 5) == [[0], [1]]
    assert pack([1, 4], 5) == [[1, 0]]


@pytest.mark.parametrize("length", [0, 6])
def test_a_length_out_of_range_is_named(length):
    with pytest.raises(ValueError, match=rf"^example 1 has {length} tokens; a block holds 5$"):
        pack([3, length], 5)


def fill(data):
    return sum(data.train.sizes()) / (len(data.train) * data.max_length)


def test_real_data_fill_their_blocks(gsm8k, shared_file):
    tokenizer = str(shared_file("models/llama2-tokenizer"))
    data = GSM8K(str(gsm8k), tokenizer, max_length=512)
    data.setup("fit")
    assert fill(data) >= 0.98
    path = shared_file("data/openorca_format/t0_p3_sample.jsonl")
    data = OpenOrca(str(path), tokenizer, max_length=512)
    data.setup("fit")
    assert fill(data) >= 0.98
