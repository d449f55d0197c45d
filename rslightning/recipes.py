"""Recipes and fragments by name: those of the working folder first, then the packaged ones.

Standard library only, so that listing them is instant.
"""

import argparse
import difflib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rslightning.errors import UserError

KINDS: Final = ("recipes", "configs")


def packaged_root() -> Path:
    """Return the folder that holds `recipes/` and `configs/`: the package's, or the checkout's."""
    package = Path(__file__).parent
    return package if (package / "recipes").is_dir() else package.parent


def packaged_names() -> list[str]:
    """Return the packaged recipes and fragments, as `recipes/NAME.yaml` or `configs/...`."""
    root = packaged_root()
    return [
        path.relative_to(root).as_posix()
        for kind in KINDS
        for path in sorted((root / kind).rglob("*.yaml"))
    ]


def find_config(name: str) -> Path:
    """Return the file that `--config NAME` means.

    Args:
        name: A path; failing that, a packaged `recipes/quickstart.yaml`, or just `quickstart`.

    Raises:
        UserError: If there is no such file; the message names the nearest one.
    """
    if Path(name).is_file():
        return Path(name)
    names = packaged_names()
    for candidate in (name, f"recipes/{name}", f"recipes/{name}.yaml", f"{name}.yaml"):
        if candidate in names:
            return packaged_root() / candidate
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder; give the file of a configuration.")
    close = difflib.get_close_matches(name, [*names, *(Path(n).stem for n in names)], n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `rslightning recipes` lists them."
    raise UserError(f"There is no configuration {name}{hint}")


def run(arguments: argparse.Namespace) -> None:
    """Carry out `rslightning recipes [list | show NAME | copy NAME]`."""
    if arguments.action == "list":
        for name, purpose in _purposes():
            print(f"{name:<44} {purpose}")
        return
    if arguments.name is None:
        raise UserError(f"`recipes {arguments.action}` needs the name of a recipe.")
    path = find_config(arguments.name)
    if arguments.action == "show":
        print(path.read_text(encoding="utf-8"), end="")
        return
    target = Path(path.name)
    if target.exists():
        raise UserError(f"{target} exists here; remove it or copy in another folder.")
    shutil.copyfile(path, target)
    print(f"Copied to {target}; run it with: rslightning fit --config {target}")


def _purposes() -> Iterator[tuple[str, str]]:
    for name in packaged_names():
        first = (packaged_root() / name).read_text(encoding="utf-8").partition("\n")[0]
        yield name, first.removeprefix("#").strip()
