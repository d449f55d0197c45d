"""GSM8K: grade-school mathematics with worked solutions (openai/gsm8k)."""

from collections.abc import Mapping
from typing import Any, final

from rslightning.data.base import TextDataModule
from rslightning.data.encode import Turns


@final
class GSM8K(TextDataModule):
    """Columns `question`, `answer`; the answer ends in `#### <number>`."""

    columns = ("question", "answer")
    subset = "main"

    def render(self, row: Mapping[str, Any]) -> Turns:
        """Set the answer on lines of its own, so that every tokenizer starts it alike."""
        return [(f"Question: {row['question']}\nAnswer:\n", row["answer"])]
