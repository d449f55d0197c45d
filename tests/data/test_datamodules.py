import json

import pytest
import torch

from rslightning.batch import IGNORED
from rslightning.data import GSM8K, OpenOrca, PlainText
from rslightning.data.tokenizer import load_tokenizer
from rslightning.errors import UserError


@pytest.fixture
def orca(orca_folder, model_folder):
    def make(stage="fit", **options):
        places = {"path": str(orca_folder), "tokenizer": str(model_folder), "packing": False}
        options = places | options
        data = OpenOrca(**options)
        data.setup(stage)
        return data

    return make


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def single_file(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def targets(data, example):
    return data.tokenizer.decode([x for x in example.labels.tolist() if x != IGNORED])


def test_openorca_renders_its_columns(orca, orca_folder):
    data = orca(held_out_examples=None)
    with_system, without = (rows_of(orca_folder / "held_out.jsonl")[index] for index in (2, 0))
    assert with_system["system_prompt"]
    assert not without["system_prompt"]
    assert data.held_out_rows[2] == (
        f"Answer in one sentence.\n\n### Question:\n{with_system['question']}\n\n### Answer:\n",
        with_system["response"],
    )
    assert data.held_out_rows[0] == (
        f"### Question:\n{without['question']}\n\n### Answer:\n",
        without["response"],
    )


def test_gsm8k_renders_its_columns(gsm8k_folder, model_folder):
    data = GSM8K(str(gsm8k_folder), str(model_folder), held_out_examples=None, packing=False)
    data.setup("fit")
    row = rows_of(gsm8k_folder / "test.jsonl")[0]
    assert data.held_out_rows[0] == (f"Question: {row['question']}\nAnswer:\n", row["answer"])
    assert (len(data.train), len(data.held_out)) == (17, 5)
    assert targets(data, data.held_out[0]) == row["answer"] + "</s>"


def test_plain_text_is_a_target_from_its_first_token(tmp_path, model_folder):
    (tmp_path / "lines.txt").write_text("One line.\nAnother one.\n")
    data = PlainText(
        str(tmp_path / "lines.txt"), str(model_folder), held_out_examples=1, packing=False
    )
    data.setup("fit")
    decoded = {targets(data, e) for e in (*data.train, *data.held_out)}
    assert decoded == {"One line.</s>", "Another one.</s>"}


def test_labels_are_the_response_and_the_end(orca):
    data = orca(held_out_examples=None)
    for (prompt, response), example in zip(data.held_out_rows, data.held_out, strict=True):
        assert targets(data, example) == response + "</s>"
        assert data.tokenizer.decode(example.input_ids) == f"<s>{prompt}{response}</s>"


def test_the_prompt_is_a_target_on_request(orca):
    example = orca(train_on_prompt=True).train[0]
    assert example.labels.tolist() == [IGNORED, *example.input_ids[1:]]


def test_a_folder_with_both_splits_keeps_them(orca, orca_folder):
    data = orca(held_out_examples=4)
    assert [response for _, response in data.held_out_rows] == [
        row["response"] for row in rows_of(orca_folder / "held_out.jsonl")[:4]
    ]
    everything = {row["response"] + "</s>" for row in rows_of(orca_folder / "train.jsonl")}
    assert {targets(data, example) for example in data.train} == everything


def test_rows_are_held_out_of_a_single_file(orca, orca_folder):
    def split(**options):
        data = orca(path=str(orca_folder / "train.jsonl"), held_out_examples=5, **options)
        train = [targets(data, example) for example in data.train]
        return train, [response + "</s>" for _, response in data.held_out_rows]

    train, held_out = split()
    assert (len(train), len(held_out)) == (19, 5)
    everything = {row["response"] + "</s>" for row in rows_of(orca_folder / "train.jsonl")}
    assert set(train) | set(held_out) == everything  # 24 distinct rows: disjoint, too
    assert split() == (train, held_out)
    assert set(split(seed=1)[1]) != set(held_out)
    seven, ten = (split(num_examples=count) for count in (7, 10))
    assert (len(seven[0]), seven[1]) == (7, held_out)
    assert set(seven[0]) < set(ten[0]) < set(train)  # a sweep over sizes adds rows


def test_no_rows_are_held_out_of_a_single_file_on_request(orca, orca_folder):
    for none in (0, None):
        data = orca(path=str(orca_folder / "train.jsonl"), held_out_examples=none)
        assert (len(data.train), len(data.held_out)) == (24, 0)


def test_the_order_is_a_function_of_the_seed(orca):
    def batches(seed):
        data = orca(seed=seed, batch_size=5)
        loader = data.train_dataloader()
        passes = [[batch.input_ids.tolist() for batch in loader] for _ in range(2)]
        return [block.input_ids.tolist() for block in data.train], passes

    torch.manual_seed(1)
    examples, (first, second) = batches(seed=3)
    torch.manual_seed(2)  # the global seed has no part in it
    assert batches(seed=3) == (examples, [first, second])
    assert batches(seed=4)[1][0] != first
    assert first != second
    assert [len(batch) for batch in first] == [5] * 5  # the last one has a row of padding

    def rows(batches):
        rows = (tuple(i for i in row if i != 0) for batch in batches for row in batch)
        return sorted(row for row in rows if row)

    assert rows(first) == rows(second) == sorted(map(tuple, examples))


def test_held_out_batches_keep_their_order(orca):
    data = orca(batch_size=3, held_out_examples=None)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        ids = [row[row != 0].tolist() for batch in batches for row in batch.input_ids]
        assert ids == [*(block.input_ids.tolist() for block in data.held_out), [], []]


def test_prompts_to_answer_are_padded_on_the_left(orca):
    data = orca("predict", batch_size=4, held_out_examples=None)
    batches = list(data.predict_dataloader())
    assert [len(batch.input_ids) for batch in batches] == [4, 3]
    first = batches[0]
    assert (first.attention_mask[:, -1] == 1).all()
    for row, mask, (prompt, _) in zip(
        first.input_ids, first.attention_mask, data.held_out_rows, strict=False
    ):
        assert data.tokenizer.decode(row[mask.bool()]) == f"<s>{prompt}"


def test_truncation_is_counted_and_said(orca, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        data = orca(max_length=60)
    whole = orca(max_length=10_000).train
    cut = sum(len(example.input_ids) > 60 for example in whole)
    lost = sum(max(0, len(example.input_ids) - 60) for example in whole)
    assert 0 < cut < 24
    message = next(r.getMessage() for r in caplog.records if "training" in r.getMessage())
    assert f"{cut} rows cut, {lost} tokens lost" in message
    assert max(len(example.input_ids) for example in data.train) == 60


def test_a_limit_that_leaves_no_target_is_refused(orca, orca_folder):
    with pytest.raises(UserError) as caught:
        orca(max_length=3)
    assert str(caught.value) == (
        f"No held-out row of {orca_folder} has a target within max_length = 3 tokens; "
        "raise data.max_length."
    )


@pytest.mark.parametrize("option", ["max_length", "batch_size"])
def test_sizes_below_one_are_refused(orca, option):
    with pytest.raises(UserError, match=rf"^data\.{option} must be at least 1, got 0\.$"):
        orca(**{option: 0})


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("num_examples", 0, "1, or null for all rows"),
        ("num_examples", -1, "1, or null for all rows"),
        ("held_out_examples", -1, "0, or null for a whole split"),
    ],
)
def test_numbers_of_rows_that_cannot_be_drawn_are_refused(orca, option, value, least):
    with pytest.raises(UserError) as caught:
        orca(**{option: value})
    assert str(caught.value) == f"data.{option} must be at least {least}, got {value}."


