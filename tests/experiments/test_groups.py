import itertools

import pytest
from made_runs import falling, make_run, make_study, write_run, write_sweep

from rslightning.errors import UserError
from rslightning.experiments.claims import decide
from rslightning.experiments.groups import Cell, find_studies


def names(study):
    return [run.name for run in study.runs]


def test_a_sweep_is_found_at_any_depth_with_what_its_file_says(tmp_path):
    sweep = write_sweep(
        tmp_path / "deep" / "figure2",
        title="Figure 2",
        figures={"figure2": "perplexity"},
        claims=["rank_gains"],
        cells={"a": {}, "b": {}, "c": {}},
    )
    write_run(sweep / "a", seed=1)
    write_run(sweep / "b", seed=0)
    (study,) = find_studies([str(tmp_path)])
    assert (study.name, study.title) == ("figure2", "Figure 2")
    assert (study.figures, study.claims) == ({"figure2": "perplexity"}, ("rank_gains",))
    assert (names(study), study.absent) == (["b", "a"], ("c",))


def test_runs_outside_of_sweeps_are_one_study_without_claims(tmp_path):
    write_run(tmp_path / "mine" / "version_0", state=None)
    write_run(tmp_path / "mine" / "version_1", state=None)
    write_run(write_sweep(tmp_path / "mine" / "swept") / "cell")
    swept, loose = find_studies([str(tmp_path / "mine")])
    assert (swept.name, names(swept)) == ("swept", ["cell"])
    assert (loose.name, names(loose), loose.claims) == ("mine", ["version_0", "version_1"], ())
    assert set(loose.figures.values()) == {"perplexity", "gradient_norms", "moments"}


def test_a_run_folder_itself_is_a_study(tmp_path):
    write_run(tmp_path / "run", state=None)
    (study,) = find_studies([str(tmp_path / "run")])
    assert names(study) == ["run"]


def test_a_cell_that_has_not_logged_yet_is_not_left_out(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    write_run(sweep / "done")
    (sweep / "starting").mkdir()
    (sweep / "starting" / "config.yaml").write_text((sweep / "done" / "config.yaml").read_text())
    (study,) = find_studies([str(sweep)])
    assert [(run.name, run.state) for run in study.runs] == [
        ("done", "finished"),
        ("starting", "unfinished"),
    ]


def test_losses_of_different_settings_are_not_compared(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    write_run(sweep / "short", steps=24)
    write_run(sweep / "long", steps=48)
    write_run(sweep / "full", "full", steps=24)
    studies = find_studies([str(sweep)])
    assert [(study.name, names(study)) for study in studies] == [
        ("sweep-1", ["short", "full"]),  # full fine-tuning has no targets, and joins the others
        ("sweep-2", ["long"]),
    ]


def write_grid(sweep, key, values):
    """Write LoRA and rsLoRA at two ranks for each value: rsLoRA gains at the last one alone."""
    for value in values:
        for scaling, rank in itertools.product(("lora", "rslora"), (4, 64)):
            end = 2.0 if scaling == "lora" or rank == 4 else 1.5 if value == values[-1] else 2.5
            name = f"{scaling}{rank}_{values.index(value)}"
            keys = {key: value}
            write_run(sweep / name, scaling, rank, losses=falling(end), held_out=end, keys=keys)


STEP = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}}


@pytest.mark.parametrize(
    ("key", "values", "shown"),
    [
        ("model.adapter.dropout", (0.0, 0.5), ("0.0", "0.5")),
        ("model.optimizer.init_args.weight_decay", (0, "1e-1"), ("0", "1e-1")),
        ("data.init_args.path", ("/a/b/x.jsonl", "/a/b/y.jsonl"), ("x.jsonl", "y.jsonl")),
        ("data.init_args.path", ("/v1/x.jsonl", "/v2/x.jsonl"), ("v1/x.jsonl", "v2/x.jsonl")),
        ("model.base_model", ("/one/tiny", "/two/tiny"), ("one/tiny", "two/tiny")),
        ("data.init_args.num_examples", (60, None), ("60", "none")),
        ("trainer.max_epochs", (1, 2), ("1", "2")),
        ("model.lr_scheduler", (STEP, None), ("StepLR step_size 3", "none")),
    ],
)
def test_runs_along_any_axis_are_groups_of_their_own(tmp_path, key, values, shown):
    """Each with the verdict that its own runs make, of one seed."""
    sweep = write_sweep(tmp_path / "sweep", title="Rank", claims=["rank_gains"])
    write_grid(sweep, key, values)
    words = [f"{key.rpartition('.')[2]} {value}" for value in shown]
    studies = find_studies([str(sweep)])
    assert [study.title for study in studies] == [f"Rank: {word}" for word in words]
    assert [study.setting.others for study in studies] == words
    assert str(studies[0].setting).endswith(f", 24 steps, {words[0]}")
    assert [len(study.runs) for study in studies] == [4, 4]
    found = [decide("rank_gains", study) for study in studies]
    assert [verdict.verdict for verdict in found] == ["not reproduced", "reproduced"]
    assert all("(one seed)" in verdict.numbers for verdict in found)


