import math

import numpy as np
import pytest
from made_runs import falling, make_run, make_study

pytest.importorskip("matplotlib")

from rslightning.experiments.canvas import drawing_settings
from rslightning.experiments.curves import (
    draw_gradient_norms,
    draw_moments,
    draw_perplexity,
    read_lines,
    running_mean,
    shown_cells,
    window,
)


@pytest.fixture(autouse=True)
def settings():
    with drawing_settings():
        yield


def test_perplexity_is_the_mean_over_the_seeds_with_its_numbers():
    runs = [
        make_run("lora", 8, seed=seed, curves={"train/perplexity": values})
        for seed, values in enumerate([[50.0, 20.0, 8.0], [54.0, 10.0, 6.0]])
    ]
    drawing = draw_perplexity(make_study(runs))
    assert drawing.header[-3:] == ("step", "perplexity", "running_mean")
    assert drawing.rows == [
        ("lora", 8, 1e-3, 2, 0, 52.0, 52.0),
        ("lora", 8, 1e-3, 2, 1, 15.0, 15.0),
        ("lora", 8, 1e-3, 2, 2, 7.0, 7.0),
    ]
    (line,) = drawing.figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 52], [1, 15], [2, 7]])
    assert drawing.caption == "Perplexity of the training batches, mean over 2 seeds."


def test_a_long_curve_has_a_running_mean_and_the_caption_says_so():
    values = np.random.default_rng(0).normal(size=100)
    assert window(100) == 5
    smooth = running_mean(values)
    assert smooth[50] == pytest.approx(values[48:53].mean())
    assert smooth[0] == pytest.approx(values[:3].mean())
    assert smooth[-1] == pytest.approx(values[-3:].mean())
    drawing = draw_perplexity(make_study([make_run(curves={"train/perplexity": values + 9})]))
    assert "as a running mean over 5 points" in drawing.caption


def test_what_diverges_leaves_the_figure_and_its_end_is_marked():
    runs = [
        make_run("lora", 4, curves={"train/perplexity": [50.0, 20.0, 10.0]}),
        make_run(
            "rslora",
            4,
            losses=[4.0, 3.0, math.nan],
            curves={"train/perplexity": [50.0, 1e30, math.nan]},
            state="failed",
        ),
    ]
    drawing = draw_perplexity(make_study(runs))
    axes = drawing.figure.axes[0]
    assert axes.get_ylim()[1] == pytest.approx(100.0)
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    np.testing.assert_allclose(cross.get_xydata(), [[1, 100.0]])
    assert any("(broke)" in line.get_label() for line in axes.lines)
    assert [row[5] for row in drawing.rows if row[0] == "rslora"][1] == 1e30


def test_gradient_norms_have_the_range_over_the_ranks():
    norms = {4: [4.0, 2.0], 16: [1.0, 3.0]}
    runs = [make_run("lora", rank, curves={"grad_norm/mean": v}) for rank, v in norms.items()]
    drawing = draw_gradient_norms(make_study(runs))
    (band,) = drawing.figure.axes[0].collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners >= {(0.0, 1.0), (0.0, 4.0), (1.0, 2.0), (1.0, 3.0)}
    assert drawing.figure.axes[0].get_yscale() == "log"
    assert [row[1:] for row in drawing.rows][:2] == [
        (4, 1e-3, 1, 0, 4.0, 4.0),
        (4, 1e-3, 1, 1, 2.0, 2.0),
    ]


def test_moments_have_a_panel_each():
    tags = ("activation/first_moment", "adapter_output/second_moment")
    curves = {tag: [float(number), number + 0.5] for number, tag in enumerate(tags)}
    drawing = draw_moments(make_study([make_run(curves=curves)]))
    assert len(drawing.figure.axes) == 4
    assert [(row[0], row[5], row[6]) for row in drawing.rows] == [
        (tags[0], 0, 0.0),
        (tags[0], 1, 0.5),
        (tags[1], 0, 1.0),
        (tags[1], 1, 1.5),
    ]


def test_of_ranks_times_rates_the_untuned_rate_is_drawn():
    runs = [
        make_run(scaling, rank, rate, losses=falling(2.0 - (rate == 1e-3)))
        for scaling in ("lora", "rslora")
        for rank in (4, 16)
        for rate in (1e-4, 1e-3)
    ]
    study = make_study([*runs, make_run("lora", 4, 1e-2)])
    assert {cell.rate for cell in shown_cells(study)} == {1e-3}
    assert len(read_lines(study, "train/loss")) == 4
    one_rank = make_study([run for run in study.runs if run.rank == 4])
    assert len(shown_cells(one_rank)) == 5


def test_all_curves_are_of_the_same_seeds():
    runs = [make_run(rank=4, seed=seed, losses=[4.0 + seed, 3.0]) for seed in (0, 1)]
    lines = read_lines(make_study([*runs, make_run(rank=16, seed=0)]), "train/loss")
    assert [(line.seeds, line.values[0]) for line in lines] == [(1, 4.0), (1, 4.0)]


def test_unfinished_runs_are_drawn_only_where_no_other_is():
    going = make_run(seed=1, losses=[4.0, 9.0], state="unfinished")
    (line,) = read_lines(make_study([make_run(seed=0), going]), "train/loss")
    assert (line.seeds, len(line.steps)) == (1, 24)
    (alone,) = read_lines(make_study([going]), "train/loss")
    assert alone.values.tolist() == [4.0, 9.0]


def test_without_the_curves_there_is_no_figure():
    study = make_study([make_run()])
    assert [draw_perplexity(study), draw_gradient_norms(study), draw_moments(study)] == [None] * 3
