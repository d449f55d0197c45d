import json
import os

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rslightning.data.rows import check_columns, find_rows
from rslightning.errors import UserError

ROWS = [{"text": f"line {index}", "number": index} for index in range(5)]


def write(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in ROWS) if text is None else text
    path.write_text(text, encoding="latin-1")
    return path


def load_rows(path, split):
    rows = find_rows(path, split)
    return None if rows is None else [row.values for row in rows.pick()]


def texts(path, split="train"):
    rows = load_rows(str(path), split)
    return None if rows is None else [row["text"] for row in rows]


EVERY = [row["text"] for row in ROWS]


def test_a_file_of_each_kind_has_the_same_rows(tmp_path):
    import datasets

    write(tmp_path / "rows.jsonl")
    write(tmp_path / "rows.json", json.dumps(ROWS))
    write(tmp_path / "rows.csv", "text,number\n" + "".join(f"line {i},{i}\n" for i in range(5)))
    write(tmp_path / "rows.txt", "\n".join(EVERY))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.parquet"):
        assert texts(tmp_path / name) == EVERY, name


def test_text_has_a_row_per_line_or_per_paragraph(tmp_path):
    path = write(tmp_path / "rows.txt", "one\ntwo\n\n \nthree\n\nfour\nfive\n")

    def rows(unit):
        return [row.values["text"] for row in find_rows(str(path), "train", text_unit=unit).pick()]

    assert rows("line") == ["one", "two", "three", "four", "five"]
    assert [text.strip() for text in rows("paragraph")] == ["one\ntwo", "three", "four\nfive"]
    assert find_rows(str(path), "train").count() == 5


def test_a_single_file_is_the_training_split(tmp_path):
    assert texts(write(tmp_path / "test.jsonl")) == EVERY
    assert texts(tmp_path / "test.jsonl", "held_out") is None


@pytest.mark.parametrize(
    "name", ["held_out", "heldout", "validation", "valid", "val", "dev", "test", "gsm8k_test"]
)
def test_a_folder_has_its_splits_in_files_named_after_them(tmp_path, name):
    write(tmp_path / "train.jsonl")
    write(tmp_path / f"{name}.jsonl", json.dumps({"text": "held out"}))
    assert texts(tmp_path) == EVERY
    assert texts(tmp_path, "held_out") == ["held out"]


def test_a_validation_split_is_preferred_to_a_test_split(tmp_path):
    for name in ("test", "train", "validation"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    assert texts(tmp_path, "held_out") == ["validation"]


def test_the_only_file_of_a_folder_is_the_training_split(tmp_path):
    write(tmp_path / "alpaca.jsonl")
    write(tmp_path / "README.md", "about the data")
    assert texts(tmp_path) == EVERY
    assert texts(tmp_path, "held_out") is None


def test_a_file_that_changed_is_read_again(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert texts(path) == EVERY
    write(path, json.dumps({"text": "new"}))
    os.utime(path, (1, 1))
    assert texts(path) == ["new"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "{path} is empty."),
        ("broken.jsonl", '{"text": "a"}\n' * 16 + '{"text": \n', "{path}, line 17, is not JSON: "),
        ("list.jsonl", '{"text": "a"}\n[1, 2]\n', "{path}, line 2, is JSON, but no object"),
        ("rows.xlsx", "?", "{path} is no .jsonl, .json, .parquet, .csv, .txt file."),
        ("rows.parquet", "no parquet at all", "{path} cannot be read: Parquet magic bytes"),
        ("rows.csv", "a,b\n1,2\n1,2,3,4\n", "{path}, line 3, has 4 cells, the first line 2."),
        (
            "blank.jsonl",
            "\n\n",
            "{path} has no rows.",
        ),
        ("latin.txt", "caf\xe9", "{path} cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load_rows(str(path), "train")
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "../rows", "./rows", "/nowhere/rows"])
def test_a_missing_path_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{name} does not exist\.$"):
        load_rows(name, "train")


def test_a_hub_name_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^nobody/nothing is neither a file or folder here nor a"):
        load_rows("nobody/nothing", "train")


def test_an_unknown_asset_is_named():
    with pytest.raises(UserError, match=r"^There is no asset:toy_instruction; the package has "):
        load_rows("asset:toy_instruction", "train")


def test_a_folder_without_data_is_named(tmp_path):
    write(tmp_path / "notes.md", "nothing")
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path), "train")
    assert str(caught.value) == f"{tmp_path} holds no .jsonl, .json, .parquet, .csv, .txt file."


