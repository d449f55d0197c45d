import json
import shutil

import pytest

from rslightning.batch import IGNORED
from rslightning.data import Chat
from rslightning.data.build import BadRowError
from rslightning.data.chat import read_messages, read_tools
from rslightning.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (  # drops the answers of earlier turns, as templates that strip reasoning do
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if m.role != 'assistant' or loop.last else '' }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    ("system", "Be brief."),
    ("user", "How many cups?"),
    ("assistant", "Two."),
    ("user", "And hats?"),
    ("assistant", "None."),
]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def openai(turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def sharegpt(turns):
    return {"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in turns]}


def target_runs(data):
    """Return the texts of the first example that are targets."""
    runs, run = [], []
    for label in [*data.train[0].labels.tolist(), IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            runs, run = [*runs, data.tokenizer.decode(run)], []
    return runs


@pytest.fixture
def chat(tmp_path, model_folder):
    def make(rows, template=CHATML, **options):
        tokenizer = tmp_path / "tokenizer"
        shutil.copytree(model_folder, tokenizer, dirs_exist_ok=True)
        if template:
            (tokenizer / "chat_template.jinja").write_text(template)
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = Chat(str(path), str(tokenizer), held_out_examples=0, packing=False, **options)
        data.setup("fit")
        return data

    return make


def test_only_assistant_turns_are_targets(chat):
    data = chat([openai(TURNS)])
    block = data.train[0]
    whole = "".join(f"<|{role}|>{text}</s>\n" for role, text in TURNS)
    assert data.tokenizer.decode(block.input_ids) == whole.removesuffix("\n")
    assert target_runs(data) == ["Two.</s>", "None.</s>"]


UNENDED = (  # ends turns with a text that is no token of its own
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_without_the_end_token_is_warned_about(chat):
    with pytest.warns(
        UserWarning, match=r"does not end an answer with the tokenizer's end token '</s>'"
    ):
        data = chat([openai(TURNS)], template=UNENDED)
    block = data.train[0]
    written = [label for label in block.labels.tolist() if label != IGNORED]
    assert data.tokenizer.decode(written) == "Two.<|end|>None.<|end|>"


def test_ids_are_those_of_the_whole_dialogue(chat):
    data = chat([openai(TURNS)])
    whole = data.tokenizer.apply_chat_template(openai(TURNS)["messages"], tokenize=True)[
        "input_ids"
    ]
    assert data.tokenizer.decode(whole[-1]) == "\n"  # which no answer needs
    assert data.train[0].input_ids.tolist() == whole[:-1]


ENDED = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"  # asks with an end


def test_ids_are_those_of_the_whole_dialogue_where_the_prompt_ends_in_the_end_token(chat):
    data = chat([openai(TURNS)], template=ENDED)
    whole = data.tokenizer.apply_chat_template(openai(TURNS)["messages"], tokenize=True)
    assert data.train[0].input_ids.tolist() == whole["input_ids"]


def test_both_forms_are_the_same(chat):
    first = chat([openai(TURNS)]).train[0]
    second = chat([sharegpt(TURNS)]).train[0]
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.labels.tolist() == second.labels.tolist()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (openai([("wizard", "x"), ("assistant", "y")]), "turn 1 has the unknown role 'wizard'"),
        (openai([("user", "x"), ("assistant", " ")]), "turn 2 has no text in 'content'"),
        (openai([("user", "x")]), "there is no response to learn from"),
        ({"dialogue": []}, "there is no column 'messages' or 'conversations'"),
    ],
)
def test_a_dialogue_that_cannot_be_used_is_named_or_counted(chat, row, reason):
    with pytest.raises(UserError) as caught:
        chat([openai(TURNS), row])
    assert f"row 2: {reason}; mend it" in str(caught.value)
    data = chat([openai(TURNS), row], on_bad_row="skip")
    assert (len(data.train), data.counts["training"].rows_skipped) == (1, 1)


def test_a_tokenizer_without_template_is_named(chat):
    with pytest.raises(UserError, match="has no chat template; take that of an instruction-tuned"):
        chat([openai(TURNS)], template=None)


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_matters(chat):
    assert len(chat([openai(TURNS[:3])], template=FORGETFUL).train) == 1
    with pytest.raises(UserError, match="rewrites earlier turns"):
        chat([openai(TURNS)], template=FORGETFUL)


THINKING = CHATML.replace("<|assistant|>", "<|assistant|><think>\n")  # opens an answer with more


def test_an_answer_may_begin_with_what_the_template_opens_it_with(chat):
    thought = openai([("user", "How many?"), ("assistant", "<think>\nhm</think>Two.")])
    data = chat([thought, openai(TURNS[1:3])], template=THINKING, on_bad_row="skip")
    (block,) = data.train
    written = [label for label in block.labels.tolist() if label != IGNORED]
    assert data.tokenizer.decode(written) == "hm</think>Two.</s>"
    assert data.counts["training"].rows_skipped == 1


def test_an_answer_that_does_not_begin_as_the_template_opens_it_is_named(chat, tmp_path):
    with pytest.raises(UserError) as caught:
        chat([openai(TURNS[:3])], template=THINKING)
    opening = "<|assistant|><think>\n"
    assert str(caught.value) == (
        f"{tmp_path / 'rows.jsonl'}, row 1: the chat template of {tmp_path / 'tokenizer'} opens an "
        f"answer with {opening!r}, but does not begin turn 3 with it; mend it, or count such rows "
        "with data.on_bad_row: skip."
    )


def test_a_template_may_want_more_than_a_question_and_an_answer(chat):
    system_first = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    assert len(chat([openai(TURNS)], template=system_first + CHATML).train) == 1


WITH_TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content %}{{ m.content }}{% endif %}{% if 'tool_calls' in m %}"
    "{% for call in m.tool_calls %}<call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</call>{% endfor %}{% endif %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def with_call(arguments, tools=TOOLS):
    """Return a dialogue with a call, as a table holds it: every turn has every key."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Rain in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "No."},
    ]
    keys = ("tool_calls", "tool_call_id")
    return {"messages": [dict.fromkeys(keys) | turn for turn in turns], "tools": tools}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_tools_and_calls_are_what_the_template_makes_of_them(chat, tools, arguments):
    row = with_call(arguments, tools)
    data = chat([row], template=WITH_TOOLS)
    messages = [
        {key: value for key, value in turn.items() if value is not None or key == "content"}
        for turn in with_call({"city": "Paris"})["messages"]
    ]
    whole = data.tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=True)["input_ids"]
    assert data.train[0].input_ids.tolist() == whole[:-1]
    assert target_runs(data) == ['<call>weather {"city": "Paris"}</call></s>', "No.</s>"]
    assert data.tokenizer.decode(whole).startswith('tools: [{"type": "function", ')


@pytest.mark.parametrize(
    ("template", "tools", "lost"),
    [
        (CHATML, TOOLS, "the tools"),
        (CHATML, None, "the tool_calls of turn 2"),
        (WITH_TOOLS, TOOLS, "the thinking of turn 4"),
        (WITH_TOOLS.replace("messages %}", "messages if m.role != 'tool' %}"), TOOLS, "turn 3"),
    ],
)
def test_what_the_template_leaves_out_is_named(chat, template, tools, lost):
    row = with_call({"city": "Paris"}, tools)
    for turn in row["messages"]:
        turn["thinking"] = "It is sunny." if turn["content"] == "No." else ""
    with pytest.raises(UserError, match=rf"row 1: the chat template of \S+ leaves out {lost};"):
        chat([row], template=template)


def test_a_text_beside_a_call_that_the_template_leaves_out_is_named(chat):
    row = with_call({"city": "Paris"})
    row["messages"][1]["content"] = "I look."
    assert target_runs(chat([row], template=WITH_TOOLS))[0].startswith("I look.<call>")
    either = WITH_TOOLS.replace("{% if m.content %}", "{% if not m.tool_calls %}")
    with pytest.raises(UserError, match="leaves out the text beside the call of turn 2;"):
        chat([row], template=either)  # as that of Llama 3.1


def test_an_answer_of_weight_0_is_no_target(chat):
    row = openai(TURNS)
    for turn, weight in zip(row["messages"], [None, None, 0, None, 1], strict=True):
        turn["weight"] = weight
    data = chat([row])
    assert target_runs(data) == ["None.</s>"]
    ids = data.train[0].input_ids.tolist()
    assert ids == chat([openai(TURNS)]).train[0].input_ids.tolist()


def test_answers_of_weight_0_alone_are_no_row(chat):
    row = {"messages": [turn | {"weight": 0} for turn in openai(TURNS)["messages"]]}
    with pytest.raises(UserError, match="row 1: there is no response to learn from; mend it"):
        chat([row])


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "content": "x", "weight": 0.5}, "turn 1 has the weight 0.5, "),
        ({"role": ["user"], "content": "x"}, r"turn 1 has the unknown role \['user'\]"),
        ({"role": "assistant", "content": None}, "turn 1 has no text in 'content'"),
        ({"role": "user", "content": "", "tool_calls": [{"name": "f"}]}, "turn 1 has no text"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
            r"turn 1 has a call whose arguments are not JSON: '{'",
        ),
        ({"role": "assistant", "tool_calls": "f()"}, r"turn 1 has the tool_calls 'f\(\)', no list"),
        (
            {"role": "assistant", "content": ["x"], "tool_calls": [{"name": "f"}]},
            "turn 1 has no text",
        ),
        ("hello", "turn 1 is 'hello', not a role and a content"),
    ],
)
def test_a_turn_that_cannot_be_used_is_named(turn, reason):
    with pytest.raises(BadRowError, match=reason):
        read_messages({"messages": [turn]})


def test_turns_that_are_no_list_are_named():
    with pytest.raises(BadRowError, match="column 'conversations' is 'hello', not a list of turns"):
        read_messages({"conversations": "hello"})


@pytest.mark.parametrize("tools", ["weather", {"name": "weather"}, '"weather"'])
def test_tools_that_are_no_list_are_named(tools):
    with pytest.raises(BadRowError, match=r"column 'tools' is .*weather.*, not a list of tools"):
        read_tools({"tools": tools})
