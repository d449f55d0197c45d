import json
import zipfile
from contextlib import suppress

import pytest
import torch

from rslightning.manifest import find_damage, write_manifest


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"abc" * 1000)
    (folder / "deep" / "b.txt").write_text("text")
    write_manifest(folder)
    return folder


def test_a_manifest_has_sizes_and_the_checksums_of_zlib(folder):
    import zlib

    assert json.loads((folder / "manifest.json").read_text()) == {
        "files": {
            "a.bin": {"bytes": 3000, "crc32": zlib.crc32(b"abc" * 1000)},
            "deep/b.txt": {"bytes": 4, "crc32": zlib.crc32(b"text")},
        }
    }
    assert find_damage(folder) is None


def test_every_kind_of_damage_is_named(folder):
    (folder / "a.bin").write_bytes(b"abd" * 1000)
    assert find_damage(folder) == "a.bin has other bytes than were written"
    assert find_damage(folder, contents=False) is None
    assert find_damage(folder, ".txt") is None
    (folder / "a.bin").write_bytes(b"abc" * 999)
    assert find_damage(folder, contents=False) == (
        "a.bin has 2,997 bytes and was written with 3,000"
    )
    (folder / "a.bin").unlink()
    assert find_damage(folder, contents=False) == "a.bin is missing"


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a.bin": 3}}', '{"files": 1}', "{"])
def test_a_damaged_manifest_is_damage(folder, text):
    (folder / "manifest.json").write_text(text)
    assert find_damage(folder) == "manifest.json cannot be read"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "deep/../../outside"])
def test_nothing_outside_of_the_folder_is_read(folder, name):
    (folder.parent / "outside").write_text("")
    content = {"files": {name: {"bytes": 0, "crc32": 0}}}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert find_damage(folder) == f"manifest.json names {name}, which is outside of the folder"


def test_a_folder_of_another_program_has_nothing_wrong(tmp_path):
    (tmp_path / "file").write_text("text")
    assert find_damage(tmp_path) is None


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "step-1.ckpt"
    torch.manual_seed(0)
    torch.save({"weights": torch.randn(50, 3), "text": "x" * 100}, path)
    return path


def test_a_checkpoint_that_is_cut_anywhere_is_found(checkpoint):
    whole = checkpoint.read_bytes()
    assert find_damage(checkpoint) is None
    assert find_damage(checkpoint, contents=False) is None
    for length in range(0, len(whole), 7):
        checkpoint.write_bytes(whole[:length])
        assert find_damage(checkpoint) == "it ends too early, or its directory is damaged", length


def test_a_changed_byte_changes_no_tensor_unseen(checkpoint):
    """Some bytes are padding, or say what zipfile does not read and torch refuses."""
    whole, content = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    found = 0
    for position in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[position] ^= 0x55
        checkpoint.write_bytes(changed)
        if find_damage(checkpoint) is not None:
            found += 1
            continue
        with suppress(RuntimeError):
            loaded = torch.load(checkpoint, weights_only=True)
            assert torch.equal(loaded["weights"], content["weights"]), position
            assert loaded["text"] == content["text"]
    assert found > len(whole) / 10


def test_an_entry_that_became_a_folder(checkpoint):
    """Then torch reads nothing, says nothing, and returns whatever the memory held before."""
    whole = checkpoint.read_bytes()
    name = b"step-1/data/0"
    in_directory = whole.rindex(name) - zipfile.sizeCentralDir
    checkpoint.write_bytes(whole[: in_directory + 38] + b"\x10" + whole[in_directory + 39 :])
    assert find_damage(checkpoint) == f"its entry {name.decode()} is marked as a folder"


def test_the_entry_that_is_damaged_is_named(checkpoint):
    whole = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        data = archive.read(name)
    checkpoint.write_bytes(whole.replace(data, data[::-1]))
    assert find_damage(checkpoint) == f"its entry {name} has other bytes than were written"
