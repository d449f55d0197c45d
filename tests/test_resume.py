import os
from pathlib import Path

import pytest
import torch
import yaml

from rslightning.checkpoint_folder import point_last, step_name
from rslightning.errors import UserError
from rslightning.resume import (
    _HELD,
    find_run,
    give_back,
    hold,
    list_runs,
    resolve_checkpoint,
    runs_folder,
)

LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"


def trainer(root, **options):
    logger = {"class_path": LOGGER, "init_args": {"save_dir": str(root), "name": "tiny"}}
    return {"logger": logger, "default_root_dir": None, "devices": 1, "num_nodes": 1} | options


def config(root, rank=3, **options):
    return {"model": {"adapter": {"rank": rank}}, "trainer": trainer(root), **options}


def make_run(folder: Path, steps, saved=None) -> Path:
    """Make a run folder with whole checkpoints, one second apart."""
    (folder / "checkpoints").mkdir(parents=True)
    for number, step in enumerate(steps):
        path = folder / "checkpoints" / step_name(step)
        torch.save({"step": step}, path)
        os.utime(path, (1000 + number, 1000 + number))
        point_last(folder / "checkpoints", step)
    if saved is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    return folder


def cut(path: Path) -> None:
    time = path.stat().st_mtime
    path.write_bytes(path.read_bytes()[:-30])
    os.utime(path, (time, time))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "tiny/version_0", (2, 4, 6))


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/last.ckpt"])
def test_the_newest_of_a_run_by_any_of_its_names(run, name):
    found = resolve_checkpoint(str(run / name), {})
    assert found == (run / "checkpoints/step-6.ckpt", [])
    cut(run / "checkpoints/step-6.ckpt")
    found = resolve_checkpoint(str(run / name), {})
    assert found.path == run / "checkpoints/step-4.ckpt"
    assert len(found.said) == 1
    assert found.said[0].endswith(": going on from step-4.ckpt.")


def test_one_that_is_named_is_taken(run):
    path = run / "checkpoints/step-2.ckpt"
    assert resolve_checkpoint(str(path), {}) == (path, [])
    cut(run / "checkpoints/step-4.ckpt")
    found = resolve_checkpoint(str(run / "checkpoints/step-4.ckpt"), {})
    assert found.path == path
    assert found.said == [
        f"{run / 'checkpoints/step-4.ckpt'} is not whole (it ends too early, or its directory is "
        "damaged): going on from step-2.ckpt of before."
    ]
    cut(path)
    with pytest.raises(UserError, match=r"and no checkpoint of before is beside it\.$"):
        resolve_checkpoint(str(path), {})


def test_none_is_told(run, tmp_path):
    with pytest.raises(UserError, match=r"^There is no checkpoint .*nowhere\.$"):
        resolve_checkpoint(str(tmp_path / "nowhere"), {})
    with pytest.raises(UserError, match=r"^There is no checkpoint in "):
        resolve_checkpoint(str(tmp_path), {})
    with pytest.raises(UserError, match=r"^There is no run with a checkpoint in .*other/tiny\.$"):
        resolve_checkpoint("last", trainer(tmp_path / "other"))


def test_an_adapter_is_no_run_that_could_go_on(run):
    adapter = run / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    with pytest.raises(UserError) as caught:
        resolve_checkpoint(str(adapter), {})
    assert str(caught.value) == (
        f"{adapter} holds an adapter, and no run that could go on: begin anew from it with "
        f"--model.start_from {adapter}."
    )
    assert resolve_checkpoint(str(adapter), {}, adapter_alone=True) == (adapter, [])
    assert resolve_checkpoint(str(run), {}, adapter_alone=True) == (adapter, [])
    assert resolve_checkpoint(str(run), {}) == (run / "checkpoints/step-6.ckpt", [])


def test_last_is_of_the_newest_run(tmp_path):
    for version, steps in ((2, (5,)), (10, (1,)), (9, (7,))):
        make_run(tmp_path / f"tiny/version_{version}", steps)
    (tmp_path / "tiny/version_11").mkdir()  # has begun, and saved nothing
    found = resolve_checkpoint("last", trainer(tmp_path))
    assert found.path == tmp_path / "tiny/version_10/checkpoints/step-1.ckpt"
    assert [run.name for run in list_runs(trainer(tmp_path))] == [
        "version_10",
        "version_9",
        "version_2",
    ]