def test_a_folder_whose_files_are_named_after_no_split_is_training_rows(tmp_path):
    write(tmp_path / "1M-GPT4.jsonl")
    write(tmp_path / "3M-GPT3.jsonl", json.dumps({"text": "more"}))
    assert texts(tmp_path) == [*EVERY, "more"]
    assert texts(tmp_path, "held_out") is None


def test_a_folder_with_another_split_and_no_training_split_lists_its_files(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "test.jsonl")
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path), "train")
    assert str(caught.value) == (
        f"{tmp_path} has no file named after the split train; it has a.jsonl, test.jsonl. "
        "Name the training rows train.jsonl, say, or give the path of their file."
    )


def test_numbered_files_of_a_split_follow_one_another(tmp_path):
    for number in range(3):
        row = json.dumps({"text": f"part {number}"})
        write(tmp_path / f"train-0000{number}-of-00003.jsonl", row)
    write(tmp_path / "validation-00000-of-00001.jsonl", json.dumps({"text": "held out"}))
    assert texts(tmp_path) == ["part 0", "part 1", "part 2"]
    assert texts(tmp_path, "held_out") == ["held out"]
    places = [(row.place, row.number) for row in find_rows(str(tmp_path), "train").pick()]
    assert places == [(f"{tmp_path}/train-0000{n}-of-00003.jsonl", 1) for n in range(3)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00001-a09b74b3ef9c3b56", "test-00000-of-00001-0a1804bcb6ae68c6"),
        ("gsm8k-train", "gsm8k-test"),
        ("Train", "Test"),
        ("gsm8kTrain", "gsm8kTest"),
        ("training", "testing"),
        ("data.train", "data.eval"),
        ("train_1", "held-out"),
    ],
)
def test_splits_are_told_by_the_names_in_use(tmp_path, train, test):
    write(tmp_path / f"{train}.jsonl", json.dumps({"text": "train"}))
    write(tmp_path / f"{test}.jsonl", json.dumps({"text": "test"}))
    write(tmp_path / "other.jsonl", json.dumps({"text": "neither"}))
    write(tmp_path / "._train.jsonl", "of another system")
    assert texts(tmp_path) == ["train"]
    assert texts(tmp_path, "held_out") == texts(tmp_path, "test") == ["test"]


@pytest.mark.parametrize(
    ("name", "numbers"), [("train_{}", range(1, 12)), ("Train{}", (3, 20)), ("x-train.{}", (0, 1))]
)
def test_parts_are_in_the_order_of_their_numbers(tmp_path, name, numbers):
    for number in numbers:
        write(tmp_path / f"{name.format(number)}.jsonl", json.dumps({"text": number}))
    assert texts(tmp_path) == [*numbers]


