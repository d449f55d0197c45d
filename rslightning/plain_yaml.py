"""YAML files of plain values, and what is wrong with one, in one sentence."""

from pathlib import Path
from typing import Any

import yaml

from rslightning.errors import UserError


def read_plain_yaml(path: Path) -> Any:
    """Return what a YAML file holds: plain values only, no objects.

    Raises:
        UserError: If it is not YAML, with the place and the reason, or an alias is within what
            it names.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
        raise UserError(f"{path}{place} is not YAML: {error.problem}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if _holds_itself(content):
        raise UserError(f"{path} holds an alias within what it names, which has no end.")
    return content


def _holds_itself(value: Any, above: tuple[int, ...] = (), done: set[int] | None = None) -> bool:
    """Tell whether a value is within itself; what several aliases name is looked at once."""
    done = set() if done is None else done
    if not isinstance(value, dict | list) or id(value) in done:
        return id(value) in above
    done.add(id(value))
    inside = value.values() if isinstance(value, dict) else value
    return any(_holds_itself(each, (*above, id(value)), done) for each in inside)
