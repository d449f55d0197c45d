"""YAML files of plain values, and what is wrong with one, in one sentence."""

from pathlib import Path
from typing import Any

import yaml

from rslightning.errors import UserError


def read_plain_yaml(path: Path) -> Any:
    """Return what a YAML file holds: plain values only, no objects.

    Raises:
        UserError: If it is not YAML, with the place and the reason.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
        raise UserError(f"{path}{place} is not YAML: {error.problem}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
