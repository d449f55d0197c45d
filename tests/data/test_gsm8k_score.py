"""The score of a GSM8K answer, against cases worked out by hand and the authors' own references."""

import json
import random
import re
from decimal import Decimal
from typing import Final

import pytest

from rslightning.data import GSM8K
from rslightning.data.gsm8k import final_number


@pytest.fixture(scope="module")
def gsm8k_data(gsm8k_folder, model_folder):
    return GSM8K(str(gsm8k_folder), str(model_folder))


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("48 / 2 = 24\n#### 72", "72"),
        ("#### 72.", "72"),
        ("#### 72.0", "72"),
        ("####72", "72"),
        ("####  -5", "-5"),
        ("#### $1,234.50.", "1234.5"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### $ 10 000", "10"),
        ("#### 18 2 apples", "18"),
        ("#### 3 1/2", "3"),
        ("#### 20 30", "20"),
        ("#### 5$ 6", "5"),
        ("#### 5$6", "5"),
        ("#### - 5", None),
        ("#### .5", "0.5"),
        ("#### 72 apples", "72"),
        ("#### 72\nQuestion: How many are 99?", "72"),
        ("#### 5\nNo, that is wrong.\n#### 6", "6"),
        ("#### 007", "7"),
        ("72", None),
        ("The answer is ### 72", None),
        ("####", None),
        ("#### seventy-two", None),
        ("#### 72\n####", None),  # the last mark counts, and has no number
        ("####\n72", None),  # nor has this one, on its line
        ("", None),
    ],
)
def test_the_final_number(answer, number):
    assert final_number(answer) == (None if number is None else Decimal(number))


AUTHORS: Final = re.compile(r"#### (\-?[0-9\.\,]+)")
"""Of `grade_school_math/dataset.py` in openai/grade-school-math, which takes the commas out."""


def test_where_the_form_is_the_authors_the_number_is_too():
    """After one mark and one space: whatever follows the number, it is read as they read it."""
    draw, read = random.Random(0), 0
    for _ in range(5000):
        rest = "".join(draw.choices(["1", "20", "7", ",", ".", "-", "$", " ", "/", "x", "%"], k=6))
        match = AUTHORS.search(f"#### {rest}")
        theirs = match[1].replace(",", "") if match else ""
        if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", theirs):  # else it is no number, or `18.`
            assert final_number(f"#### {rest}") == Decimal(theirs), rest
            read += 1
    assert read > 1000


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("36 + 36 = 72\n#### 72", True),
        ("#### 72.0", True),
        ("#### $72", True),
        ("I guess. #### 72", True),
        ("36 + 36 = 72", False),
        ("#### 7", False),
        ("#### 720", False),
        ("#### -72", False),
        ("#### 72.5", False),
    ],
)
def test_an_answer_is_right_when_its_number_is_the_reference_s(gsm8k_data, answer, right):
    assert gsm8k_data.score_answer(answer, "She sold 48 + 24 = 72.\n#### 72") is right


def test_no_number_never_agrees_with_no_number(gsm8k_data):
    assert gsm8k_data.score_answer("nothing", "nothing") is False


def test_thousands_are_read_in_references_too(gsm8k_data):
    assert gsm8k_data.score_answer("#### 2520000", "#### 2,520,000")
    assert not gsm8k_data.score_answer("#### 2520", "#### 2,520,000")


def test_real_references_are_right_and_read_as_the_authors_read_them(gsm8k, gsm8k_data):
    rows = [json.loads(line) for line in (gsm8k / "test.jsonl").read_text().splitlines()]
    references = [row["answer"] for row in rows]
    assert len(references) == 1319
    for reference in references:
        theirs = AUTHORS.search(reference)[1].replace(",", "")
        assert final_number(reference) == Decimal(theirs)
        assert gsm8k_data.score_answer(reference, reference)
    agreeing = sum(map(gsm8k_data.score_answer, references[1:], references[:-1]))
    assert agreeing < 60  # neighbours seldom have the same number: the score tells them apart
