"""OpenOrca: instructions with system prompts, answered by GPT models (Open-Orca/OpenOrca)."""

from collections.abc import Mapping
from typing import Any, final

from rslightning.data.base import TextDataModule
from rslightning.data.encode import Turns


@final
class OpenOrca(TextDataModule):
    """Columns `id`, `system_prompt` (may be empty), `question`, `response`."""

    columns = ("system_prompt", "question", "response")
    optional_columns = ("system_prompt",)

    def render(self, row: Mapping[str, Any]) -> Turns:
        """Set the system prompt above the question, where there is one."""
        system = f"{row['system_prompt']}\n\n" if row["system_prompt"] else ""
        return [(f"{system}### Question:\n{row['question']}\n\n### Answer:\n", row["response"])]
