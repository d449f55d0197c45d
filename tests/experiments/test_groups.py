import pytest
from made_runs import make_run, make_study, write_run, write_sweep

from rslightning.errors import UserError
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
