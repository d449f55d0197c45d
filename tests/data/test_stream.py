import json

import pytest
import torch

from rslightning.data import OpenOrca
from rslightning.data.stream import Position, StreamLoader
from rslightning.errors import UserError


@pytest.fixture
def stream(make_data):
    """Return a factory of DataModules that stream 24 rows in chunks of 10, 10 and 4."""

    def make(**options):
        data = make_data(
            **({"streaming": True, "held_out_examples": 7, "shuffle_buffer": 10} | options)
        )
        data.setup("fit")
        return data

    return make


def loader(data, rank=0, world_size=1, **options):
    """Return the loader of one process, which believes that the others are where it is."""
    reader = data._chunk_reader()
    reader = type(reader)(**(vars(reader) | {"rank": rank, "world_size": world_size}))
    defaults = {"num_workers": data.num_workers, "gather": lambda mine: mine.expand(world_size, -1)}
    return StreamLoader(
        reader, data.batch_size, lambda blocks, total: (blocks, total), **(defaults | options)
    )


def take(loader, count):
    """Return the examples' ids of the first batches."""
    batches = []
    for _, (blocks, _) in zip(range(count), loader, strict=False):
        batches.append([block.input_ids.tolist() for block in blocks])
    return batches


def rows(batches):
    return sorted(row for batch in batches for row in batch)


def every_row(make_data):
    data = make_data()
    data.setup("fit")
    return sorted(block.input_ids.tolist() for block in data.train)


def test_a_pass_has_every_row_once_and_another_order_each_time(stream, make_data):
    # Batches of 4: a chunk of 10 rows makes 3, the one of 4 rows makes 1.
    batches = take(loader(stream()), 14)
    first, second = batches[:7], batches[7:]
    assert [len(batch) for batch in first] == [4, 4, 2, 4, 4, 2, 4]
    assert rows(first) == rows(second) == every_row(make_data)
    assert rows(first[:3]) == rows(second[:3])  # the same chunk
    assert first[:3] != second[:3]
    assert rows(first[:3]) != [row for batch in first[:3] for row in batch]  # shuffled
    torch.manual_seed(5)  # the global seed has no part in it
    assert take(loader(stream()), 14) == batches
    assert take(loader(stream(seed=1)), 7) != first


def test_packed_blocks_hold_the_rows_of_their_chunk(stream, make_data):
    data = stream(packing=True)
    counted = []
    blocks = []
    for found, _ in loader(data, on_chunk=counted.append):
        blocks += found
        if sum(len(block.lengths) for block in blocks) >= 24:
            break
    examples = []
    for block in blocks:
        ends = block.lengths.cumsum().tolist()
        starts = [0, *ends[:-1]]
        examples += [block.input_ids[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
        assert ends[-1] <= data.max_length
    assert len(blocks) < 24
    assert sorted(examples) == every_row(make_data)
    assert [counts.rows for counts in counted] == [10, 10, 4]
    assert sum(c.tokens for c in counted) == sum(map(len, every_row(make_data)))


def test_workers_do_not_change_the_order(stream):
    batches = take(loader(stream()), 15)
    for workers in (1, 2):
        assert take(loader(stream(num_workers=workers)), 15) == batches


def test_processes_share_a_pass_by_chunks(stream, make_data):
    # Pass 0: chunks 0 and 2 to process 0, chunk 1 to process 1; pass 1 the other way round.
    data = stream()
    first, second = (take(loader(data, rank, 2), 7) for rank in range(2))
    whole = take(loader(data), 14)
    assert first == [*whole[:3], whole[6], *whole[10:13]]
    assert second == [*whole[3:6], *whole[7:10], whole[13]]


def test_each_process_has_rows_where_there_are_fewer_chunks_than_processes(stream):
    data = stream(shuffle_buffer=100)
    for rank in range(3):
        assert len(take(loader(data, rank, 3), 2)) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_goes_on_with_the_next_batch(stream, workers, window, rank):
    data = stream(num_workers=workers)
    options = {"rank": rank, "world_size": 2, "window": lambda first: window}
    expected = [(b, int(t)) for b, t in batches_of(loader(data, **options), 13)]
    for after in (1, 3, 8):
        started = loader(data, **options)
        seen = [(b, int(t)) for b, t in batches_of(started, after)]
        state = json.loads(json.dumps(started.state_dict()))
        resumed = loader(data, **options)
        resumed.load_state_dict(state)
        rest = [(b, int(t)) for b, t in batches_of(resumed, 13 - after)]
        assert seen + rest == expected


def batches_of(loader, count):
    """Yield the ids of the first batches, with the targets of their optimizer step."""
    for _, (blocks, total) in zip(range(count), loader, strict=False):
        yield [block.input_ids.tolist() for block in blocks], total


def test_a_second_iteration_goes_on(stream):
    data = stream()
    expected = take(loader(data), 12)
    parts = loader(data, length=4, window=lambda first: min(3, 4 - first))  # steps of 3 and 1
    assert len(parts) == 4
    assert take(parts, 9) + take(parts, 9) + take(parts, 9) == expected


def test_targets_are_those_of_the_whole_step(stream):
    data = stream()
    found = list(zip(loader(data, window=lambda first: 3), range(9), strict=False))
    for start in range(0, 9, 3):
        step = [blocks for (blocks, _), _ in found[start : start + 3]]
        targets = sum(int((block.labels != -100).sum()) for blocks in step for block in blocks)
        assert [int(total) for (_, total), _ in found[start : start + 3]] == [targets] * 3


def test_the_beginning_is_held_out_where_there_is_no_split(make_data, orca_folder, model_folder):
    path = str(orca_folder / "train.jsonl")
    options = {"max_length": 128, "streaming": True, "shuffle_buffer": 6, "packing": False}
    data = OpenOrca(path, str(model_folder), held_out_examples=8, batch_size=4, **options)
    data.setup("fit")
    held_out = sorted(block.input_ids.tolist() for block in data.held_out)
    batches = take(loader(data), 8)  # rows 9 to 12, 13 to 18, 19 to 24, and again
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 2, 4, 4, 2]
    assert sorted(held_out + rows(batches[:5])) == every_row(make_data)


def test_a_state_of_other_processes_is_refused(stream):
    state = loader(stream(), 0, 2).state_dict()
    with pytest.raises(UserError) as caught:
        loader(stream()).load_state_dict(state)
    assert str(caught.value) == (
        "The checkpoint's stream was read by 2 processes, this run has 1; resume with 2."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 5}, "data.num_examples draws from all rows, which a stream has not"),
        ({"held_out_examples": None}, "data.held_out_examples: null takes a whole split"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer must be at least 1, got 0."),
    ],
)
def test_options_that_a_stream_cannot_follow_are_refused(make_data, options, message):
    with pytest.raises(UserError) as caught:
        make_data(**({"streaming": True, "held_out_examples": 7} | options))
    assert str(caught.value).startswith(message)


