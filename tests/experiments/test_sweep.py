"""Sweeps from the console: what they run, that they go on when killed, what they refuse."""

import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from rslightning.__main__ import main
from rslightning.errors import UserError
from rslightning.experiments.cells import Status, forget, has_gaps, read_status, write_status
from rslightning.experiments.event_files import read_events
from rslightning.experiments.grid import Cell, Sweep
from rslightning.experiments.sweep import check_cells, choose_slots, to_do, write_plan

CELLS = ["lora_rank2", "lora_rank8", "rslora_rank2", "rslora_rank8", "targets-nowhere"]
STEPS = 24
SWEEP = {
    "name": "tiny",
    "base": ["recipes/llama_gsm8k_paper.yaml"],
    "options": {
        "checkpoint": {"every_n_steps": 4},
        "data": {"init_args": {"batch_size": 2, "max_length": 64, "held_out_examples": 4}},
        "trainer": {"max_steps": STEPS, "val_check_interval": 6},
    },
    "grids": [
        {"scaling": ["lora", "rslora"], "rank": [2, 8]},
        {"targets": [["nowhere"]]},
    ],
    "figures": {"figure2": "perplexity", "figure3": "gradient_norms"},
    "claims": ["rank_gains"],
}


@pytest.fixture(scope="module")
def command(tmp_path_factory, model_folder, gsm8k_folder):
    """Return the function that starts the sweep into a folder."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "tiny.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    options = [f"--model.base_model={model_folder}", f"--data.path={gsm8k_folder}"]

    def start(output, *more):
        words = ["--config", str(root / "tiny.yaml"), "--output", str(root / output), *more]
        return [*words, *options], root / output

    return start


def popen(words):
    """Start a sweep as a new user would, in a process group of its own."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    return subprocess.Popen(
        [sys.executable, "-m", "rslightning", "sweep", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def undisturbed(command):
    words, folder = command("undisturbed")
    process = popen(words)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output, folder


def test_every_cell_runs_and_a_failed_one_is_told(undisturbed):
    status, output, folder = undisturbed
    assert [line for line in output.splitlines() if line.startswith("start ")] == [
        f"start  {name}" for name in CELLS
    ]
    states = {name: read_status(folder / name).state for name in CELLS}
    assert states == {**dict.fromkeys(CELLS[:-1], "finished"), "targets-nowhere": "failed"}
    assert status == 1
    assert output.splitlines()[-1].startswith(
        "rslightning: 1 of 5 cells did not finish (targets-nowhere); targets-nowhere: Target "
        "'nowhere' matches no linear module."
    )
    assert "Traceback" not in output
    assert "about" in output  # time left


def test_a_cell_is_the_fit_of_its_command(undisturbed, command, tmp_path, capsys):
    """The printed commands, pasted into a shell, give the same losses, bit for bit."""
    words, copy = command("it's a copy")
    assert main(["sweep", *words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert not copy.exists()
    cells = [line for line in lines if line.startswith("rslightning fit ")]
    assert len(cells) == len(CELLS)
    script = [line for line in lines if line not in cells or '"version": "rslora_rank8"' in line]
    (tmp_path / "rslightning").write_text(f'#!/bin/sh\nexec {sys.executable} -m rslightning "$@"\n')
    (tmp_path / "rslightning").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(["sh", "-e"], input="".join(script), text=True, check=True, env=environment)
    there, here = (read_events(f / "rslora_rank8").curves for f in (undisturbed[2], copy))
    assert there["train/loss"].steps.tolist() == list(range(STEPS))
    for tag in ("train/loss", "val/loss", "grad_norm/mean", "adapter_output/second_moment"):
        assert there[tag].values.tolist() == here[tag].values.tolist()
        assert len(there[tag].values) > 1


def test_cells_differ_in_nothing_but_their_axes(undisturbed):
    """The same rows in the same order, and the same first rows of A."""
    _, _, folder = undisturbed
    first = [read_events(folder / name).curves["train/loss"].values[0] for name in CELLS[:-1]]
    assert len(set(first)) == 1  # B is zero
    configs = [yaml.safe_load((folder / name / "config.yaml").read_text()) for name in CELLS[:-1]]
    for config, name in zip(configs, CELLS, strict=False):
        adapter = config["model"]["adapter"]
        assert name == f"{adapter.pop('scaling')}_rank{adapter.pop('rank')}"
        assert config["trainer"]["logger"]["init_args"].pop("version") == name
    assert all(config == configs[0] for config in configs)


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        if process.poll() is not None:
            return
        time.sleep(0.01)


def kill(process):
    """Kill the sweep's process alone; what it started must notice by itself."""
    group = os.getpgid(process.pid)
    process.kill()
    process.communicate()
    end = time.monotonic() + 20
    while cells_of(group):
        assert time.monotonic() < end, "cells outlived the sweep"
        time.sleep(0.05)


def cells_of(session):
    """Return the living processes of a session."""
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            living.append(stat.parent.name)
    return living


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_a_sweep_killed_three_times_goes_on_to_the_same_numbers(undisturbed, command, tmp_path):
    _, _, whole = undisturbed
    words, folder = command("killed")
    chance = random.Random(5)
    moments = [
        lambda: any(folder.glob("*/checkpoints/step-*.ckpt")),
        lambda: len(list(folder.glob("*/status.json"))) >= 2,
        lambda: len(list(folder.glob("*/status.json"))) >= 3,
    ]
    killed_in_a_cell = False
    for moment in moments:
        process = popen(words)
        wait_for(moment, process)
        time.sleep(chance.random() * 0.2)
        kill(process)
        cells = [path.parent for path in folder.glob("*/checkpoints")]
        killed_in_a_cell |= any(read_status(cell) is None for cell in cells)
    assert killed_in_a_cell
    process = popen(words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "are done; the others run" in output
    assert any(folder.glob("*/config.resume-1.yaml"))  # from a checkpoint, not from the beginning
    for name in CELLS[:-1]:
        one, other = (read_events(f / name).curves for f in (whole, folder))
        assert one.keys() == other.keys()
        for tag in one:
            if not tag.startswith("perf/"):
                assert one[tag].steps.tolist() == other[tag].steps.tolist(), (name, tag)
                assert one[tag].values.tolist() == other[tag].values.tolist(), (name, tag)
    assert numbers(whole, tmp_path / "whole") == numbers(folder, tmp_path / "killed")


def numbers(sweep, output):
    """Return the bytes of what a report drew."""
    assert main(["report", str(sweep), "--output", str(output)]) == 0
    files = {path.name: path.read_bytes() for path in output.rglob("*.csv")}
    assert {"figure2.csv", "figure3.csv"} <= files.keys()
    return files


def one_long_fit(command, output):
    """Return the words of a sweep of one cell, `rank2`, and its folder."""
    words, folder = command(output)
    plan = {**SWEEP, "grids": [{"rank": [2]}]}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(plan))
    return [*words, "--config", str(path), "--trainer.max_steps", "2000"], folder


def is_training(folder):
    return any(folder.glob("*/checkpoints/step-*.ckpt"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_fit_that_a_signal_stopped_goes_on(command, number, hangs_up):
    words, folder = one_long_fit(command, f"stopped-{number}")
    process = popen(words)
    wait_for(lambda: is_training(folder), process)
    others = {int(name) for name in cells_of(process.pid)} - {process.pid}
    (fit,) = (other for other in others if os.getpgid(other) == other)
    os.kill(fit, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "killed: it goes on when the sweep is started again rank2" in output
    assert "rank2: it was killed; the same command goes on with it." in output
    assert f"stopped by {number.name} after step" in (folder / "rank2/output.log").read_text()
    assert [cell.name for cell in to_do(folder, [Cell("rank2", {})], False)] == ["rank2"]
    assert (folder / "rank2/checkpoints/last.ckpt").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_a_sweep_whose_terminal_is_closed_ends_and_goes_on(command, hangs_up):
    words, folder = one_long_fit(command, "closed")
    session, terminal = pty.fork()
    if session == 0:
        os.execv(sys.executable, [sys.executable, "-m", "rslightning", "sweep", *words])
    end = time.monotonic() + 120
    while not is_training(folder):
        os.read(terminal, 65536)
        assert time.monotonic() < end
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(session, 0)[1]) == -signal.SIGHUP
    end = time.monotonic() + 20
    while cells_of(session):
        assert time.monotonic() < end, "cells outlived the sweep"
        time.sleep(0.05)
    assert [cell.name for cell in to_do(folder, [Cell("rank2", {})], False)] == ["rank2"]
    assert (folder / "rank2/checkpoints/last.ckpt").exists()


def test_what_is_done_is_skipped_and_what_failed_is_retried_on_request(tmp_path):
    cells = [Cell(name, {}) for name in ("done", "failed", "killed", "new")]
    write_status(tmp_path / "done", Status("finished"))
    write_status(tmp_path / "failed", Status("failed", "Target 'nowhere' matches nothing."))
    (tmp_path / "killed/checkpoints").mkdir(parents=True)
    (tmp_path / "failed/checkpoints").mkdir()
    assert [cell.name for cell in to_do(tmp_path, cells, retry_failed=False)] == ["killed", "new"]
    again = [cell.name for cell in to_do(tmp_path, cells, retry_failed=True)]
    assert again == ["failed", "killed", "new"]
    assert not (tmp_path / "failed/checkpoints").exists()  # from its beginning
    assert (tmp_path / "killed/checkpoints").exists()


def test_gaps_in_the_losses_are_found(undisturbed, tmp_path):
    _, _, folder = undisturbed
    copy = tmp_path / "cell"
    shutil.copytree(folder / "lora_rank2", copy)
    assert not has_gaps(copy)
    (events,) = copy.glob("events.out.*")
    whole = events.read_bytes()
    for share in (0.5, 0.98):
        events.write_bytes(whole[: int(len(whole) * share)])
        assert has_gaps(copy)


# --- refused before anything runs ----------------------------------------------------------------


def said(words, capsys):
    assert main(["sweep", *words]) == 2
    return capsys.readouterr().err.removeprefix("rslightning: ").strip()


def test_a_folder_in_use_is_refused(command, capsys):
    words, folder = command("locked")
    folder.mkdir()
    with FileLock(folder / ".lock"):
        assert said(words, capsys) == f"{folder} is being swept by another process."


def test_a_folder_of_other_options_is_refused(command, capsys):
    words, folder = command("other")
    folder.mkdir()
    content = {"base": SWEEP["base"], "options": {}, "arguments": [], "cells": {"lora_rank2": {}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    (folder / "lora_rank2").mkdir()
    message = said(words, capsys)
    assert message.startswith(f"{folder} holds cells with options {{}}, this sweep has ")
    assert message.endswith("give another --output, or the same options.")


def test_a_sweep_that_never_began_leaves_its_folder_free(tmp_path):
    """As after a misspelt option, which is found when the file is there already."""
    plan = Sweep("any", ["recipes/llama_gsm8k.yaml"], [{"rank": [4]}])
    write_plan(plan, tmp_path, plan.cells(), ["--model.adapter.rnk", "3"])
    write_plan(plan, tmp_path, plan.cells(), [])
    assert yaml.safe_load((tmp_path / "sweep.yaml").read_text())["arguments"] == []
    (tmp_path / "rank4").mkdir()
    with pytest.raises(UserError, match="holds cells with arguments"):
        write_plan(plan, tmp_path, plan.cells(), ["--x", "3"])


OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3, "weight_decay": 0.0}}


@pytest.fixture
def plan_of(tmp_path):
    """Return the function that writes the plan of a sweep; its base is a file that can change."""
    recipe, folder = tmp_path / "base.yaml", tmp_path / "runs"
    folder.mkdir()

    def plan(alpha=16.0, decay=0.0, options=(), **grid):
        adapter = {"alpha": alpha, "rank": 8}
        content = {"model": {"adapter": adapter}, "logger": {"api_key": "of mine"}}
        recipe.write_text(f"# a comment\n{yaml.safe_dump(content)}")
        init_args = {**OPTIMIZER["init_args"], "weight_decay": decay}
        grid = grid or {"optimizer": [{**OPTIMIZER, "init_args": init_args}]}
        swept = Sweep("any", [str(recipe)], [grid])
        write_plan(swept, folder, swept.cells(), options)
        return folder

    return plan


def test_a_cell_of_the_same_name_and_other_values_is_refused(plan_of):
    folder = plan_of()
    plan_of(decay=0.9)  # nothing has begun
    plan_of()
    (folder / "adamw").mkdir()
    plan_of()
    with pytest.raises(UserError) as raised:
        plan_of(decay=0.9)
    assert str(raised.value) == (
        f"{folder} holds cell adamw with optimizer.init_args.weight_decay 0.0, this sweep has 0.9: "
        f"give another --output, or remove {folder}/adamw to run that cell anew."
    )
    plan_of(rank=[4])  # other cells may join, and the first stays what it was
    with pytest.raises(UserError, match="holds cell adamw with optimizer"):
        plan_of(decay=0.9)
    assert list(yaml.safe_load((folder / "sweep.yaml").read_text())["cells"]) == ["adamw", "rank4"]


def test_a_base_that_was_edited_is_refused(plan_of, tmp_path):
    folder = plan_of(rank=[4])
    (folder / "rank4").mkdir()
    with pytest.raises(UserError) as raised:
        plan_of(alpha=64.0, rank=[4, 8])
    recipe = tmp_path / "base.yaml"
    assert str(raised.value) == (
        f"{folder} holds cells with model.adapter.alpha 16.0 from {recipe}, where it now is 64.0: "
        "give another --output, or the same model.adapter.alpha."
    )
    plan_of(rank=[4, 8])
    assert "of mine" not in (folder / "sweep.yaml").read_text()


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_fragment_of_the_options_that_was_edited_is_refused(plan_of, tmp_path, form):
    fragment = tmp_path / "fragment.yaml"
    options = [word.format(fragment) for word in form]
    fragment.write_text("data: {init_args: {max_length: 256}}")
    folder = plan_of(options=options, rank=[4])
    (folder / "rank4").mkdir()
    fragment.write_text("data: {init_args: {batch_size: 4}}")
    with pytest.raises(UserError, match=r"data.init_args.max_length 256 from .*, where .* unset"):
        plan_of(options=options, rank=[4])


def test_a_sweep_that_an_earlier_version_began_goes_on(plan_of):
    folder = plan_of(rank=[4])
    (folder / "rank4").mkdir()
    plan = yaml.safe_load((folder / "sweep.yaml").read_text())
    del plan["recipes"]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(plan))
    plan_of(alpha=64.0, rank=[4, 8])
    assert "recipes" in yaml.safe_load((folder / "sweep.yaml").read_text())


def test_a_sweep_is_no_recipe_and_a_recipe_no_sweep(command, capsys):
    words, _ = command("any")
    assert main(["fit", *words[:2]]) == 2
    assert "is a sweep: run it with rslightning sweep --config" in capsys.readouterr().err
    assert "has no key `grids`" in said(["--config", "recipes/quickstart.yaml"], capsys)
    assert "There is no configuration" in said(["--config", "nowhere"], capsys)
    assert "at least 1, got '0'" in said([*words, "--jobs", "0"], capsys)


def test_a_wrong_key_is_found_before_the_first_cell_runs():
    recipe = ["--config", "recipes/llama_gsm8k.yaml"]
    with pytest.raises(UserError, match=r"no option model.adapter.rnk; did you mean .*rank"):
        check_cells([recipe, [*recipe, "--model.adapter.rnk", "4"]])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"figures": {"a": "perplexty"}}, [], "There is no kind of figure 'perplexty'; did you"),
        ({"figures": {"a": ["held_out"]}}, [], "There is no kind of figure ['held_out'];"),
        ({"figures": {"a/b": "perplexity"}}, [], "tiny: 'a/b' is no file name for a figure."),
        ({"claims": ["foo"]}, [], "There is no claim 'foo'; known are rank_gains, "),
        ({"claims": [["moments"]]}, [], "There is no claim ['moments']; "),
        ({"grids": [{"rnak": [4]}]}, [], "There is no option rnak"),
        ({"grids": [{"rank": [4, -8]}]}, [], "rank must be a positive integer, got -8."),
        ({"options": {"model": {"adapter": {"rnk": 3}}}}, [], "There is no option model.adapter."),
        ({}, ["--model.adapter.rnk", "3"], "There is no option model.adapter.rnk; did you mean "),
        ({}, ["--launcher", "slurm"], "SLURM jobs: "),
    ],
)
def test_a_refused_sweep_leaves_no_folder(tmp_path, monkeypatch, capsys, change, options, message):
    if "slurm" in options:
        pytest.importorskip("submitit")
        monkeypatch.setenv("PATH", str(tmp_path))
    path, folder = tmp_path / "wrong.yaml", tmp_path / "runs"
    path.write_text(yaml.safe_dump({**SWEEP, **change}))
    words = ["--config", str(path), "--output", str(folder), *options]
    assert said(words, capsys).startswith(message)
    if "slurm" not in options:
        assert said([*words, "--dry-run"], capsys).startswith(message)
    assert [p.name for p in tmp_path.iterdir()] == ["wrong.yaml"]


def test_slots_are_devices_or_cores():
    facts = {"in_processes": False, "gpus": 0}
    assert choose_slots(facts, 3, 1, {}) == [None] * 3
    assert len(choose_slots(facts, None, 10_000, {})) == 1
    gpus = {"in_processes": False, "gpus": 3}
    assert choose_slots(gpus, None, 1, {}) == ["0", "1", "2"]
    assert choose_slots(gpus, 2, 1, {"CUDA_VISIBLE_DEVICES": "5,7,6"}) == ["5", "7"]
    assert choose_slots(gpus, 4, 1, {}) == ["0", "1", "2", "0"]
    assert choose_slots({"in_processes": True, "gpus": 8}, None, 1, {}) == [None]


def test_the_help_imports_no_torch():
    code = "import sys; from rslightning.__main__ import main; main(['sweep', '--config', 'x'])"
    check = "; assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code + check]).returncode == 0


def test_a_cell_that_is_run_anew_has_nothing_left_but_its_output(tmp_path):
    for name in ("checkpoints", "adapter", "merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in ("config.yaml", "config.resume-1.yaml", "events.out.tfevents.1", "output.log"):
        (tmp_path / name).touch()
    write_status(tmp_path, Status("failed"))
    forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["output.log"]
