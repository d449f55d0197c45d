"""A DataModule whose code changes is another one; another that is the same is not."""

import importlib
import os
import subprocess
import sys

import pytest

from rslightning.data import OpenOrca, TextDataModule
from rslightning.data.template import template_source

HELPER = "MARK = '!'\n\ndef ended(text):\n    return text + MARK\n"
MODULE = '''
import re

from rslightning.data import TextDataModule
from helper_of_template import ended

TEMPLATE = "Q: {}"
WORDS = {"one", "two", "three", "four"}
LISTED = {"a": [1, ("b",)]}
SPACES = re.compile(" +")
UNUSED = "unused"


def used(text):
    return deeper(text)


def deeper(text):
    return text.strip()


class Helper:
    def opened(self, text):
        return "(" + text


class Base(TextDataModule):
    columns = ("text",)

    def render(self, row):
        text = Helper().opened(used(SPACES.sub(" ", row["text"])))
        return [("", self.shown([t for t in [text] if TEMPLATE and t not in WORDS and LISTED][0]))]

    @staticmethod
    def shown(text):
        return ended(text)


class Leaf(Base):
    """Nothing of its own."""
'''


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Return the function that gives the texts of `Leaf` with a replacement in the modules."""
    monkeypatch.syspath_prepend(tmp_path)

    def read(old="", new="", interpreted=False):
        (tmp_path / "helper_of_template.py").write_text(HELPER.replace(old, new) if old else HELPER)
        module = MODULE.replace(old, new) if old else MODULE
        assert not old or old in MODULE + HELPER
        for name in ("helper_of_template", "module_of_template"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        if interpreted:
            space = {"__name__": "interpreted"}
            exec(module, space)  # as what is typed has no source
            return template_source(space["Leaf"], TextDataModule)
        (tmp_path / "module_of_template.py").write_text(module)
        return template_source(importlib.import_module("module_of_template").Leaf, TextDataModule)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield read
    for name in ("helper_of_template", "module_of_template"):
        sys.modules.pop(name, None)


CHANGES = {
    "inherited": ('("", self', '("?", self'),
    "column": ('("text",)', '("text", "more")'),
    "constant": ("Q: {}", "Question: {}"),
    "set": ('"three"', '"drei"'),
    "nested": ('("b",)', '("c",)'),
    "pattern": ('" +"', '"  +"'),
    "function": ("deeper(text)\n", 'deeper(text + "")\n'),
    "function of a function": ("strip()", "lstrip()"),
    "class": ('"("', '"["'),
    "static method": ("ended(text)\n\n\n", "ended(text[1:])\n\n\n"),
    "other module": ("text + MARK", "MARK + text"),
    "value of another module": ("'!'", "'.'"),
}


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_rendered_from_is_seen(source, change, interpreted):
    before = source(interpreted=interpreted)
    assert source(*CHANGES[change], interpreted=interpreted) != before
    assert source(interpreted=interpreted) == before


def test_what_is_not_used_is_not_seen(source):
    assert source('UNUSED = "unused"', 'UNUSED = "changed"') == source()


@pytest.mark.parametrize("packages", ["site-packages", "dist-packages"])
def test_packages_of_a_user_or_a_system_are_installed_too(source, tmp_path, monkeypatch, packages):
    folder = tmp_path / ".local" / packages
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(folder)
    source()
    (tmp_path / "helper_of_template.py").rename(folder / "helper_of_template.py")
    sys.modules.pop("helper_of_template")
    sys.modules.pop("module_of_template")
    importlib.invalidate_caches()
    texts = template_source(importlib.import_module("module_of_template").Leaf, TextDataModule)
    assert not any("def ended" in text or "MARK" in text for text in texts)
    assert any("def used" in text for text in texts)


def test_texts_do_not_depend_on_the_process(source, tmp_path):
    expected = source()
    code = (
        "from module_of_template import Leaf; from rslightning.data import TextDataModule;"
        "from rslightning.data.template import template_source;"
        "print(template_source(Leaf, TextDataModule))"
    )
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
        printed = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert printed.stdout == f"{expected}\n", printed.stderr


def test_a_module_of_ours_has_its_own_class_and_no_base():
    (text,) = template_source(OpenOrca, TextDataModule)
    assert text.startswith("@final\nclass OpenOrca(TextDataModule):")
