"""Plain text, one document per row: causal loss on everything."""

from collections.abc import Mapping
from typing import Any, final

from rslightning.data.base import TextDataModule
from rslightning.data.encode import Turns


@final
class PlainText(TextDataModule):
    """Column `text`; a text file has one row per line."""

    columns = ("text",)

    def render(self, row: Mapping[str, Any]) -> Turns:
        """Everything is what the model must write."""
        return [("", row["text"])]
