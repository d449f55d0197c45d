"""Any table of prompts and responses, its columns named in the configuration."""

from collections.abc import Mapping
from typing import Any, final

from rslightning.data.base import TextDataModule
from rslightning.data.encode import Turns


@final
class JSONL(TextDataModule):
    """Two text columns of JSON lines, Parquet or CSV; the prompt is given as it stands.

    Args:
        prompt_column: What the model is given.
        response_column: What the model must write.
        options: Arguments of `TextDataModule`.
    """

    settings = ("prompt_column", "response_column")

    def __init__(
        self,
        *args: Any,
        prompt_column: str = "prompt",
        response_column: str = "response",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.prompt_column, self.response_column = prompt_column, response_column
        self.columns = (prompt_column, response_column)

    def render(self, row: Mapping[str, Any]) -> Turns:
        """Take both texts as they are."""
        return [(row[self.prompt_column], row[self.response_column])]
