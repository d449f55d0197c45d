"""Dialogues, through the tokenizer's own chat template, with the loss on assistant turns only."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, final

from lightning.pytorch.utilities import rank_zero_warn

from rslightning.data.base import TextDataModule
from rslightning.data.build import BadRowError
from rslightning.data.encode import Turns
from rslightning.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any] | None

COLUMNS: Final = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Column -> names of speaker and text: OpenAI's form and ShareGPT's."""

PROBE: Final = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
"""A dialogue that shows how a template ends an answer."""

BESIDE_CONTENT: Final = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Keys of what else an assistant writes in a turn; not every template knows each."""

CALLS: Final = BESIDE_CONTENT[:2]
"""Those of a turn that needs no content."""

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
    """Column `messages` (`role`, `content`) or `conversations` (`from`, `value`), perhaps `tools`.

    The template is given the turns with all their keys that are not null, and the tools (a list, or
    JSON text of one). Arguments of calls may be JSON text, as OpenAI has them: templates expect
    them decoded. A row is bad where the template leaves out tools, a call, the text beside one,
    reasoning or a turn of the role `tool`. An answer with `weight: 0` is context, no target.

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
        messages, tools = read_messages(row), read_tools(row)
        self._check_all_is_written(messages, tools)
        pairs, seen = [], ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            earlier = messages[:number]
            given = self._apply(earlier, tools, open_answer=True)
            whole = self._apply([*earlier, message], tools)
            if not (given.startswith(seen) and whole.startswith(given)):
                before = self._apply(earlier, tools)
                raise self._rewriting(number + 1, seen, before, given, whole)
            answer = _up_to_end(whole[len(given) :], self.tokenizer.eos_token)
            pairs.append((given[len(seen) :], answer))
            seen = given + answer
        return pairs

    def _check_all_is_written(self, messages: Messages, tools: Tools) -> None:
        """Raise `BadRowError` where the text is the same without a part of the dialogue."""
        if tools:
            self._check_written(messages, tools, messages, None, "the tools")
        for number, message in enumerate(messages):
            earlier = messages[:number]
            shown = [*earlier, message]
            if message["role"] == "tool":
                self._check_written(shown, tools, earlier, tools, f"turn {number + 1}")
            if any(map(message.get, CALLS)) and (message["content"] or "").strip():
                bare = {**message, "content": ""}
                part = f"the text beside the call of turn {number + 1}"
                self._check_written(shown, tools, [*earlier, bare], tools, part)
            for key in BESIDE_CONTENT:
                if message.get(key):
                    bare = {name: value for name, value in message.items() if name != key}
                    part = f"the {key} of turn {number + 1}"
                    self._check_written(shown, tools, [*earlier, bare], tools, part)

    def _check_written(
        self, messages: Messages, tools: Tools, fewer: Messages, fewer_tools: Tools, part: str
    ) -> None:
        text = self._apply(messages, tools)
        try:
            is_written = text != self._apply(fewer, fewer_tools)
        except BadRowError:  # the template needs it
            return
        if not is_written:
            raise BadRowError(f"the chat template of {self.tokenizer_name} leaves out {part}")

    def _rewriting(self, turn: int, seen: str, before: str, given: str, whole: str) -> BadRowError:
        """Return why an answer cannot be told from what stands before it."""
        if given.startswith(seen) and given.startswith(before) and whole.startswith(before):
            return BadRowError(
                f"the chat template of {self.tokenizer_name} opens an answer with "
                f"{given.removeprefix(before)!r}, but does not begin turn {turn} with it"
            )
        return BadRowError(
            f"the chat template of {self.tokenizer_name} rewrites earlier turns, so that "
            f"the answer of turn {turn} cannot be told from them"
        )

    def _apply(self, messages: Messages, tools: Tools = None, open_answer: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"The tokenizer of {self.tokenizer_name} has no chat template; take that of an "
                "instruction-tuned model, or data with prompt and response columns."
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=open_answer
            )
        except Exception as error:  # templates raise what they like
            raise BadRowError(f"the chat template refuses it: {error}") from None
        return text


def read_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a row in OpenAI's form, without the keys that a table fills with nulls.

    Raises:
        BadRowError: If the row has neither column, no turns, an unknown speaker, a turn without
            text (or, of an assistant, calls), a weight but 0 and 1, or calls that cannot be read.
    """
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise BadRowError(f"there is no column {' or '.join(map(repr, COLUMNS))}")
    if not isinstance(row[column], list):
        raise BadRowError(f"column {column!r} is {row[column]!r}, not a list of turns")
    return [
        _read_turn(turn, f"turn {n}", *COLUMNS[column]) for n, turn in enumerate(row[column], 1)
    ]


def _read_turn(turn: Any, name: str, speaker_key: str, text_key: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRowError(f"{name} is {turn!r}, not a {speaker_key} and a {text_key}")
    message = {key: value for key, value in turn.items() if value not in (None, [])}
    speaker, text = message.pop(speaker_key, None), message.pop(text_key, None)
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRowError(f"{name} has the unknown {speaker_key} {speaker!r}")
    has_calls = role == "assistant" and any(message.get(key) for key in CALLS)
    if not isinstance(text, str | None) or not (has_calls or (text and text.strip())):
        raise BadRowError(f"{name} has no text in {text_key!r}")
    if message.get("weight", 1) not in (0, 1):
        raise BadRowError(f"{name} has the weight {message['weight']!r}, which is not 0 or 1")
    if "tool_calls" in message:
        message["tool_calls"] = _read_calls(message["tool_calls"], name)
    return message | {"role": role, "content": text}


def _read_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Return calls with their arguments decoded; they stand in the call or in its `function`."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError(f"{name} has the tool_calls {calls!r}, no list of calls")
    read = []
    for call in calls:
        if isinstance(call.get("function"), Mapping):
            call = {**call, "function": _decode(call["function"], name)}
        read.append(_decode(call, name))
    return read


def _decode(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        return {**call, "arguments": json.loads(arguments)}
    except ValueError:
        raise BadRowError(
            f"{name} has a call whose arguments are not JSON: {arguments!r}"
        ) from None


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools of a row, or None.

    Raises:
        BadRowError: If they are neither a list nor JSON text of one.
    """
    tools = row.get("tools") or None
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = json.loads(tools)
    if tools is not None and not isinstance(tools, list):
        raise BadRowError(f"column 'tools' is {tools!r}, not a list of tools")
    return tools or None


def _up_to_end(answer: str, end: str | None) -> str:
    """Cut what a template writes after the end-of-turn token: the model never writes it."""
    if end and end in answer:
        return answer[: answer.rindex(end) + len(end)]
    return answer.rstrip()
