"""What jsonargparse says of a wrong configuration, in one sentence."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Final

BOILERPLATE: Final = re.compile(
    r"[\s-]*(Does not validate|Subtypes:|Errors:|Given value|Parser key|Problem with given"
    r"|Expected a <class 'NoneType'>)"
)


def explain(message: str, known_keys: Iterable[str]) -> str:
    """Reduce an error of jsonargparse to one sentence, with the nearest key where one is wrong.

    Args:
        message: The parser's text, of several lines.
        known_keys: Every key that can be meant.
    """
    wrong = _wrong_key(message)
    if wrong is not None:
        close = _nearest_key(wrong, list(known_keys))
        if close and wrong.startswith(f"{close}."):
            return f"There is no option {wrong}: what {close} names does not take it."
        hint = f"; did you mean {close}?" if close else "; see rslightning fit --help."
        return f"There is no option {wrong}{hint}"
    if found := re.search(r"Expected a path but ([\w.]+) either not accessible", message):
        keys = re.findall(r'Parser key "([^"]+)"', message)
        where = f"{'.'.join(keys)}: " if keys else ""
        if found[1].lower() in ("nan", "inf"):
            return f"{where}Expected a finite number. Got value: {found[1]}"
        return f"{where}There is no class {found[1]} that can be imported"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    reasons = dict.fromkeys(_plainly(line) for line in lines if not BOILERPLATE.match(line))
    reason = _join(list(reasons)) or message
    given = re.search(r"^\s*Given value: ([^{(\[\n]{1,60})$", message, re.MULTILINE)
    if given and "got " not in reason.lower():
        reason += f"; got {given[1]}"
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    return f"{key}: {reason}" if key and key not in reason else reason


def _join(reasons: Sequence[str]) -> str:
    """Return the reasons as one; what a value could have been instead is a choice."""
    wanted = [
        reason.removeprefix("Expected ") for reason in reasons if reason.startswith("Expected ")
    ]
    if len(wanted) < len(reasons):
        return "; ".join(reasons)
    if len(wanted) > 1:  # what was given is told once, after all that it could be
        parts = [reason.partition(". Got value: ") for reason in wanted]
        given = next((f"; got {value}" for *_, value in parts if value), "")
        return f"Expected {' or '.join(choice for choice, *_ in parts)}{given}"
    return f"Expected {' or '.join(wanted)}" if wanted else ""


def _plainly(line: str) -> str:
    """Say a type as its name, and a choice as its values."""
    line = re.sub(r"(a )?<class '(?:\w+\.)*(\w+)'>", r"\2", line)
    line = re.sub(r"(a )?typing\.Literal\[('[^']*')\]", r"\2", line)
    line = re.sub(r"(a )?typing\.Literal\[(.*?)\]", r"one of \2", line)
    return line.removesuffix(".")


def _nearest_key(wrong: str, keys: Sequence[str]) -> str | None:
    """Return the key that was probably meant: of the same last segment, else of a like spelling."""
    last = wrong.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    close = difflib.get_close_matches(wrong, same, n=1, cutoff=0.0)
    close = close or difflib.get_close_matches(wrong, keys, n=1, cutoff=0.5)
    return close[0] if close else None


def _wrong_key(message: str) -> str | None:
    """Return the option that an error calls unknown, as far as the error names its group."""
    if found := re.search(r"unrecognized arguments: --?([\w.+]+)", message):
        return found[1]
    if found := re.search(r"Option '([\w.]+)' is not accepted before subcommand", message):
        return None
    option = re.search(r"[Oo]ption '([\w.]+)'(?: is not accepted)?", message)
    if option is None:
        return None
    group = re.search(r"Group '([\w.]+)'", message)
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    prefix = group[1] if group else ".".join(keys)
    return f"{prefix}.{option[1]}" if prefix else option[1]
