"""Runs that nobody watched: the folders that fits leave, whole and cut short."""

import shutil

import pytest
import torch
from made_runs import write_run

from rslightning.__main__ import main
from rslightning.experiments.runs import read_run

PASSES, STEPS_OF_A_PASS = 2, 5  # 17 rows, 4 at a time


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, model_folder, gsm8k_folder):
    """Return the folder of a fit of two passes that kept the checkpoint of every step."""
    root = tmp_path_factory.mktemp("fit")
    words = {
        "model.base_model": model_folder,
        "data.path": gsm8k_folder,
        "data.packing": "false",
        "data.batch_size": 4,
        "data.max_length": 64,
        "data.held_out_examples": 2,
        "checkpoint": '{"every_n_steps": 1, "keep_last": 20}',
        "merge_adapters": "null",
        "trainer.max_steps": -1,
        "trainer.max_epochs": PASSES,
        "trainer.log_every_n_steps": 3,
        "trainer.val_check_interval": 100,
        "trainer.logger.save_dir": root,
        "trainer.logger.name": "runs",
        "trainer.logger.version": "run",
    }
    options = [f"--{key}={value}" for key, value in words.items()]
    assert main(["fit", "--config", "recipes/llama_gsm8k_paper.yaml", *options]) == 0
    return root / "runs" / "run"


def killed_after(step, fitted, folder):
    """Return a copy of a run as it would be had it been killed after a step."""
    shutil.copytree(fitted, folder, symlinks=True)
    checkpoints = folder / "checkpoints"
    for path in checkpoints.glob("step-*.ckpt"):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()
    (checkpoints / "last.ckpt").unlink()
    (checkpoints / "last.ckpt").symlink_to(f"step-{step}.ckpt")
    return folder


def test_a_run_of_whole_passes_is_finished_after_the_last_step_alone(fitted, tmp_path):
    last = PASSES * STEPS_OF_A_PASS
    found = {
        step: read_run(killed_after(step, fitted, tmp_path / str(step)), "run", False).state
        for step in range(1, last + 1)
    }
    assert found == {**dict.fromkeys(range(1, last), "unfinished"), last: "finished"}
    assert read_run(fitted, "run", in_sweep=False).state == "finished"


def test_steps_that_were_not_logged_count(tmp_path):
    """Every fifth of 12 steps is logged, the last time the tenth."""
    folder = write_run(tmp_path / "run", losses=[2.0] * 10, state=None, steps=12)
    (folder / "checkpoints").mkdir()
    for step, state in ((10, "unfinished"), (12, "finished")):
        (folder / "checkpoints" / f"step-{step}.ckpt").touch()
        assert read_run(folder, "run", in_sweep=False).state == state


@pytest.mark.parametrize(
    ("scaling", "results", "state"),
    [
        ("lora", ["adapter", "merged"], "finished"),
        ("lora", ["merged"], "unfinished"),  # `rslightning merge` may have written it
        ("lora", [], "unfinished"),
        ("full", ["merged"], "finished"),
    ],
)
def test_results_are_written_at_the_end(tmp_path, scaling, results, state):
    """Without checkpoints, and with a callback that ended the run before its steps."""
    folder = write_run(tmp_path / "run", scaling, losses=[2.0] * 7, state=None)
    for name in results:
        (folder / name).mkdir()
    assert read_run(folder, "run", in_sweep=False).state == state


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", None])
def test_a_checkpoint_that_cannot_be_read_says_nothing(tmp_path, content):
    keys = {"trainer.max_epochs": 1}
    folder = write_run(tmp_path / "run", losses=[2.0] * 7, state=None, steps=-1, keys=keys)
    (folder / "checkpoints").mkdir()
    path = folder / "checkpoints" / "step-7.ckpt"
    path.write_bytes(content) if content is not None else torch.save({"loops": {}}, path)
    assert read_run(folder, "run", in_sweep=False).state == "unfinished"


class Trap:
    """Runs code where a pickle of it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_code_of_a_checkpoint_runs(tmp_path):
    keys = {"trainer.max_epochs": 1}
    folder = write_run(tmp_path / "run", losses=[2.0] * 7, state=None, steps=-1, keys=keys)
    (folder / "checkpoints").mkdir()
    loop = {"epoch_progress": {"current": {"ready": 1}}}
    loop["epoch_loop.batch_progress"] = {"is_last_batch": True}
    content = {"trap": Trap(tmp_path / "trap"), "loops": {"fit_loop": loop}}
    torch.save(content, folder / "checkpoints" / "step-7.ckpt")
    assert read_run(folder, "run", in_sweep=False).state == "finished"
    assert not (tmp_path / "trap").exists()
