import calendar
import hashlib
import json
import re

import pytest

from rslightning.assets import toy_world
from rslightning.assets.toy_world import OPPOSITES, SYSTEM_PROMPTS, instructions, main, stories

DAYS, MONTHS = list(calendar.day_name), list(calendar.month_name)[1:]
OPPOSITE = dict(pair.split("/") for pair in OPPOSITES)
OPPOSITE |= {other: word for word, other in OPPOSITE.items()}


def neighbour(order: str, word: str) -> str:
    cycle = DAYS if word in DAYS else MONTHS
    return cycle[(cycle.index(word) + (1 if order == "after" else -1)) % len(cycle)]


def computed(start: str, sign: str, change: str) -> int:
    return int(start) + int(change) * (1 if sign in ("plus", "gets") else -1)


def counted(start: str, end: str) -> str:
    first, last = int(start), int(end)
    step = 1 if last > first else -1
    return ", ".join(str(number) for number in range(first, last + step, step))


def solve_possession(question: str) -> str:
    owned = re.findall(r"(\w+) has a (\w+ \w+)\.", question)
    if asked := re.search(r"What does (\w+) have\?", question):
        return f"{asked[1]} has a {dict(owned)[asked[1]]}."
    thing = re.search(r"Who has the (\w+ \w+)\?", question)[1]
    return f"{({what: who for who, what in owned})[thing]} has the {thing}."


def solve_arithmetic(question: str) -> str:
    name, start, thing = re.match(r"(\w+) has (\d+) (\w+)\.", question).groups()
    verb, change = re.search(r"(gets|gives) (\d+)", question).groups()
    return f"Now {name} has {computed(start, verb, change)} {thing}."


def solve_opposites(question: str) -> str:
    if asked := re.fullmatch(r"What is the opposite of (\w+)\?", question):
        return f"The opposite of {asked[1]} is {OPPOSITE[asked[1]]}."
    word, name = re.match(r"\w+ says (\w+)\. (\w+) says the opposite\.", question).groups()
    return f"{name} says {OPPOSITE[word]}."


def solve_places(question: str) -> str:
    inside = dict(re.findall(r"The (\w+) is in the (\w+)\.", question))
    thing = re.search(r"In which room is the (\w+)\?", question)[1]
    return f"The {thing} is in the {inside[inside[thing]]}."


def solve_counting(question: str) -> str:
    down, start, end = re.search(r"(down )?from (\d+) to (\d+)", question).groups()
    assert (int(start) > int(end)) is bool(down)
    if question.startswith("Count "):
        return f"Counting {down or ''}from {start} to {end}: {counted(start, end)}."
    return f"{question.split()[0]} says {counted(start, end)}."


def solve_calendar(question: str) -> str:
    if asked := re.fullmatch(r"Which \w+ comes (\w+) (\w+)\?", question):
        return f"{neighbour(asked[1], asked[2])} comes {asked[1]} {asked[2]}."
    pattern = r"\w+ comes (on|in) (\w+)\. (\w+) comes the \w+ (after|before)\."
    preposition, start, name, order = re.match(pattern, question).groups()
    return f"{name} comes {preposition} {neighbour(order, start)}."


def solve_comparing(question: str) -> str:
    (upper, more, lower), other = re.findall(r"(\w+) is (\w+) than (\w+)\.", question)
    top, bottom = (upper, other[2]) if lower == other[0] else (other[0], lower)
    if "or" not in question.split():
        return f"{top} is the {more[:-2]}est."
    assert set(re.search(r"(\w+) or (\w+)\?", question).groups()) == {top, bottom}
    return f"{top} is {more} than {bottom}."


SOLVERS = {
    "possession": solve_possession,
    "arithmetic": solve_arithmetic,
    "opposites": solve_opposites,
    "places": solve_places,
    "counting": solve_counting,
    "calendar": solve_calendar,
    "comparing": solve_comparing,
}

# The words of a question that make its fact, for the families that have several wordings.
FACT_WORDS = {
    "arithmetic": lambda question: tuple(re.findall(r"\d+|gets|gives", question)),
    "counting": lambda question: tuple(re.findall(r"\d+", question)),
    "calendar": lambda question: frozenset(
        re.findall(r"after|before|\w+day|" + "|".join(MONTHS), question)
    ),
    "opposites": lambda question: frozenset(OPPOSITE.keys() & words(question)),
}


def family(row: dict[str, str]) -> str:
    return row["id"].split(".")[1]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+|\d+", text.lower()))


def sha256(items) -> str:
    return hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_what_a_reader_of_the_question_finds(held_out):
    rows = list(instructions(2000, 3, held_out))
    assert {family(row) for row in rows} == set(SOLVERS)
    for row in rows:
        answer = SOLVERS[family(row)](row["question"])
        given = row["response"].removeprefix(" ")
        assert given == answer or given.startswith(answer + " "), row


