"""Keep secrets out of what is written and said: configurations, events, reports, errors."""

import os
import re
from collections.abc import Mapping
from typing import Any, Final

HIDDEN: Final = "<hidden>"

SECRET_NAME: Final = re.compile(
    r"(?:^|_)(?:token|secret|password|passwd|api_?key|access_?key|credentials?)s?(?:$|_)",
    re.IGNORECASE,
)
"""How variables and keys are called that hold one."""

SECRET_TEXT: Final = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}\b"  # Hugging Face
    r"|\b(?:sk|ghp|gho|github_pat|glpat|xox[bp])[-_][A-Za-z0-9_-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"  # a user and a password in an address
)

SHORTEST: Final = 8
"""Values of fewer characters are not looked for: too much else would match."""


def redact(text: str) -> str:
    """Return a text without the secrets of this process's environment, nor what looks like one."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return SECRET_TEXT.sub(HIDDEN, text)


def redact_values(values: Any, name: str = "") -> Any:
    """Return mappings, lists and texts in which no value is a secret, by its name or its looks."""
    if isinstance(values, Mapping):
        return {key: redact_values(value, str(key)) for key, value in values.items()}
    if isinstance(values, list):
        return [redact_values(value, name) for value in values]
    if not isinstance(values, str):
        return values
    return HIDDEN if SECRET_NAME.search(name) and values else redact(values)