@pytest.mark.parametrize(
    ("logger", "expected"),
    [
        (None, "root/lightning_logs"),
        (True, "root/lightning_logs"),
        (False, "root"),
        ({"class_path": LOGGER, "init_args": {"save_dir": "a", "name": None}}, "a"),
        ({"class_path": "x.CSVLogger", "init_args": {"save_dir": "a", "name": "b"}}, "a/b"),
    ],
)
def test_where_runs_are(logger, expected):
    assert runs_folder({"default_root_dir": "root", "logger": logger}) == Path(expected)
    assert runs_folder({}) == Path("lightning_logs")


@pytest.mark.parametrize("logger", [{"class_path": "x.WandbLogger"}, [{"class_path": LOGGER}]])
def test_other_loggers_keep_their_runs_elsewhere(logger):
    with pytest.raises(UserError, match=r"^To find a run again takes one logger"):
        runs_folder({"logger": logger})


def test_the_newest_run_of_the_same_configuration_goes_on(tmp_path):
    make_run(tmp_path / "tiny/version_0", (2,), config(tmp_path))
    make_run(tmp_path / "tiny/version_1", (4,), config(tmp_path))
    make_run(tmp_path / "tiny/version_2", (6,), config(tmp_path, rank=4))
    found, sentence = find_run(config(tmp_path))
    assert found.folder == tmp_path / "tiny/version_1"
    assert found.checkpoint.path == found.folder / "checkpoints/step-4.ckpt"
    assert sentence == f"auto_resume: going on with {found.folder} from step-4.ckpt."


def test_what_may_differ(tmp_path):
    saved = config(tmp_path, ckpt_path=None, auto_resume=False, older=1)
    make_run(tmp_path / "tiny/version_0", (2,), saved)
    now = config(tmp_path, rank="auto", ckpt_path="x", auto_resume=True, newer=2)
    now["trainer"] |= {"devices": 8, "num_nodes": 2}
    now["trainer"]["logger"]["init_args"]["version"] = "y"
    assert find_run(now)[0].folder == tmp_path / "tiny/version_0"


def test_a_run_is_of_the_configuration_with_which_it_went_on_last(tmp_path):
    run = make_run(tmp_path / "tiny/version_0", (2,), config(tmp_path, rank=4))
    for number in (9, 10):
        saved = config(tmp_path, seed_everything=number)
        saved["trainer"]["logger"]["init_args"]["version"] = run.name
        text = yaml.safe_dump(saved)
        (run / f"config.resume-{number}.yaml").write_text(text)
    assert find_run(config(tmp_path, seed_everything=10))[0].folder == run
    assert find_run(config(tmp_path, seed_everything=9))[1] == (
        f"auto_resume: a new run begins; {run} has seed_everything 10, not 9."
    )


def test_a_run_of_no_logger_goes_on(tmp_path):
    logger = {"logger": False, "default_root_dir": str(tmp_path)}
    now = {"model": {"adapter": {"rank": 3}}, "trainer": trainer(tmp_path, **logger)}
    make_run(tmp_path, (2,), now)
    assert find_run(now)[0].folder == tmp_path


def test_a_new_run_begins_and_says_why(tmp_path):
    assert find_run(config(tmp_path)) == (
        None,
        "auto_resume: a new run begins; there is none yet.",
    )
    run = make_run(tmp_path / "tiny/version_0", (2,), config(tmp_path, rank=4))
    make_run(tmp_path / "tiny/version_1", (2,))  # without a configuration
    assert find_run(config(tmp_path)) == (
        None,
        f"auto_resume: a new run begins; {run} has model.adapter.rank 4, not 3.",
    )


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    make_run(tmp_path / "tiny/version_0", (2,), config(tmp_path))
    run = make_run(tmp_path / "tiny/version_1", (), config(tmp_path))
    assert find_run(config(tmp_path)) == (
        (run, None),
        f"auto_resume: beginning again in {run}, which has no checkpoint.",
    )


def test_a_run_that_another_process_trains_is_left_alone(tmp_path, run_processes):
    run = make_run(tmp_path / "tiny/version_0", (2,), config(tmp_path))
    hold(run)
    try:
        assert find_run(config(tmp_path))[0].folder == run  # this process may go on

        def other(_):
            _HELD.clear()  # the parent's
            with pytest.raises(UserError, match=f"^{run} is of this configuration, and another"):
                find_run(config(tmp_path))

        assert run_processes(1, other) == [0]
    finally:
        give_back()
    assert run_processes(1, lambda _: find_run(config(tmp_path))) == [0]


def test_a_run_of_which_nothing_is_whole_is_not_silently_begun_anew(tmp_path):
    run = make_run(tmp_path / "tiny/version_0", (2,), config(tmp_path))
    cut(run / "checkpoints/step-2.ckpt")
    with pytest.raises(UserError, match=r"^No checkpoint can be gone on from: "):
        find_run(config(tmp_path))
