import json

import pytest
import torch

from rslightning.data.loader import OrderedLoader

ROWS = list(range(100, 123))


def keep(rows, value):
    return rows


def loader(**options):
    return OrderedLoader(ROWS, 3, keep, **({"shuffle": True, "seed": 5} | options))


def real(batches):
    return sorted(row for batch in batches for row in batch if row is not None)


def test_a_pass_has_every_row_once_and_another_order_each_time():
    twice = loader()
    first, second = list(twice), list(twice)
    assert len(first) == len(twice) == 8
    assert real(first) == real(second) == ROWS
    assert first != second
    again = loader()
    torch.manual_seed(9)  # the global seed has no part in it
    assert [list(again), list(again)] == [first, second]
    assert list(loader(seed=6)) != first


def test_unshuffled_rows_keep_their_order():
    batches = list(loader(shuffle=False))
    assert [row for batch in batches for row in batch] == [*ROWS, None]


def test_processes_share_a_pass_evenly():
    shards = [list(loader(rank=rank, world_size=2)) for rank in range(2)]
    assert [len(shard) for shard in shards] == [4, 4]
    assert real(shards[0] + shards[1]) == ROWS
    whole = OrderedLoader(ROWS, 6, keep, shuffle=True, seed=5)
    assert [a + b for a, b in zip(*shards, strict=True)] == list(whole)  # one big batch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_state_goes_on_with_the_next_batch(workers, world_size, after):
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "num_workers": workers}
        whole = loader(**options)
        expected = [*whole, *whole]
        started = loader(**options)
        batches = iter(started)
        seen = [next(batches) for _ in range(after)]
        state = json.loads(json.dumps(started.state_dict()))
        resumed = loader(**options)
        resumed.load_state_dict(state)
        rest = list(resumed)
        if after == len(started):  # the pass was over: this was the next one
            assert seen + rest == expected
        else:
            assert seen + rest + list(resumed) == expected


def test_a_value_is_computed_from_the_rows_of_all_processes():
    def sums(order):
        return [sum(ROWS[i] for rows in batch for i in rows if i is not None) for batch in order]

    def with_value(rows, value):
        return rows, value

    shards = [
        list(
            OrderedLoader(ROWS, 3, with_value, shuffle=True, rank=r, world_size=2, step_value=sums)
        )
        for r in range(2)
    ]
    for (rows, value), (others, same) in zip(*shards, strict=True):
        assert value == same == sum(real([rows, others]))