def test_a_fit_needs_a_number_of_steps(make_trainer, make_module, make_data):
    data = make_data(streaming=True, held_out_examples=7)
    with pytest.raises(UserError, match=r"^data.streaming needs trainer.max_steps: a stream has"):
        make_trainer(max_epochs=1).fit(make_module(), data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_named_by_one_sentence(tmp_path, model_folder, workers):
    lines = [{"system_prompt": "", "question": "Q", "response": "R"}] * 30
    lines[22] = {"system_prompt": "", "question": "Q", "response": None}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"streaming": True, "held_out_examples": 2, "shuffle_buffer": 10}
    data = OpenOrca(str(path), str(model_folder), num_workers=workers, **options)
    data.setup("fit")
    with pytest.raises(UserError) as caught:
        take(loader(data), 50)
    assert str(caught.value) == (
        f"{path}, row 23: column 'response' is None, not a text; mend it, or count such rows with "
        "data.on_bad_row: skip."
    )


def test_a_stream_without_a_target_ends_with_a_sentence(stream):
    data = stream(train_on_prompt=False, max_length=128)
    data.max_length = 5  # the held-out rows were prepared
    with pytest.raises(UserError, match=r"^No row of .* has a target within max_length = 5 tokens"):
        take(loader(data), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_bad_rows_alone_ends_with_the_first_of_them(tmp_path, model_folder, workers):
    good = {"system_prompt": "", "question": "Q", "response": "R"}
    lines = [good] * 2 + [good | {"response": None}] * 8
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"streaming": True, "held_out_examples": 2, "shuffle_buffer": 10}
    data = OpenOrca(str(path), str(model_folder), num_workers=workers, on_bad_row="skip", **options)
    data.setup("fit")
    with pytest.raises(UserError, match=r"^No row can be used: \d+ bad rows were skipped, the fir"):
        take(loader(data), 1)


def test_a_stream_that_is_held_out_as_a_whole_is_refused(orca_folder, model_folder):
    path = str(orca_folder / "train.jsonl")
    data = OpenOrca(path, str(model_folder), held_out_examples=24, streaming=True)
    data.setup("fit")
    with pytest.raises(UserError, match=r"train.jsonl has no rows to train on\.$"):
        next(data._chunk_reader().read(Position()))


def test_data_show_reads_the_first_chunk(stream):
    data = stream()
    blocks = data.training_blocks()
    assert rows([[block.input_ids.tolist() for block in blocks]]) == rows(take(loader(data), 3))
