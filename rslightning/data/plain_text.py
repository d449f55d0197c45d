"""Plain text, one document per row: causal loss on everything."""

from collections.abc import Mapping
from typing import Any, Literal, final

from rslightning.data.base import TextDataModule
from rslightning.data.encode import Turns


@final
class PlainText(TextDataModule):
    """Column `text`; blank lines of a text file are no rows.

    Args:
        document: What one row of a text file is: a `line`, or a `paragraph` between blank lines.
        options: Arguments of `TextDataModule`.
    """

    columns = ("text",)
    settings = ("text_unit",)

    def __init__(
        self, *args: Any, document: Literal["line", "paragraph"] = "line", **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.text_unit = document

    def render(self, row: Mapping[str, Any]) -> Turns:
        """Everything is what the model must write."""
        return [("", row["text"])]
