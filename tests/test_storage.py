import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from rslightning import storage
from rslightning.errors import RunError, UserError
from rslightning.storage import (
    CODES,
    in_file_order,
    new_folder,
    open_tensors,
    put_in_place,
    remove,
    save_tensors,
    tensor_writer,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "run"
    with new_folder(target) as aside:
        (aside / "file").write_text("content")
        assert not target.exists()
    assert names(tmp_path) == ["deep", "deep/run", "deep/run/file", "deep/run/manifest.json"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_a_failed_block_leaves_nothing(tmp_path, error):
    def fail():
        with new_folder(tmp_path / "run") as aside:
            (aside / "file").write_text("content")
            raise error("stop")

    with pytest.raises(error, match=r"^stop$"):
        fail()
    assert names(tmp_path) == []


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    with new_folder(tmp_path / "run") as aside:
        (aside / "file").write_text("content")
    assert names(tmp_path) == ["run", "run/file", "run/manifest.json"]


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    target = tmp_path / "run"
    (target / "mine").mkdir(parents=True)

    def write():
        with new_folder(target):
            raise AssertionError("the block must not start")

    with pytest.raises(UserError) as caught:
        write()
    assert str(caught.value) == (
        f"{target} exists and is not empty; choose another folder or remove it."
    )
    assert names(tmp_path) == ["run", "run/mine"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_is_refused(tmp_path, replace):
    (tmp_path / "run").write_text("mine")

    def write():
        with new_folder(tmp_path / "run", replace):
            raise AssertionError("the block must not start")

    with pytest.raises(UserError) as caught:
        write()
    assert str(caught.value) == f"{tmp_path / 'run'} is a file; choose another folder or remove it."
    assert (tmp_path / "run").read_text() == "mine"


def test_replacing_leaves_only_the_new(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").write_text("old")
    with new_folder(target, replace=True) as aside:
        (aside / "new").write_text("new")
        assert names(target) == ["old"]  # until the new one is complete
    assert names(tmp_path) == ["run", "run/manifest.json", "run/new"]


def test_replacing_without_an_exchange_leaves_only_the_new(tmp_path, no_exchange):
    test_replacing_leaves_only_the_new(tmp_path)


def test_what_a_dead_process_left_is_removed(tmp_path):
    mark = f".run.{socket.gethostname()}."
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"{mark}{dead.pid}.x", f"{mark}{os.getpid()}.y", ".run.elsewhere.1.z", ".run.1"):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "run"):
        pass
    assert names(tmp_path) == [
        ".run.1",
        ".run.elsewhere.1.z",
        f"{mark}{os.getpid()}.y",
        "run",
        "run/manifest.json",
    ]


def test_a_file_is_replaced_by_a_whole_one(tmp_path):
    write_text(tmp_path / "file", "old")
    write_text(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "new"


def test_a_failed_replacement_keeps_the_old(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").write_text("old")

    def fail():
        with new_folder(target, replace=True) as aside:
            (aside / "new").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError) as caught:
        fail()
    assert str(caught.value) == f"Could not write {target}: No space left on device."
    assert names(tmp_path) == ["run", "run/old"]


@pytest.fixture
def no_exchange(monkeypatch):
    """Stand in a file system that cannot let two names change places."""
    monkeypatch.setattr(storage, "_exchange", lambda aside, path: False)


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_moved(
    tmp_path, monkeypatch, no_exchange
):
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def refuse_the_new(path, destination):
        if (path / "new").exists():
            raise PermissionError(13, "Permission denied")
        return rename(path, destination)

    monkeypatch.setattr(Path, "rename", refuse_the_new)

    def write():
        with new_folder(target, replace=True) as aside:
            (aside / "new").write_text("new")

    with pytest.raises(RunError, match="Permission denied"):
        write()
    assert names(tmp_path) == ["run", "run/old"]


def test_a_parent_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "parent").write_text("a file")

    def write():
        with new_folder(tmp_path / "parent" / "run"):
            raise AssertionError("the block must not start")

    with pytest.raises(RunError) as caught:
        write()
    assert str(caught.value).startswith(f"Could not write {tmp_path / 'parent' / 'run'}: ")
    assert names(tmp_path) == ["parent"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_reported(tmp_path):
    tmp_path.chmod(0o555)

    def write():
        with new_folder(tmp_path / "run"):
            raise AssertionError("the block must not start")

    with pytest.raises(RunError, match=r"run: Permission denied\.$"):
        write()


def test_a_full_disk_is_reported_and_leaves_the_old_folder(tmp_path, small_disk):
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").write_text("old")

    def write():
        with new_folder(target, replace=True) as aside:
            save_tensors({"weight": torch.zeros(100_000)}, aside / "weights.safetensors")

    with small_disk(max_bytes=100_000), pytest.raises(RunError) as caught:
        write()
    assert str(caught.value).startswith(f"Could not write {target}: ")
    assert "File too large" in str(caught.value)
    assert names(tmp_path) == ["run", "run/old"]


def test_tensors_are_saved_as_they_are(tmp_path):
    tensors = {
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "bfloat16": torch.tensor([1.0, 2.5], dtype=torch.bfloat16),
        "trained": torch.nn.Parameter(torch.ones(1)),
    }
    save_tensors(tensors, tmp_path / "x.safetensors")
    with open_tensors(tmp_path / "x.safetensors") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors({"weight": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-10])

    def read(path):
        with open_tensors(path):
            pass

    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} cannot be read as safetensors (")
    assert str(caught.value).endswith("; it is damaged or incomplete: copy or download it again.")
    with pytest.raises(UserError, match=r"absent does not exist\.$"):
        read(tmp_path / "absent")


def test_files_get_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "new") as aside:
            (aside / "private").touch(0o600)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()]
    assert modes == [0o640, 0o640]
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750


@pytest.mark.parametrize("before", [None, "file", "folder"])
@pytest.mark.parametrize("now", ["file", "folder"])
def test_what_is_whole_takes_the_place_of_what_was(tmp_path, before, now):
    def write(path: Path, kind: str | None, text: str) -> None:
        if kind == "folder":
            (path / "deep").mkdir(parents=True)
            (path / "deep" / text).write_text(text)
        elif kind == "file":
            path.write_text(text)

    write(tmp_path / "name", before, "old")
    write(tmp_path / "aside", now, "new")
    put_in_place(tmp_path / "aside", tmp_path / "name")
    expected = ["name"] if now == "file" else ["name", "name/deep", "name/deep/new"]
    assert names(tmp_path) == expected
    assert (tmp_path / expected[-1]).read_text() == "new"
    remove(tmp_path / "name")
    remove(tmp_path / "name")
    assert names(tmp_path) == []


EVERY_DTYPE = [getattr(torch, name) for name in CODES]


def some_tensors():
    torch.manual_seed(0)
    tensors = {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "é": torch.ones(3)}
    for number, dtype in enumerate(EVERY_DTYPE):
        tensors[f"t{number}"] = torch.randint(0, 2, (3, 5 * dtype.itemsize)).byte().view(dtype)
    tensors["turned"] = torch.randn(4, 3).T
    return tensors


def test_tensors_one_by_one_are_the_library_s_file(tmp_path):
    tensors = some_tensors()
    save_tensors(tensors, tmp_path / "whole")
    layout = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
    with tensor_writer(tmp_path / "parts", order := in_file_order(layout)) as write:
        for name in order:
            write(tensors[name])
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_another_tensor_than_was_announced(tmp_path):
    layout = in_file_order({"a": torch.zeros(2), "b": torch.zeros(3)})
    with (
        pytest.raises(ValueError, match=r"^a of .* is torch.float32 \[3\]"),
        tensor_writer(tmp_path / "x", layout) as write,
    ):
        write(torch.zeros(3))
    with (
        pytest.raises(ValueError, match=r"^b of .* did not come$"),
        tensor_writer(tmp_path / "x", layout) as write,
    ):
        write(torch.zeros(2))
