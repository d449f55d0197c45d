"""Dialogues, through the tokenizer's own chat template, with the loss on assistant turns only."""

from collections.abc import Mapping
from typing import Any, Final, final

from lightning.pytorch.utilities import rank_zero_warn

from rslightning.data.base import TextDataModule
from rslightning.data.build import BadRowError
from rslightning.data.encode import Turns
from rslightning.errors import UserError

COLUMNS: Final = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Column -> names of speaker and text: OpenAI's form and ShareGPT's."""

PROBE: Final = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
"""A dialogue that shows how a template ends an answer."""

ROLES: Final = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}


@final
class Chat(TextDataModule):
    """Column `messages` (`role`, `content`) or `conversations` (`from`, `value`).

    The template is applied to the turns up to each answer and to those with the answer; what the
    latter adds is what the model must write, its end-of-turn token included. A warning tells where
    that is not the tokenizer's end-of-sequence token, at which generation stops.

    Raises:
        UserError: If the tokenizer has no chat template.
    """

    columns = ()
    templated = True

    def setup(self, stage: str) -> None:
        """Open the caches, and look at how the template ends an answer."""
        super().setup(stage)
        try:
            whole = self._apply(PROBE)
        except BadRowError:  # it wants another kind of dialogue, as a system turn before all
            return
        end = self.tokenizer.eos_token
        if end and end not in whole.rpartition(PROBE[-1]["content"])[2]:
            rank_zero_warn(
                f"The chat template of {self.tokenizer_name} does not end an answer with the "
                f"tokenizer's end token {end!r}: generation needs another sign to stop at; see "
                "eos_token in tokenizer_config.json."
            )

    def render(self, row: Mapping[str, Any]) -> Turns:
        """Return one pair per assistant turn."""
        messages = read_messages(row)
        pairs, seen = [], ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            given = self._apply(messages[:number], open_answer=True)
            whole = self._apply(messages[: number + 1])
            if not (given.startswith(seen) and whole.startswith(given)):
                raise self._rewriting(messages[:number], seen, given, whole)
            answer = _up_to_end(whole[len(given) :], self.tokenizer.eos_token)
            pairs.append((given[len(seen) :], answer))
            seen = given + answer
        return pairs

    def _rewriting(
        self, earlier: list[dict[str, str]], seen: str, given: str, whole: str
    ) -> BadRowError:
        """Return why an answer cannot be told from what stands before it."""
        before = self._apply(earlier)
        if given.startswith(seen) and given.startswith(before) and whole.startswith(before):
            return BadRowError(
                f"the chat template of {self.tokenizer_name} opens an answer with "
                f"{given.removeprefix(before)!r}, but does not begin turn {len(earlier) + 1} with "
                "it"
            )
        return BadRowError(
            f"the chat template of {self.tokenizer_name} rewrites earlier turns, so that "
            f"the answer of turn {len(earlier) + 1} cannot be told from them"
        )

    def _apply(self, messages: list[dict[str, str]], open_answer: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"The tokenizer of {self.tokenizer_name} has no chat template; take that of an "
                "instruction-tuned model, or data with prompt and response columns."
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_answer
            )
        except Exception as error:  # templates raise what they like
            raise BadRowError(f"the chat template refuses it: {error}") from None
        return text


def read_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the turns of a row in OpenAI's form.

    Raises:
        BadRowError: If the row has neither column, no turns, an unknown speaker or a turn without
            text.
    """
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise BadRowError(f"there is no column {' or '.join(map(repr, COLUMNS))}")
    speaker_key, text_key = COLUMNS[column]
    messages = []
    for number, turn in enumerate(row[column], 1):
        speaker, text = turn.get(speaker_key), turn.get(text_key)
        if speaker not in ROLES:
            raise BadRowError(f"turn {number} has the unknown {speaker_key} {speaker!r}")
        if not isinstance(text, str) or not text.strip():
            raise BadRowError(f"turn {number} has no text in {text_key!r}")
        messages.append({"role": ROLES[speaker], "content": text})
    return messages


def _up_to_end(answer: str, end: str | None) -> str:
    """Cut what a template writes after the end-of-turn token: the model never writes it."""
    if end and end in answer:
        return answer[: answer.rindex(end) + len(end)]
    return answer.rstrip()