SEVERAL = "has several files of the split train, not numbered as its parts: "
KEEP = ". Keep one, or name them train-00000-of-00002 and so on."
NONE = "has no file named after the split train; it has "
NAME = ". Name the training rows train.jsonl, say, or give the path of their file."


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["code_train.jsonl", "math_train.jsonl"], f"{SEVERAL}{{}}{KEEP}"),
        (["train.jsonl", "train.parquet"], f"{SEVERAL}{{}}{KEEP}"),
        (["train.jsonl", "train.jsonl.gz"], f"{SEVERAL}{{}}{KEEP}"),
        (["train-00000-of-00001.jsonl", "train.jsonl"], f"{SEVERAL}{{}}{KEEP}"),
        (["train-0-of-2.jsonl", "train-0-of-2-a09b74b3ef9c3b56.jsonl"], f"{SEVERAL}{{}}{KEEP}"),
        (["train_1.jsonl", "training_2.jsonl"], f"{SEVERAL}{{}}{KEEP}"),
        (
            ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
            "lacks some of the 3 parts of the split train; it has {}.",
        ),
        (
            [f"train-{number}-of-9.jsonl" for number in range(8)],
            "lacks some of the 9 parts of the split train; it has train-0-of-9.jsonl, train-1-of-9."
            "jsonl, train-2-of-9.jsonl, train-3-of-9.jsonl, train-4-of-9.jsonl, train-5-of-9.jsonl "
            "and 2 more.",
        ),
        (["dev-v2.0.json", "train-v2.0.json"], f"{NONE}{{}}{NAME}"),
        (["test_data.csv", "train_data.csv"], f"{NONE}{{}}{NAME}"),
    ],
)
def test_files_that_may_not_be_the_whole_split_are_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path), "train")
    assert str(caught.value) == f"{tmp_path} {message.format(', '.join(sorted(names)))}"


def test_a_compressed_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "train.jsonl.gz"):
        write(tmp_path / "train.jsonl.gz")
        with pytest.raises(UserError) as caught:
            load_rows(str(path), "train")
        assert str(caught.value) == f"{tmp_path}/train.jsonl.gz is compressed; unpack it first."


def test_the_test_split_comes_first_where_a_test_is_asked_for(tmp_path):
    for name in ("test", "train", "validation"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    assert texts(tmp_path, "test") == ["test"]
    (tmp_path / "test.jsonl").unlink()
    assert texts(tmp_path, "test") == ["validation"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chosen_rows_come_in_one_sweep(tmp_path, kind):
    import datasets

    for part in range(2):
        rows = [{"text": f"{part}/{n}"} for n in range(2500)]
        path = tmp_path / f"train-0000{part}-of-00002.{kind}"
        table = datasets.Dataset.from_list(rows)
        table.to_json(path) if kind == "jsonl" else table.to_parquet(path, batch_size=300)
    rows = find_rows(str(tmp_path), "train")
    assert rows.count() == 5000
    chosen = np.array([0, 1, 999, 1000, 2499, 2500, 4999])
    found = list(rows.pick(chosen))
    assert [row.values["text"] for row in found] == [
        "0/0", "0/1", "0/999", "0/1000", "0/2499", "1/0", "1/2499"
    ]  # fmt: skip
    assert [row.number for row in found] == [1, 2, 1000, 1001, 2500, 1, 2500]


def test_text_that_is_not_utf8_is_named_by_its_row(tmp_path):
    path = tmp_path / "rows.parquet"
    values = [b"a"] * 1200
    values[1100] = b"caf\xe9"
    parquet.write_table(pa.table({"text": pa.array(values, pa.binary()).view(pa.string())}), path)
    with pytest.raises(UserError) as caught:
        list(find_rows(str(path), "train").pick())
    assert str(caught.value) == f"{path}, row 1101, is not UTF-8 text."


@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.large_string(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.list_(pa.string_view()),
        pa.struct({"a": pa.string_view()}),
    ],
    ids=str,
)
def test_chosen_rows_may_be_texts_of_any_kind(tmp_path, kind):
    texts = [f"a text of some length, {number}" for number in range(5)]
    if pa.types.is_nested(kind):
        texts = [[text] if pa.types.is_list(kind) else {"a": text} for text in texts]
    parquet.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / "rows.parquet")
    rows = find_rows(str(tmp_path / "rows.parquet"), "train")
    assert [row.values["text"] for row in rows.pick()] == texts
    chosen = rows.pick(np.array([1, 2, 4]))
    assert [row.values["text"] for row in chosen] == [texts[1], texts[2], texts[4]]
    assert list(rows.pick(np.array([], dtype=int))) == []


def test_a_missing_column_is_named_beside_those_there_are():
    check_columns(["question", "answer"], ["answer"], "data")
    with pytest.raises(UserError) as caught:
        check_columns(["instruction", "output"], ["question", "answer"], "data")
    assert (
        str(caught.value) == "data has no column 'question'; its columns are instruction, output."
    )
