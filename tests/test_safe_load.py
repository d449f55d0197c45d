import collections
import re
from pathlib import Path

import pytest
import torch

from rslightning.errors import UserError
from rslightning.safe_load import StandIn, load_plain


def saved(path, content):
    torch.save(content, path)
    return path


def test_tensors_and_plain_values(tmp_path):
    content = {"a": torch.arange(6).view(2, 3), "b": [1, 2.5, None, "x"]}
    opened = load_plain(saved(tmp_path / "x.pt", content))
    assert torch.equal(opened.pop("a"), content.pop("a"))
    assert opened == content


def test_a_part_of_a_file(tmp_path):
    content = saved(tmp_path / "x.pt", torch.arange(5)).read_bytes()
    assert torch.equal(load_plain(Path("named in errors"), part=content), torch.arange(5))
    with pytest.raises(UserError, match=r"^x\.distcp is damaged, incomplete or no checkpoint\.$"):
        load_plain(Path("x.distcp"), part=content[:-1])


class Fragile:
    """An object with a state; its class is refused unless something stands in for it."""

    def __init__(self):
        self.place = "here"

    def __setstate__(self, state):
        raise AssertionError("the class itself was used")


def test_a_class_that_is_stood_in_for(tmp_path):
    path = saved(tmp_path / "x.pt", {"object": Fragile(), "tensor": torch.ones(2)})
    name = f"{__name__}.Fragile"
    message = f"{path} cannot be opened: it holds {name}, which could run code."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_plain(path)
    opened = load_plain(path, [name])
    assert type(opened["object"]) is StandIn
    assert opened["object"].place == "here"
    with pytest.raises(UserError):  # no longer than the call
        load_plain(path)


def test_other_classes_stay_refused(tmp_path):
    path = saved(tmp_path / "x.pt", [Fragile(), collections.deque()])
    with pytest.raises(UserError, match=r"it holds collections\.deque, which could run code\.$"):
        load_plain(path, [f"{__name__}.Fragile"])
