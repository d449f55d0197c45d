"""Alpaca: instructions with an optional input (tatsu-lab/alpaca and data in its columns)."""

from collections.abc import Mapping
from typing import Any, final

from rslightning.data.base import TextDataModule
from rslightning.data.encode import Turns


@final
class Alpaca(TextDataModule):
    """Columns `instruction`, `input` (may be empty), `output`."""

    columns = ("instruction", "input", "output")
    optional_columns = ("input",)

    def render(self, row: Mapping[str, Any]) -> Turns:
        """Set the input below the instruction, where there is one."""
        given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
        prompt = f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n"
        return [(prompt, row["output"])]
