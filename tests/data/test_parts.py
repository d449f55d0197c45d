import datetime
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rslightning.data.parts import Partition
from rslightning.data.rows import find_rows
from rslightning.errors import UserError


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": str(number)}) + "\n" for number in range(50)))
    return find_rows(str(path), "train")


def partition(num_examples=None, held_out_examples=8, seed=0, streaming=False):
    return Partition(num_examples, held_out_examples, seed, streaming)


def test_rows_are_trained_on_or_held_out_never_both(rows):
    for seed in range(5):
        held_out = partition(seed=seed).select(rows, "held-out", own_split=False)
        training = partition(seed=seed).select(rows, "training", own_split=False)
        assert sorted([*held_out, *training]) == list(range(50))
        assert (len(held_out), len(training)) == (8, 42)
        assert list(held_out) == sorted(held_out)
        tested = partition(seed=seed).select(rows, "test", own_split=False)
        assert tested.tolist() == held_out.tolist()


def test_a_subset_of_more_rows_holds_that_of_fewer(rows):
    chosen = [
        set(partition(num_examples=count).select(rows, "training", own_split=False))
        for count in (5, 20, 42, 1000)
    ]
    assert [len(numbers) for numbers in chosen] == [5, 20, 42, 42]
    assert chosen[0] < chosen[1] < chosen[2] == chosen[3]


def test_held_out_rows_do_not_depend_on_how_many_are_trained_on(rows):
    expected = partition().select(rows, "held-out", own_split=False).tolist()
    found = partition(num_examples=3).select(rows, "held-out", own_split=False)
    assert found.tolist() == expected


def test_a_split_of_its_own_is_taken_from_the_top_and_tested_whole(rows):
    assert partition().select(rows, "held-out", own_split=True).tolist() == list(range(8))
    assert partition(held_out_examples=None).select(rows, "held-out", own_split=True) is None
    assert partition().select(rows, "test", own_split=True) is None
    assert partition().select(rows, "training", own_split=True) is None
    subset = partition(num_examples=7).select(rows, "training", own_split=True)
    assert len(set(subset.tolist())) == 7


def test_a_stream_holds_out_its_beginning(rows):
    found = partition(streaming=True).select(rows, "held-out", own_split=False)
    assert found.tolist() == list(range(8))


def test_a_stream_is_known_by_the_rows_that_are_held_out(rows, tmp_path):
    streamed = partition(streaming=True)
    before = streamed.identity(rows, "held-out", own_split=False)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()

    def identity(number):
        changed = [*lines]
        changed[number] = json.dumps({"text": "changed"})
        (tmp_path / "rows.jsonl").write_text("\n".join(changed))
        return streamed.identity(rows, "held-out", own_split=False)

    assert identity(30) == before
    assert identity(3) != before


def test_a_stream_may_have_columns_that_json_has_no_form_for(tmp_path):
    def identity(day):
        columns = {"text": ["a"], "date": [datetime.date(2023, 1, day)], "bytes": [b"\xff"]}
        parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
        rows = find_rows(str(tmp_path / "rows.parquet"), "train")
        return partition(streaming=True).identity(rows, "held-out", own_split=False)

    assert identity(1) == identity(1) != identity(2)


def test_nothing_left_to_train_on_is_refused(rows):
    with pytest.raises(UserError, match="has 50 rows, of which held_out_examples takes 50: none"):
        partition(held_out_examples=50).select(rows, "training", own_split=False)


def test_the_draw_never_changes(rows):
    # Legacy RandomState, whose stream numpy has frozen.
    expected = np.sort(np.random.RandomState([4, 8]).permutation(50)[:8]).tolist()
    assert partition(seed=4).select(rows, "held-out", own_split=False).tolist() == expected
