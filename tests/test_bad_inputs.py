"""Each bad input gets one sentence and an exit status, soon, and leaves nothing behind.

The tables of `docs/errors.md` are what these tests saw; with RSLIGHTNING_WRITE_DOCS=1 they write
them anew. With
RSLIGHTNING_TEST_PROCESSES=1 each command is a process of its own, as a user starts it: slower, and
its time is that of the whole command.
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from bad_inputs import GROUPS, Case

from rslightning.__main__ import main

DOCS = Path(__file__).parents[1] / "docs" / "errors.md"
WRITE_DOCS = "RSLIGHTNING_WRITE_DOCS" in os.environ
AS_PROCESSES = "RSLIGHTNING_TEST_PROCESSES" in os.environ
SECONDS = 10
COLUMNS = "| what is wrong | command | you are told | status |\n| --- | --- | --- | --- |"
CASES = {(group, case.wrong): case for group, cases in GROUPS.items() for case in cases}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, model_folder, orca_folder, make_llama):
    """Return a folder where all is right: see `bad_inputs`."""
    place = tmp_path_factory.mktemp("workshop")
    shutil.copytree(model_folder, place / "base")
    shutil.copytree(orca_folder, place / "data")
    make_llama(301, hidden_size=32).save_pretrained(place / "wide")
    shutil.copytree(model_folder, place / "small")
    make_llama(53).save_pretrained(place / "small")
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    logger = {"save_dir": "runs", "name": "tiny"}
    recipe = {
        "seed_everything": 1,
        "model": {
            "base_model": "base",
            "dtype": "float32",
            "adapter": {"rank": 3, "alpha": 5.0},
            "optimizer": optimizer,
        },
        "data": {
            "class_path": "rslightning.data.OpenOrca",
            "init_args": {"path": "data", "batch_size": 4, "max_length": 128},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 3,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": logger,
            },
        },
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run = ["fit", "--config", "tiny.yaml"]
        export = ["export", "--checkpoint", "run", "--base-model", "base", "--output"]
        assert main(run) == 0
        shutil.copytree("runs/tiny/version_0", "run", symlinks=True)
        assert main([*export, "adapter"]) == main([*export, "lora"]) == 0
    (place / "lora" / "manifest.json").unlink()
    return place


@pytest.fixture(scope="module")
def told():
    """Return a dictionary for what was told; it becomes the page where that is asked for."""
    rows: dict[tuple[str, str], str] = {}
    yield rows
    if WRITE_DOCS:
        page = DOCS.read_text(encoding="utf-8")
        for group in GROUPS:
            table = "\n".join([COLUMNS, *(row for (name, _), row in rows.items() if name == group)])
            page = re.sub(rf"(?<=\n## {group}\n\n)(\|.*\n)+", lambda _, t=table: f"{t}\n", page)
        DOCS.write_text(page, encoding="utf-8")


def content_of(folder: Path) -> dict[str, str]:
    """Return what is in a folder: for each path a digest, or that it is a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def run(case: Case) -> tuple[int, str]:
    """Return a command's exit status and all that it printed."""
    arguments = case.command.split()
    if AS_PROCESSES or case.environment:  # what a launcher started may end its process at once
        ended = subprocess.run(
            [sys.executable, "-m", "rslightning", *arguments],
            env={**os.environ, **case.environment},
            capture_output=True,
            text=True,
        )
        return ended.returncode, ended.stdout + ended.stderr
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    return status, printed.getvalue()


def as_row(case: Case, message: str, status: int) -> str:
    cells = (case.wrong, f"`{case.command}`", message, str(status))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


@pytest.mark.parametrize(("group", "wrong"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_what_is_told(group, wrong, workshop, told, tmp_path, monkeypatch):
    case = CASES[group, wrong]
    folder = tmp_path / "here"
    shutil.copytree(workshop, folder, symlinks=True)
    monkeypatch.chdir(folder)
    case.prepare()
    before = content_of(folder)
    start = time.monotonic()
    status, printed = run(case)
    seconds = time.monotonic() - start

    lines = printed.splitlines()
    ours = [line for line in lines if line.startswith("rslightning: ")]
    assert ours == lines[-1:], printed
    assert "Traceback" not in printed
    assert "unexpected" not in ours[0]
    assert (status, content_of(folder)) == (case.status, before)
    assert seconds < SECONDS
    message = ours[0].removeprefix("rslightning: ").replace(f"{folder}/", "")
    message = re.sub(r"[\d.]+ GiB are there", "20.00 GiB are there", message)  # on this machine
    assert str(tmp_path) not in message
    told[group, wrong] = as_row(case, message, status)
    if not WRITE_DOCS:
        assert told[group, wrong] in DOCS.read_text(encoding="utf-8").splitlines()


def test_the_page_has_these_cases_and_no_others():
    assert len(CASES) == sum(map(len, GROUPS.values())) >= 60
    page = re.split(r"\n## (.*)\n", DOCS.read_text(encoding="utf-8"))
    groups = dict(zip(page[1::2], page[2::2], strict=True))
    assert list(groups) == [*GROUPS, "Signals"]
    for group, cases in GROUPS.items():
        rows = re.findall(r"^\| (.*?) \| `", groups[group], re.MULTILINE)
        assert rows == [case.wrong for case in cases]