def test_what_no_loss_depends_on_tells_no_runs_apart(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    write_run(
        sweep / "a", keys={"trainer.logger": {"save_dir": "x"}, "data.init_args.num_workers": 1}
    )
    write_run(sweep / "b", rank=8, keys={"trainer.logger": None, "data.init_args.num_workers": 4})
    write_run(
        sweep / "c", rank=16, keys={"model.start_from": None}
    )  # of a version that has the key
    write_run(sweep / "d", "full", keys={"data.init_args.seed": 3})
    write_run(sweep / "e", rank=4, allocation={"target_rank": 2, "warmup_steps": 5})
    write_run(sweep / "f", rank=24, allocation={"target_rank": 16, "warmup_steps": 5})
    assert len(find_studies([str(sweep)])) == 1


def test_full_fine_tuning_is_beside_the_runs_without_dropout(tmp_path):
    sweep = write_sweep(tmp_path / "sweep")
    for dropout in (0.0, 0.5):
        write_run(sweep / f"dropout{dropout}", keys={"model.adapter.dropout": dropout})
    write_run(sweep / "full", "full")
    assert [names(study) for study in find_studies([str(sweep)])] == [
        ["dropout0.0", "full"],
        ["dropout0.5"],
    ]


def test_two_sweeps_of_one_name_have_folders_of_their_own(tmp_path):
    for where in ("a", "b"):
        write_run(write_sweep(tmp_path / where / "sweep") / "cell")
    assert [study.name for study in find_studies([str(tmp_path)])] == ["sweep", "sweep-2"]


def test_cells_are_sorted_by_method_rank_and_rate():
    study = make_study(
        [
            make_run("full", 0, 1e-4),
            make_run("rslora", 64, 1e-3),
            make_run("rslora", 4, 1e-3),
            make_run("rslora", 4, 1e-4, seed=0),
            make_run("rslora", 4, 1e-4, seed=1),
            make_run("lora", 512, 1e-3),
        ]
    )
    assert list(study.cells) == [
        Cell("lora", 512, 1e-3),
        Cell("rslora", 4, 1e-4),
        Cell("rslora", 4, 1e-3),
        Cell("rslora", 64, 1e-3),
        Cell("full", None, 1e-4),
    ]
    assert [run.seed for run in study.cells[Cell("rslora", 4, 1e-4)]] == [0, 1]


def test_several_alphas_of_a_method_are_told_apart():
    runs = [make_run("lora", seed=0), make_run("lora", seed=1)]
    runs[1].config["model"]["adapter"]["alpha"] = 32.0
    assert [cell.method for cell in make_study(runs).cells] == ["lora, alpha 16", "lora, alpha 32"]


def test_runs_of_one_cell_and_seed_are_no_seeds_and_none_is_dropped(tmp_path):
    """Each is a cell of its own, that no verdict takes for its method."""
    sweep = write_sweep(tmp_path / "sweep")
    for name, scaling, rank, end in (
        ("a", "lora", 4, 2.1), ("b", "lora", 4, 1.9), ("c", "lora", 64, 2.0),
        ("d", "rslora", 4, 2.0), ("e", "rslora", 64, 1.5),
    ):  # fmt: skip
        write_run(sweep / name, scaling, rank, losses=falling(end))
    (study,) = find_studies([str(sweep)])
    assert [(cell.method, cell.rank, names) for cell, names in named(study)] == [
        ("lora", 64, ["c"]),
        ("lora, a", 4, ["a"]),
        ("lora, b", 4, ["b"]),
        ("rslora", 4, ["d"]),
        ("rslora", 64, ["e"]),
    ]
    assert study.repeated == ["a", "b"]
    assert decide("rank_gains", study).verdict == "not shown"
    write_run(sweep / "b", "lora", 4, state="failed", message="No space left.")  # a ran it again
    (study,) = find_studies([str(sweep)])
    assert (len(study.cells), study.repeated) == (4, [])
    assert decide("rank_gains", study).verdict == "reproduced"


def named(study):
    return [(cell, [run.name for run in runs]) for cell, runs in study.cells.items()]


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*missing"):
        find_studies([str(tmp_path / "missing")])
    with pytest.raises(UserError, match="There is no run in"):
        find_studies([str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"figures": ["perplexity"]}, "figures must be a mapping"),
        ({"rate": "fast"}, "rate must be a number, got 'fast'"),
    ],
)
def test_a_sweep_file_with_other_content_is_refused(tmp_path, content, sentence):
    write_run(write_sweep(tmp_path / "sweep", **content) / "cell")
    with pytest.raises(UserError, match=sentence):
        find_studies([str(tmp_path)])


def test_a_sweep_that_has_not_started_is_not_left_out(tmp_path):
    write_sweep(tmp_path / "sweep", cells={"a": {}, "b": {}}, rate="5e-5")
    (study,) = find_studies([str(tmp_path)])
    assert (study.runs, study.absent, study.rate) == ((), ("a", "b"), 5e-5)
