import math

import pytest
from made_runs import falling, make_run, make_study

pytest.importorskip("matplotlib")

from rslightning.experiments.bars import (
    best_points,
    budget,
    draw_best_rank,
    draw_budget,
    draw_held_out,
    draw_rates,
    points,
)
from rslightning.experiments.canvas import drawing_settings


@pytest.fixture(autouse=True)
def settings():
    with drawing_settings():
        yield


def grid():
    """Return LoRA and rsLoRA at two ranks, and full fine-tuning, over two rates and seeds."""
    losses = {
        ("lora", 4): (2.0, 1.8),
        ("lora", 16): (2.1, 1.9),
        ("rslora", 4): (1.7, 1.6),
        ("rslora", 16): (1.4, math.inf),
        ("full", 0): (1.3, 1.5),
    }
    return make_study(
        [
            make_run(scaling, rank, rate, seed, falling(end), held_out=end + 0.1 * seed)
            if math.isfinite(end)
            else make_run(scaling, rank, rate, seed, [4.0, math.inf])
            for (scaling, rank), ends in losses.items()
            for rate, end in zip((1e-4, 1e-3), ends, strict=True)
            for seed in (0, 1)
        ]
    )


def test_held_out_has_mean_and_error_of_every_cell():
    drawing = draw_held_out(grid())
    assert len(drawing.rows) == 10
    assert drawing.rows[0] == ("lora", 4, 1e-4, 2, 2.05, pytest.approx(0.05))
    (broken,) = [row for row in drawing.rows if row[4] == math.inf]
    assert broken[:4] == ("rslora", 16, 1e-3, 2)
    axes = drawing.figure.axes[0]
    assert axes.get_xlabel() == "held-out loss, nats per target token"
    assert "the loss was not finite" in [text.get_text().strip() for text in axes.texts]
    assert len(axes.containers) == 9  # error bars


def test_captions_say_at_which_step_a_held_out_loss_was_taken():
    study = make_study([make_run(rate=rate, held_out=2.0, held_out_at=19) for rate in (1e-4, 1e-3)])
    for draw in (draw_held_out, draw_rates, draw_best_rank):
        assert "held-out loss (step 20 of 24)" in draw(study).caption
    assert "Final held-out loss of each cell" in draw_held_out(grid()).caption


def test_rates_have_a_panel_for_each_method_and_a_curve_for_each_rank():
    drawing = draw_rates(grid())
    panels = drawing.figure.axes
    assert [axes.get_title() for axes in panels] == ["LoRA", "rsLoRA", "full fine-tuning"]
    assert [len(axes.containers) for axes in panels] == [2, 2, 1]
    line = panels[0].containers[0].lines[0]
    assert line.get_xdata().tolist() == [1e-4, 1e-3]
    assert line.get_ydata().tolist() == pytest.approx([2.05, 1.85])
    assert len(panels[1].containers[1].lines[0].get_xdata()) == 1  # the other rate broke
    assert [line.get_marker() for line in panels[1].lines].count("^") == 1


def test_best_rank_takes_the_best_rate_and_writes_it():
    drawing = draw_best_rank(grid())
    assert [row[:3] for row in drawing.rows] == [
        ("lora", 4, 1e-3),
        ("lora", 16, 1e-3),
        ("rslora", 4, 1e-3),
        ("rslora", 16, 1e-4),
        ("full", None, 1e-4),
    ]
    assert [row[4] for row in drawing.rows] == pytest.approx([1.85, 1.95, 1.65, 1.45, 1.35])
    axes = drawing.figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["1e-3", "1e-3", "1e-3", "1e-4"]
    band = axes.patches[0].get_bbox()
    assert (band.y0, band.y1) == pytest.approx((1.3, 1.4))


def test_all_panels_of_the_rates_show_their_lowest_loss():
    """They share an axis, and the last one may reach lower than the first."""
    ends = {"lora": 2.5, "rslora": 2.0, "quarter_root": 1.0}
    runs = [
        make_run(method, 4, rate, losses=falling(end))
        for method, end in ends.items()
        for rate in (1e-4, 1e-3)
    ]
    figure = draw_rates(make_study(runs)).figure
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low < 1.0 < 2.5 < high


def test_a_seed_that_broke_rules_a_rate_out():
    runs = [
        make_run(rate=1e-3, seed=0, losses=falling(1.0)),
        make_run(rate=1e-3, seed=1, losses=[4.0, math.nan]),
        make_run(rate=1e-4, seed=0, losses=falling(2.0)),
    ]
    (best,) = best_points(points(make_study(runs), "training"))
    assert best.cell.rate == 1e-4


def test_the_budget_is_what_is_kept():
    runs = [
        make_run("rslora", 12, losses=falling(1.5), allocation={"target_rank": 8}),
        make_run("rslora", 8, losses=falling(1.6)),
    ]
    for run, trained in zip(runs, (120_000, 80_000), strict=True):
        run.events.settings["model.trainable_parameters"] = float(trained)
    assert [budget(run) for run in runs] == [80_000, 80_000]
    drawing = draw_budget(make_study(runs))
    assert drawing.header[3] == "parameters"
    assert [row[:5] for row in drawing.rows] == [
        ("rslora", 8, 1e-3, 80_000, 1),
        ("adalora-rslora", 12, 1e-3, 80_000, 1),
    ]


def test_without_losses_there_is_no_figure():
    study = make_study([make_run(losses=[4.0], state="unfinished")])
    assert [draw(study) for draw in (draw_held_out, draw_rates, draw_best_rank)] == [None] * 3
    assert draw_budget(make_study([make_run()])) is None  # nobody wrote how many are trained
