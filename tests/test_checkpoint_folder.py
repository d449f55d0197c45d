import os
import shutil

import pytest
import torch

from rslightning.checkpoint_folder import list_steps, newest_whole, point_last, step_name
from rslightning.errors import UserError
from rslightning.manifest import find_damage, write_manifest


def save(folder, step, seconds):
    """Save the checkpoint of a step, so long after the first one."""
    path = folder / step_name(step)
    torch.save({"step": step}, path)
    os.utime(path, (1000 + seconds, 1000 + seconds))
    return path


def link(folder, step, seconds):
    point_last(folder, step)
    times = (1000 + seconds, 1000 + seconds)
    os.utime(folder / "last.ckpt", times, follow_symlinks=False)


def cut(path):
    time = path.stat().st_mtime
    path.write_bytes(path.read_bytes()[:-30])
    os.utime(path, (time, time))


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 5, 10 and 100, saved in this order; the link is to the newest."""
    for step, seconds in ((5, 0), (10, 10), (100, 20)):
        save(tmp_path, step, seconds)
    link(tmp_path, 100, 21)
    return tmp_path


def test_steps_are_numbers(folder):
    (folder / "step-x.ckpt").touch()
    (folder / ".partial.ckpt").touch()
    assert [step for step, _ in list_steps(folder)] == [5, 10, 100]
    assert list_steps(folder / "absent") == []


def test_the_newest_is_what_the_link_means(folder):
    assert newest_whole(folder) == (folder / "step-100.ckpt", [])


def test_a_kill_before_the_link_moved(folder):
    link(folder, 10, 15)
    assert newest_whole(folder) == (folder / "step-100.ckpt", [])


def test_a_run_that_went_back_is_newer_than_the_steps_that_it_left(folder):
    save(folder, 11, 30)
    link(folder, 11, 31)
    assert newest_whole(folder) == (folder / "step-11.ckpt", [])


def test_a_damaged_one_is_passed_over_and_told(folder):
    cut(folder / "step-100.ckpt")
    damaged = f"{folder / 'step-100.ckpt'} is not whole (it ends too early, or its directory is "
    assert newest_whole(folder) == (folder / "step-10.ckpt", [f"{damaged}damaged)"])


def test_what_only_torch_finds_is_passed_over(folder):
    path = folder / "step-100.ckpt"
    content = bytearray(path.read_bytes())
    time = path.stat().st_mtime
    refused = 0
    for position in range(0, len(content), 3):
        changed = content.copy()
        changed[position] ^= 0x55
        path.write_bytes(changed)
        os.utime(path, (time, time))
        found, damaged = newest_whole(folder)
        assert torch.load(found, weights_only=True)["step"] in (10, 100)
        assert bool(damaged) == (found != path)
        refused += find_damage(path) is None and found != path
    assert refused > 0


def test_none_that_is_whole(folder, tmp_path_factory):
    for step in (5, 10, 100):
        cut(folder / step_name(step))
    with pytest.raises(UserError, match=r"^No checkpoint can be gone on from: .*step-5\.ckpt is"):
        newest_whole(folder)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match=f"^There is no checkpoint in {empty}.$"):
        newest_whole(empty)


def test_the_target_of_the_link_is_gone(folder):
    (folder / "step-100.ckpt").unlink()
    assert newest_whole(folder)[0] == folder / "step-10.ckpt"


def test_a_copy_in_which_the_link_became_a_file(folder):
    (folder / "last.ckpt").unlink()
    shutil.copy(folder / "step-10.ckpt", folder / "last.ckpt")
    assert newest_whole(folder)[0] == folder / "last.ckpt"
    cut(folder / "last.ckpt")
    path, damaged = newest_whole(folder)
    assert path == folder / "step-100.ckpt"
    assert len(damaged) == 1


def test_the_link_takes_the_place_of_whatever_was_there(folder):
    for before in ("file", "folder", "link", "nothing"):
        last = folder / "last.ckpt"
        last.unlink(missing_ok=True)
        if before == "file":
            last.write_text("x")
        elif before == "folder":
            (last / "deep").mkdir(parents=True)
        elif before == "link":
            last.symlink_to("nowhere")
        point_last(folder, 10)
        assert str(last.readlink()) == "step-10.ckpt"
        assert torch.load(last, weights_only=True) == {"step": 10}
        assert not (folder / ".last.ckpt").is_symlink()


def test_folders_are_checkpoints_too(folder):
    path = folder / "step-200.ckpt"
    path.mkdir()
    (path / "part").write_text("text")
    write_manifest(path)
    link(folder, 200, 40)
    assert newest_whole(folder)[0] == path
    (path / "part").write_text("texs")
    assert newest_whole(folder)[0] == folder / "step-100.ckpt"