def test_holding_out_everything_is_refused(orca, orca_folder):
    path = str(orca_folder / "train.jsonl")
    with pytest.raises(UserError) as caught:
        orca(path=path)
    assert str(caught.value) == (
        f"{path} has 24 rows, of which held_out_examples takes 200: none is left to train on."
    )


def test_a_missing_column_is_named(gsm8k_folder, model_folder):
    data = OpenOrca(str(gsm8k_folder), str(model_folder))
    with pytest.raises(UserError) as caught:
        data.setup("fit")
    assert str(caught.value) == (
        f"{gsm8k_folder / 'test.jsonl'} has no column 'system_prompt'; "
        "its columns are question, answer."
    )


def test_a_model_without_tokenizer_is_named(orca, tmp_path):
    with pytest.raises(UserError) as caught:
        orca(tokenizer=str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path} holds no tokenizer: none of tokenizer.json, ")
    assert "\n" not in str(caught.value)


def test_a_second_setup_for_another_stage_completes_the_first(orca):
    data = orca("validate")
    assert data.train is None
    data.setup("fit")
    assert len(data.train) == 24


def test_largest_token_id_is_that_of_all_examples(orca):
    data = orca(held_out_examples=None)
    every = [i for block in (*data.train, *data.held_out) for i in block.input_ids.tolist()]
    assert data.largest_token_id == max(every)


def test_a_tokenizer_without_padding_pads_with_its_end(orca):
    data = orca()
    data.tokenizer.pad_token = None
    assert data.pad_id == data.tokenizer.eos_token_id == 2


def test_real_gsm8k_has_its_rows(gsm8k, model_folder):
    data = GSM8K(str(gsm8k), str(model_folder), held_out_examples=None, max_length=4096)
    data.setup("fit")
    assert (data.counts["training"].rows, data.counts["held-out"].rows) == (7473, 1319)
    assert sum(len(block.lengths) for block in data.train) == 7473
    assert all("\n#### " in answer for _, answer in data.held_out_rows)


def test_real_openorca_targets_are_its_responses(stories260k, shared_file):
    path = shared_file("data/openorca_format/openorca_real_286.jsonl")
    options = {"max_length": 10_000, "held_out_examples": 12, "packing": False}
    data = OpenOrca(str(path), str(stories260k), **options)
    data.setup("fit")
    assert (len(data.train), len(data.held_out)) == (274, 12)
    bare = load_tokenizer(str(stories260k))
    for (_, response), example in zip(data.held_out_rows, data.held_out, strict=True):
        ids = [label for label in example.labels.tolist() if label != IGNORED]
        assert ids[-1] == bare.eos_token_id
        assert bare.decode(ids[:-1]).split() == response.split()  # its decoder joins spaces
