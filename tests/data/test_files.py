"""What is read of a file is what the standard library reads of it."""

import csv
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from rslightning.data import JSONL, files
from rslightning.data.files import file_tables
from rslightning.data.rows import HubSplit, Rows, find_rows
from rslightning.errors import UserError

TEXT = 'line one\nthe "second" \\n \u00e9\U0001f600'
QUOTED = 'line one\nthe "second", \\n'
MIXED = [
    [{"prompt": "Q", "response": TEXT}, {"prompt": "Q", "response": 4}],
    [{"prompt": "Q", "response": TEXT}, {"prompt": "Q", "response": {"a": [TEXT]}}],
    [{"prompt": "Q", "response": f"2023-01-0{day}"} for day in range(1, 5)],
    [{"messages": [{"role": "user", "content": TEXT}, {"role": "x", "content": "y", "weight": 0}]}],
    [{"messages": [{"role": "u", "content": TEXT}]}, {"messages": [{"role": [TEXT]}]}],
    [{"text": "NaN"}, {"text": "null"}, {"text": ""}, {"text": None}, {"text": "007"}],
]


def write(path, rows, **options):
    lines = [json.dumps(row, **options) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def values(path, size=1000):
    return [row for table in file_tables(path, "line", size) for row in table]


@pytest.mark.parametrize("rows", MIXED)
@pytest.mark.parametrize("escaped", [True, False])
def test_json_values_are_those_of_the_file(tmp_path, rows, escaped):
    path = write(tmp_path / "rows.jsonl", rows, ensure_ascii=escaped)
    for size in (1, 2, 1000):
        assert values(path, size) == rows


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_has_the_rows_of_lines(tmp_path, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(MIXED[0], indent=indent))
    assert values(path) == MIXED[0]
    path.write_text(json.dumps(["a", "b"], indent=indent))
    assert values(path) == [{"text": "a"}, {"text": "b"}]


def test_objects_may_stand_over_many_lines(tmp_path):
    path = write(tmp_path / "rows.json", MIXED[0], indent=1)
    assert values(path) == MIXED[0]


def test_a_mark_at_the_beginning_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \n{"text": "b"}')
    assert values(path) == [{"text": "a"}, {"text": "b"}]


def test_a_column_that_a_row_lacks_is_null(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a": 1}, {"b": 2}, {"a": 3}])
    assert values(path) == [{"a": 1, "b": None}, {"a": None, "b": 2}, {"a": 3, "b": None}]


def test_rows_that_are_left_as_the_interpreter_ends_say_nothing(tmp_path, monkeypatch):
    """As a stream's are; by then a module holds None for each of its names."""
    rows = file_tables(write(tmp_path / "rows.jsonl", MIXED[0]), "line", 1)
    next(rows)
    monkeypatch.setattr(files, "pa", None)
    rows.close()
    assert list(rows) == []


TWICE = "an object has the key 'a' more than once"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', ", line 3, is not UTF-8 text."),
        (b'{"text": "\xff"}\n', ", line 1, is not UTF-8 text."),
        (b'{"text": "a"}\n{"text": "\\ud83d"}\n', ", line 2, is not UTF-8 text."),
        (b'["\\ud83d"]', " is not UTF-8 text."),
        (b'[{"text": "a"},\n{"text": }]', ", line 2, is not JSON: Expecting value"),
        (b'[{"text": "a"}, 4]', ", row 2, is JSON, but no object of columns."),
        (b'{"text": \n{"text": "a"}\n', ", line 1, is not JSON: Expecting value"),
        (b"4\n5\n", ", line 1, is JSON, but no object of columns."),
        (b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}', f", line 2, is not JSON: {TWICE}."),
        (b'{"a": 1, "b": {"a": 2, "a": 2}}\n', f", line 1, is not JSON: {TWICE}."),
        (b'[{"a": 1, "a": 3}]', f" cannot be read: {TWICE}."),
        (b'{"a": 1,\n"a": 3}', f" cannot be read: {TWICE}."),
        (b'{"a": ' + b"[" * 100_000, " cannot be read: "),
    ],
)
def test_what_is_no_row_is_named(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        values(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


CELLS = ["42", "007", "None", "NA", "null", "True", "nan", "", "1e5", "2023-01-01", " x ", "\u00e9"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_cells_are_texts(tmp_path, end):
    rows = [{"prompt": f"Q{n}", "response": cell} for n, cell in enumerate([*CELLS, QUOTED])]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "response"], lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
        file.write(end)
    for size in (1, 1000):
        assert values(tmp_path / "rows.csv", size) == rows


def test_cells_that_a_csv_line_lacks_are_null(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"a,b,,\n1\n1,{'x' * 200_000},,\n")
    assert values(path) == [{"a": "1", "b": None, "": None}, {"a": "1", "b": "x" * 200_000, "": ""}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n\n1,2,3,4\n", ", line 4, has 4 cells, the first line 2."),
        ("a,b\n1,2,3\n", ", line 2, has 3 cells, the first line 2."),
        ('a,b\n1,"2\n3,4\n', ", line 3, is not CSV: unexpected end of data."),
        ("a,b,a\n1,2,3\n", " has more than one column 'a'."),
    ],
)
def test_a_csv_line_that_does_not_fit_is_named(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        values(path)
    assert str(caught.value) == f"{path}{message}"


def test_parquet_columns_that_hold_json_are_decoded(tmp_path):
    encoded = pa.array([json.dumps(TEXT), "4", None], pa.json_())
    texts = pa.array(["4", None, None])
    columns = {
        "text": encoded,
        "list": pa.ListArray.from_arrays(pa.array([0, 3, None, 3]), encoded),
        "struct": pa.StructArray.from_arrays(
            [encoded, texts], ["a", "b"], mask=pa.array([False, False, True])
        ),
    }
    parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert [row.values for row in find_rows(str(tmp_path / "rows.parquet"), "train").pick()] == [
        {"text": TEXT, "list": [TEXT, 4, None], "struct": {"a": TEXT, "b": "4"}},
        {"text": 4, "list": [], "struct": {"a": 4, "b": None}},
        {"text": None, "list": None, "struct": None},
    ]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("number", [0, 3])
def test_rows_of_the_hub_are_those_of_its_file(tmp_path, monkeypatch, number, streaming):
    import datasets

    if not hasattr(datasets, "Json"):  # before 5
        pytest.skip("this version of datasets refuses columns of several types")
    path = write(tmp_path / "rows.jsonl", MIXED[number])
    rows = datasets.load_dataset("json", data_files=str(path), split="train", streaming=streaming)
    monkeypatch.setattr(Rows, "_hub_set", lambda self: rows)
    found = Rows(HubSplit("some/rows", None, "train"), streaming)
    assert [row.values for row in found.pick()] == MIXED[number]


@pytest.mark.parametrize("streaming", [True, False])
def test_one_value_of_another_type_leaves_the_other_rows_alone(tmp_path, model_folder, streaming):
    rows = [{"prompt": f"Q{n}: say\n", "response": 'line one\nthe "second"'} for n in range(5)]
    path = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "2+2=\n", "response": 4}])

    def blocks(**options):
        options |= {"held_out_examples": 0, "packing": False, "streaming": streaming}
        data = JSONL(str(path), str(model_folder), **options)
        data.setup("fit")
        return data, data.training_blocks()

    with pytest.raises(UserError, match=r"row 6: column 'response' is 4, not a text; mend it"):
        blocks()
    data, found = blocks(on_bad_row="skip")
    texts = [data.tokenizer.decode(block.input_ids) for block in found]
    assert sorted(texts) == [f"<s>{row['prompt']}{row['response']}</s>" for row in rows]
