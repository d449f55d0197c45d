"""Checkpoints in parts, against tensors that are cut and joined by torch."""

import os
import random

import pytest
import torch

from rslightning.checkpoint import read_checkpoint
from rslightning.errors import UserError
from rslightning.parts_checkpoint import open_parts, read_meta, write_part


def write(path, processes, tensors, meta=None):
    """Write `tensors` as `processes` would that FSDP2 has given their rows."""
    path.mkdir()
    chunks = {}
    for name, tensor in tensors.items():
        pieces = tensor.chunk(processes)
        chunks[name] = [*pieces, *[tensor[:0]] * (processes - len(pieces))]
    for rank in range(processes):
        write_part(path, rank, processes, {name: parts[rank] for name, parts in chunks.items()})
    torch.save({"global_step": 3} if meta is None else meta, path / "meta.pt")


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_come_back(tmp_path, seed):
    draw = random.Random(seed)
    sizes = {
        f"t{i}": (draw.randint(1, 9), *[draw.randint(1, 4)] * draw.randint(0, 2)) for i in "ab"
    }
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    write(tmp_path / "c", draw.randint(1, 5), tensors)
    with open_parts(tmp_path / "c") as parts:
        assert sorted(parts.names) == sorted(tensors)
        for name, tensor in tensors.items():
            assert parts.count(name) == len(tensor)
            for start in range(len(tensor) + 2):
                for stop in range(start, len(tensor) + 2):
                    assert torch.equal(parts.rows(name, start, stop), tensor[start:stop])


def test_the_weights_are_read_and_the_optimizer_is_not(tmp_path):
    whole = torch.randn(5, 3)
    tensors = {"state_dict.model.q.lora_a": whole, "optimizer.0.0.exp_avg": torch.zeros(5, 3)}
    write(tmp_path / "c", 2, tensors)
    content = read_checkpoint(tmp_path / "c")
    assert content["global_step"] == 3
    assert content["state_dict"].keys() == {"model.q.lora_a"}
    assert torch.equal(content["state_dict"]["model.q.lora_a"], whole)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("part-00001-of-00003.safetensors", "c holds 2 parts of 3: it was not written or copied"),
        ("meta.pt", "c lacks meta.pt: it was not written to the end."),
    ],
)
def test_what_is_incomplete_is_refused(tmp_path, missing, message):
    write(tmp_path / "c", 3, {"state_dict.w": torch.randn(4, 2)})
    (tmp_path / "c" / missing).unlink()
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "c")


def test_parts_of_two_runs_are_refused(tmp_path):
    write(tmp_path / "c", 2, {"state_dict.w": torch.randn(4, 2)})
    write_part(tmp_path / "c", 2, 3, {"state_dict.w": torch.randn(4, 2)})
    with pytest.raises(UserError, match="c holds 3 parts of 3: it was not"):
        read_checkpoint(tmp_path / "c")


def test_a_damaged_part_is_refused(tmp_path):
    write(tmp_path / "c", 2, {"state_dict.w": torch.randn(4, 2)})
    part = tmp_path / "c" / "part-00000-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"part-00000.* is damaged or incomplete"):
        read_checkpoint(tmp_path / "c")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_the_rest_does_not_run(tmp_path):
    write(tmp_path / "c", 1, {"state_dict.w": torch.randn(4, 2)}, {"x": Attack(tmp_path / "ran")})
    with pytest.raises(UserError, match=r"it holds (posix|os)\.mkdir, which could run code"):
        read_meta(tmp_path / "c")
    assert not (tmp_path / "ran").exists()
