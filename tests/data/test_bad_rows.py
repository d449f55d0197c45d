import json

import pytest

from rslightning.data import GSM8K, OpenOrca
from rslightning.errors import UserError

GOOD = [{"question": f"How many is {n}?", "answer": f"It is {n}."} for n in range(6)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k(path, model_folder, **options):
    data = GSM8K(str(path), str(model_folder), held_out_examples=0, packing=False, **options)
    data.setup("fit")
    return data


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"question": None, "answer": "4"}, "column 'question' is None, not a text"),
        ({"question": "Q", "answer": None}, "column 'answer' is None, not a text"),
        ({"question": "", "answer": "4"}, "column 'question' is empty"),
        ({"question": "Q", "answer": "  "}, "column 'answer' is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_or_counted(tmp_path, model_folder, bad, reason):
    path = write(tmp_path / "rows.jsonl", [*GOOD[:4], bad, *GOOD[4:]])
    with pytest.raises(UserError) as caught:
        gsm8k(path, model_folder)
    assert str(caught.value) == (
        f"{path}, row 5: {reason}; mend it, or count such rows with data.on_bad_row: skip."
    )
    data = gsm8k(path, model_folder, on_bad_row="skip")
    assert (data.counts["training"].rows, data.counts["training"].rows_skipped) == (6, 1)
    assert len(data.train) == 6


def test_a_value_of_another_type_is_named(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", [{"question": "Q", "answer": 4}] * 3)
    with pytest.raises(UserError, match=r"row \d: column 'answer' is 4, not a text; mend it"):
        gsm8k(path, model_folder)


@pytest.mark.parametrize("held_out_examples", [0, 1])
def test_a_fit_without_any_good_row_is_refused(tmp_path, model_folder, held_out_examples):
    path = write(tmp_path / "rows.jsonl", [{"question": "Q", "answer": n} for n in range(4)])
    options = {"held_out_examples": held_out_examples, "on_bad_row": "skip"}
    for _ in range(2):
        data = GSM8K(str(path), str(model_folder), **options)
        with pytest.raises(UserError) as caught:
            data.setup("fit")
    skipped = held_out_examples or 4  # what is held out is read first
    assert str(caught.value) == (
        f"No row can be used: {skipped} bad rows were skipped, the first of them "
        f"{path}, row 1: column 'answer' is 0, not a text."
    )


def test_a_system_prompt_may_be_null(tmp_path, model_folder):
    rows = [{"system_prompt": None, "question": "Q", "response": "R"}] * 2
    path = write(tmp_path / "rows.jsonl", rows)
    data = OpenOrca(str(path), str(model_folder), held_out_examples=1)
    data.setup("fit")
    assert data.held_out_rows == [("### Question:\nQ\n\n### Answer:\n", "R")]


def test_a_huge_row_is_cut_and_counted(tmp_path, model_folder):
    huge = {"question": "Q", "answer": "many words " * 100_000}
    path = write(tmp_path / "rows.jsonl", [*GOOD, huge])
    counts = gsm8k(path, model_folder, max_length=64).counts["training"]
    assert (counts.rows, counts.rows_cut) == (7, 1)
    assert counts.longest_row > 100_000
    assert counts.tokens_lost == counts.longest_row - 64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "a", "answer": \n', "{path}, line 17, is not JSON: "),
        (b'["question", "answer"]\n', "{path}, line 17, is JSON, but no object of columns."),
    ],
)
def test_a_broken_line_is_named(tmp_path, model_folder, line, message):
    path = tmp_path / "rows.jsonl"
    good = "".join(json.dumps(GOOD[n % 6]) + "\n" for n in range(16)).encode()
    path.write_bytes(good + line + good)
    with pytest.raises(UserError) as caught:
        gsm8k(path, model_folder)
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path, model_folder):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"question": "caf\xe9", "answer": "4"}\n'.encode("latin-1") * 3)
    with pytest.raises(UserError) as caught:
        gsm8k(path, model_folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named(tmp_path, model_folder):
    path = write(tmp_path / "rows.jsonl", [{"question": "Q", "reply": "R"}] * 3)
    with pytest.raises(UserError) as caught:
        gsm8k(path, model_folder)
    assert str(caught.value) == (f"{path} has no column 'answer'; its columns are question, reply.")
