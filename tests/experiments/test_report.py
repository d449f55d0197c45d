import subprocess
import sys

import pytest
from made_runs import falling, write_run, write_sweep

pytest.importorskip("matplotlib")

from rslightning.__main__ import main
from rslightning.errors import UserError
from rslightning.experiments.report import MARK, write_report
from rslightning.manifest import MANIFEST_FILE

MESSAGE = "Step 3 was not taken: the loss is inf in /some/where/x.py. The weights are in /a/b/c."


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Return a small sweep with a cell of each fate."""
    folder = write_sweep(
        tmp_path_factory.mktemp("runs") / "figure2",
        title="Perplexity by rank",
        figures={"figure2": "perplexity", "figure9": "moments"},
        claims=["rank_gains", "moments"],
        cells={"late": {}},
    )
    for scaling, ends in (("lora", (2.1, 2.1)), ("rslora", (2.0, 1.5))):
        for rank, end in zip((4, 64), ends, strict=True):
            cell = folder / f"{scaling}_rank{rank}"
            write_run(cell, scaling, rank, losses=falling(end), held_out=end + 0.1)
    broken = {"state": "failed", "message": MESSAGE}
    write_run(folder / "broken", "quarter_root", 64, losses=[4.0, 3.0, float("inf")], **broken)
    write_run(folder / "killed", "rslora", 8, losses=[4.0, 3.0], state=None)
    return folder


@pytest.fixture(scope="module")
def report(sweep, tmp_path_factory):
    return write_report([str(sweep)], tmp_path_factory.mktemp("reports") / "report")


def test_a_report_has_figures_verdicts_and_all_cells(sweep, report):
    text = (report / "report.md").read_text(encoding="utf-8")
    files = {path.relative_to(report).as_posix() for path in report.rglob("*") if path.is_file()}
    figures = {f"figure2/figure2.{kind}" for kind in ("png", "svg", "csv")}
    assert files == {"report.md", MANIFEST_FILE, *figures}
    assert "![figure2](figure2/figure2.png)" in text
    assert "*figure9* (moments): no run of this study wrote what it shows." in text
    assert "## Perplexity by rank" in text
    assert "tiny on GSM8K: AdamW, 8 x 256 tokens, 24 steps; learning rate 1e-3; seed 0." in text
    assert "| **reproduced** | Held-out loss" in text
    assert "- `rank_gains` is reproduced if rslora's loss falls" in text
    assert "| **not shown** | The runs for it are not there: it takes activation" in text
    assert (
        "failed after step 2: Step 3 was not taken: the loss is inf in x.py. It counts as" in text
    )
    assert "- `killed` unfinished after step 1." in text
    assert "- `late` not started." in text
    assert "\n2 cells have not ended or failed by accident; the verdicts rest on" in text
    assert (
        "| `rslora_rank64` | rsLoRA | 64 | 16 |  | 0.001 | 0 | 1.5000 | 1.6000 | finished |" in text
    )
    assert "| `broken` | $\\alpha/r^{1/4}$ | 64 |" in text
    assert "failed, unstable |" in text
    assert str(sweep.parent) not in text


def test_the_same_runs_give_the_same_bytes(sweep, report, tmp_path):
    again = write_report([str(sweep)], tmp_path / "again")
    for path in report.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(report)).read_bytes(), path.name


def test_runs_of_one_cell_and_seed_are_told(tmp_path):
    for name in ("version_0", "version_1"):
        write_run(tmp_path / "runs" / name)
    text = (write_report([str(tmp_path / "runs")], tmp_path / "report") / "report.md").read_text()
    assert "are those of another run in `version_0`, `version_1`: each is shown by itself" in text
    assert ", of one seed" in text
    assert "seeds" not in text.partition("*What the words mean.*")[0]


def test_a_report_is_replaced_and_nothing_else_is(sweep, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.md").write_text(f"{MARK}\nof last year")
    (tmp_path / "report" / "old.png").touch()
    folder = write_report([str(sweep / "lora_rank4")], tmp_path / "report")
    assert "of last year" not in (folder / "report.md").read_text()
    assert not (folder / "old.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("my notes")
    with pytest.raises(UserError, match="exists and no report wrote it"):
        write_report([str(sweep)], tmp_path / "mine")
    assert (tmp_path / "mine" / "report.md").read_text() == "my notes"


def test_a_report_that_fails_leaves_the_old_one(sweep, tmp_path, capsys):
    folder = write_report([str(sweep / "lora_rank4")], tmp_path / "report")
    before = (folder / "report.md").read_bytes()
    wrong = write_sweep(tmp_path / "wrong", claims=["rank_gain"])
    write_run(wrong / "cell")
    assert main(["report", str(wrong), "--output", str(folder)]) == 2
    assert "did you mean rank_gains?" in capsys.readouterr().err
    assert (folder / "report.md").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "wrong"]


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({"a": "perplexty"}, "no kind of figure 'perplexty'"),
        ({"a/b": "perplexity"}, "'a/b' is no file name"),
        ({"a": "moments"}, "There is nothing to draw in"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, figures, sentence):
    write_run(write_sweep(tmp_path / "sweep", figures=figures) / "cell")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_a_folder_without_runs_is_one_sentence(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report")]) == 2
    assert "There is no run in" in capsys.readouterr().err


def test_the_command_runs_without_torch(sweep, tmp_path):
    code = (
        "import sys; from rslightning.__main__ import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'lightning', 'transformers', 'tensorflow', 'matplotlib.pyplot'} "
        "& set(sys.modules), 'a heavy library was imported'; sys.exit(code)"
    )
    words = ["report", str(sweep / "lora_rank4"), "--output", str(tmp_path / "report")]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"The report is {tmp_path / 'report' / 'report.md'}" in run.stdout