def test_a_reason_is_given_exactly_when_the_teacher_is_asked():
    for row in instructions(500, 0):
        sentences = row["response"].count(".")
        assert sentences == (2 if row["system_prompt"] == toy_world.REASON_PROMPT else 1), row


def test_opposites_name_every_word_once():
    assert len(OPPOSITES) == 24
    assert len(OPPOSITE) == 48


def test_rows_have_the_columns_of_openorca():
    rows = list(instructions(500, 0))
    assert {tuple(row) for row in rows} == {("id", "system_prompt", "question", "response")}
    assert {row["system_prompt"] for row in rows} == set(SYSTEM_PROMPTS)
    assert "" in SYSTEM_PROMPTS
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(re.fullmatch(r"toy\.[a-z]+\.\d+", row["id"]) for row in rows)


def test_held_out_questions_are_never_asked_in_training_whatever_the_seeds():
    training = {row["question"] for seed in range(8) for row in instructions(3000, seed)}
    held_out = {row["question"] for seed in range(8) for row in instructions(500, seed, True)}
    assert not training & held_out


def test_the_split_is_by_content_not_by_wording():
    """Other names, other things and other wordings around a held-out fact do not let it through."""

    def facts(name, held_out):
        rows = (row for row in instructions(4000, 1, held_out) if family(row) == name)
        return {FACT_WORDS[name](row["question"]) for row in rows}

    for name in FACT_WORDS:
        assert not facts(name, False) & facts(name, True), name


def test_about_a_tenth_of_the_facts_is_held_out():
    pairs = [("opposites", pair) for pair in OPPOSITES]
    sums = [("arithmetic", few, "plus", more) for few, more in toy_world.ADDENDS]
    for keys in (pairs, sums):
        assert 0.05 < sum(map(toy_world.is_held_out, keys)) / len(keys) < 0.15


def test_training_rows_are_almost_all_different():
    rows = [(row["system_prompt"], row["question"]) for row in instructions(2400, 0)]
    assert len(set(rows)) > 0.95 * len(rows)


def test_stories_are_plain_paragraphs_of_thirty_to_eighty_words():
    for story in stories(3000, 0):
        assert 30 <= len(story.split()) <= 80
        assert not re.search(r"\?|\n|  ", story)
        assert not words(story) & {"question", "answer"}


def test_stories_tell_the_truth():
    text = " ".join(stories(3000, 0))
    checks = [
        (r"(\d+) (plus|minus) (\d+) is (\d+)", computed),
        (r"opposite of (\w+) is (\w+)", OPPOSITE.get),
        (r"The (?:day|month) (after|before) (\w+) is (\w+)", neighbour),
        (r"Counting (?:down )?from (\d+) to (\d+): ([\d, ]+)\.", counted),
    ]
    for pattern, truth in checks:
        found = re.findall(pattern, text)
        assert len(found) > 50, pattern
        assert all(str(truth(*given)) == told for *given, told in found), pattern


def test_vocabulary_is_small():
    told = words(" ".join(stories(3000, 0)))
    asked = words(" ".join(" ".join([*row.values()][1:]) for row in instructions(3000, 0)))
    assert len(told | asked) < 250
    assert max(int(word) for word in told | asked if word.isdigit()) == 20


def test_the_first_rows_never_change():
    assert (
        sha256(instructions(100, 0))
        == "b92f8eaaa02a5c750eae4d7c017e5f084c911d88f3346e5a69b2f8ca9cdba731"
    )
    assert (
        sha256(instructions(100, 0, held_out=True))
        == "93c7a188f978f6d98c419e8c1abdff4abc3b4c1a0461df001cbad29a516d1932"
    )
    assert (
        sha256(stories(100, 0))
        == "e284c9439ab0f95f0625857a49d2b1ce9d7e6be5f12936c68bacc6e182f7f52b"
    )


def test_a_longer_run_starts_with_the_shorter_one():
    assert list(instructions(50, 4)) == list(instructions(80, 4))[:50]
    assert list(stories(50, 4)) == list(stories(80, 4))[:50]
    assert list(stories(50, 4)) != list(stories(50, 5))


def test_main_writes_four_files(tmp_path):
    counts = ["--stories-train=9", "--stories-heldout=4"]
    counts += ["--instructions-train=7", "--instructions-heldout=3"]
    main(["--output", str(tmp_path / "new"), "--seed=5", *counts])
    read = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new").iterdir()}
    rows = {
        name: [*map(json.loads, text.splitlines())] for name, text in read.items() if "json" in name
    }
    assert read["stories_train.txt"].splitlines() == list(stories(9, 5))
    assert read["stories_heldout.txt"].splitlines() == list(stories(4, 6))
    assert rows == {
        "instructions_train.jsonl": list(instructions(7, 5)),
        "instructions_heldout.jsonl": list(instructions(3, 6, held_out=True)),
    }
