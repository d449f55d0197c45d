"""The ranges of pyproject.toml hold the pinned versions, and none that is known for harm."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
    if not text.startswith("rslightning[")
]
PINNED = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
HARMFUL = {
    "torch": ["2.5.1", "2.9.1"],
    "transformers": ["5.2.0", "4.57.0"],
    "lightning": ["2.6.2", "2.6.3", "2.6.5"],
    "datasets": ["3.6.0"],
}


@pytest.mark.parametrize("name", HARMFUL)
def test_versions_of_which_harm_is_known_are_left_out(name):
    (requirement,) = [r for r in REQUIREMENTS if r.name == name]
    assert not [version for version in HARMFUL[name] if version in requirement.specifier]


def test_what_is_pinned_is_within_the_ranges():
    pins = [(canonicalize_name(pin.name), pin) for pin in PINNED]
    for requirement in REQUIREMENTS:
        versions = [
            re.fullmatch(r"==(.+)", str(pin.specifier))[1]
            for name, pin in pins
            if name == canonicalize_name(requirement.name)
        ]
        assert versions, f"{requirement.name} is not pinned"
        assert all(version in requirement.specifier for version in versions), requirement
