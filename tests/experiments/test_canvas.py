import csv

import pytest
from made_runs import make_run, make_study

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.figure import Figure

from rslightning.experiments.canvas import Drawing, describe, drawing_settings, plain, save


def make_drawing():
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.add_subplot().plot([1, 2], [3, 4], label="line")
    rows = [("lora", None, 0.1234567891234), ("a, b", 4, float("inf"))]
    return Drawing(figure, ("method", "rank", "loss"), rows, "A caption.")


def test_a_drawing_is_the_same_bytes_each_time(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        with drawing_settings():
            save(make_drawing(), tmp_path / folder, "figure")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["figure.csv", "figure.png", "figure.svg"]
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert b"Matplotlib v" not in content


def test_numbers_are_written_to_nine_digits(tmp_path):
    with drawing_settings():
        save(make_drawing(), tmp_path, "figure")
    rows = list(csv.reader((tmp_path / "figure.csv").read_text().splitlines()))
    assert rows == [
        ["method", "rank", "loss"],
        ["lora", "", "0.123456789"],
        ["a, b", "4", "inf"],
    ]


def test_the_users_settings_are_left_alone():
    with matplotlib.rc_context({"font.size": 31.0}):
        with drawing_settings():
            assert matplotlib.rcParams["font.size"] < 20
        assert matplotlib.rcParams["font.size"] == 31.0


def test_a_study_is_described_by_its_setting():
    study = make_study([make_run(seed=3), make_run(rate=1e-2, seed=1)])
    assert describe(study) == (
        "tiny on GSM8K: AdamW, 8 x 256 tokens, 24 steps; learning rates 1e-3 to 1e-2; seeds 1, 3"
    )
    assert "learning rate 1e-3;" in describe(study, list(study.cells)[:1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-7, "1e-07"),
        (0.0005, "0.0005"),
        (0.1, "0.1"),
        (20, "20"),
        (2e5, "200,000"),
        (1e9, "1e+09"),
    ],
)
def test_ticks_are_written_in_full_where_they_are_short(value, text):
    assert plain(value) == text
