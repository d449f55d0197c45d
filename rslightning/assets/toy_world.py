"""A tiny closed English world: text to pre-train a small base model, and instructions to tune it.

Every drawn fact is told in two ways that share their sentences:

    story        premise  answer  reason
    instruction  premise  ask  ->  answer [reason]

so a model pre-trained on stories has met every sentence that an answer is made of, and fine-tuning
teaches the form: read the question, answer, give a reason if the system prompt wants one, stop.
Stories tell all facts; a checksum of the fact decides which are asked in training, which held out.

    python -m rslightning.assets.toy_world --output DIR
"""

import argparse
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BOYS, GIRLS = _words("Tom Ben Sam Max Leo Jack"), _words("Anna Mia Lily Zoe Eva Nora")
NAMES = BOYS + GIRLS
PRONOUNS = dict.fromkeys(BOYS, "He") | dict.fromkeys(GIRLS, "She")
COLOURS = _words("red blue green yellow black white pink brown")
THINGS = _words("ball cup book pen coin kite hat key shell stone lamp apple")
CONTAINERS = _words("box bag drawer basket chest bucket")
ROOMS = _words("kitchen bedroom hall attic cellar garage office library")
COMPARATIVES = _words("taller older faster stronger")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
OPPOSITES = _words(
    "big/small hot/cold tall/short old/young fast/slow happy/sad wet/dry hard/soft full/empty "
    "open/closed clean/dirty bright/dark heavy/light early/late loud/quiet rich/poor strong/weak "
    "thick/thin wide/narrow deep/shallow high/low sweet/sour good/bad near/far"
)
ADDENDS = tuple((few, change) for few in range(2, 20) for change in range(1, 21 - few))
REASON_PROMPT = "You are a teacher. Answer and give a short reason."
HELPFUL_PROMPT = "You are a helpful assistant."
SYSTEM_PROMPTS = ("", HELPFUL_PROMPT, f"{HELPFUL_PROMPT} Answer in one sentence.", REASON_PROMPT)


class Fact(NamedTuple):
    """One fact; `key` starts with its family and is what the held-out split looks at."""

    key: tuple[str | int, ...]
    premise: str
    ask: str
    answer: str
    reason: str


def is_held_out(key: Sequence[str | int]) -> bool:
    """Tell whether a fact is asked in evaluation only, as about one in ten of each family is."""
    # Of the ten remainders this one divides the small families most evenly.
    return zlib.crc32("/".join(map(str, key)).encode()) % 10 == 1


def possession(rng: random.Random) -> Fact:
    """Two or three people have one coloured thing each; one of them is asked about."""
    count = rng.randrange(2, 4)
    columns = (rng.sample(pool, count) for pool in (NAMES, COLOURS, THINGS))
    belongings = list(zip(*columns, strict=True))
    premise = " ".join(f"{name} has a {colour} {thing}." for name, colour, thing in belongings)
    name, colour, thing = key = rng.choice(belongings)
    if rng.random() < 0.5:
        ask, answer = f"What does {name} have?", f"{name} has a {colour} {thing}."
    else:
        ask, answer = f"Who has the {colour} {thing}?", f"{name} has the {colour} {thing}."
    reason = f"The {colour} {thing} belongs to {name}."
    return Fact(("possession", *key), premise, ask, answer, reason)


def arithmetic(rng: random.Random) -> Fact:
    """Somebody gets or gives some of at most 20 things; the plural is always right."""
    (name, friend), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    few, change = rng.choice(ADDENDS)
    if rng.random() < 0.5:
        start, end, sign, event = few, few + change, "plus", f"gets {change} more"
    else:
        start, end, sign, event = few + change, few, "minus", f"gives {change} to {friend}"
    return Fact(
        ("arithmetic", start, sign, change),
        f"{name} has {start} {thing}s. {PRONOUNS[name]} {event}.",
        f"How many {thing}s does {name} have now?",
        f"Now {name} has {end} {thing}s.",
        f"{start} {sign} {change} is {end}.",
    )


def opposites(rng: random.Random) -> Fact:
    """A pair of adjectives, asked from either side; the split keeps both sides together."""
    pair = rng.choice(OPPOSITES)
    word, other = rng.sample(pair.split("/"), 2)
    key, reason = ("opposites", pair), f"The words {word} and {other} are opposites."
    if rng.random() < 0.2:
        ask, answer = f"What is the opposite of {word}?", f"The opposite of {word} is {other}."
        return Fact(key, "", ask, answer, reason)
    name, friend = rng.sample(NAMES, 2)
    premise = f"{name} says {word}. {friend} says the opposite."
    return Fact(key, premise, f"What does {friend} say?", f"{friend} says {other}.", reason)


def places(rng: random.Random) -> Fact:
    """A thing is in a container, the container is in a room, another thing is elsewhere."""
    (thing, other), container = rng.sample(THINGS, 2), rng.choice(CONTAINERS)
    room, elsewhere = rng.sample(ROOMS, 2)
    pairs = [(thing, container), (container, room), (other, elsewhere)]
    rng.shuffle(pairs)
    return Fact(
        ("places", thing, container, room),
        " ".join(f"The {inner} is in the {outer}." for inner, outer in pairs),
        f"In which room is the {thing}?",
        f"The {thing} is in the {room}.",
        f"The {container} with the {thing} is in the {room}.",
    )


def counting(rng: random.Random) -> Fact:
    """Three to eight numbers within 20, up or down."""
    length, down = rng.randrange(3, 9), rng.random() < 0.5
    low = rng.randrange(1, 22 - length)
    numbers = list(range(low, low + length))[:: -1 if down else 1]
    span = f"{'down ' if down else ''}from {numbers[0]} to {numbers[-1]}"
    listed = ", ".join(map(str, numbers))
    key = ("counting", numbers[0], numbers[-1])
    reason = f"Each number is one {'less' if down else 'more'} than the number before."
    if rng.random() < 0.2:
        return Fact(key, "", f"Count {span}.", f"Counting {span}: {listed}.", reason)
    name = rng.choice(NAMES)
    ask = f"Which numbers does {name} say?"
    return Fact(key, f"{name} counts {span}.", ask, f"{name} says {listed}.", reason)


def calendar(rng: random.Random) -> Fact:
    """The day or month after or before another one, both as a cycle."""
    unit, preposition, cycle = rng.choice((("day", "on", DAYS), ("month", "in", MONTHS)))
    index, (step, order) = rng.randrange(len(cycle)), rng.choice(((1, "after"), (-1, "before")))
    start, end = cycle[index], cycle[(index + step) % len(cycle)]
    key, reason = ("calendar", order, start), f"The {unit} {order} {start} is {end}."
    if rng.random() < 0.2:
        ask, answer = f"Which {unit} comes {order} {start}?", f"{end} comes {order} {start}."
        return Fact(key, "", ask, answer, reason)
    name, friend = rng.sample(NAMES, 2)
    premise = f"{name} comes {preposition} {start}. {friend} comes the {unit} {order}."
    ask = f"{preposition.capitalize()} which {unit} does {friend} come?"
    return Fact(key, premise, ask, f"{friend} comes {preposition} {end}.", reason)


def comparing(rng: random.Random) -> Fact:
    """Three people in a row, told as two neighbouring pairs in either order."""
    (first, second, third), more = rng.sample(NAMES, 3), rng.choice(COMPARATIVES)
    pairs = [f"{first} is {more} than {second}", f"{second} is {more} than {third}"]
    premise = " ".join(f"{pair}." for pair in rng.sample(pairs, 2))
    if rng.random() < 0.5:
        most = more.removesuffix("er") + "est"
        ask, answer = f"Who is the {most}?", f"{first} is the {most}."
    else:
        one, other = rng.sample((first, third), 2)
        ask, answer = f"Who is {more}, {one} or {other}?", f"{first} is {more} than {third}."
    key, reason = ("comparing", more, first, second, third), " and ".join(pairs) + "."
    return Fact(key, premise, ask, answer, reason)


FAMILIES = (possession, arithmetic, opposites, places, counting, calendar, comparing)


def stories(count: int, seed: int) -> Iterator[str]:
    """Yield `count` plain paragraphs of 30 to 80 words, each of several families' facts."""
    rng = random.Random(seed)
    for _ in range(count):
        words: list[str] = []
        target = rng.randrange(30, 49)
        # No family twice: two rows of people compared in one paragraph could contradict each other.
        for family in rng.sample(FAMILIES, len(FAMILIES)):
            if len(words) < target:
                fact = family(rng)
                words += f"{fact.premise} {fact.answer} {fact.reason}".split()
        yield " ".join(words)


def instructions(count: int, seed: int, held_out: bool = False) -> Iterator[dict[str, str]]:
    """Yield `count` rows in OpenOrca's columns; no held-out fact is asked in a training row."""
    rng = random.Random(seed)
    for index in range(count):
        family, system_prompt = rng.choice(FAMILIES), rng.choice(SYSTEM_PROMPTS)
        while is_held_out((fact := family(rng)).key) is not held_out:
            pass
        reason = fact.reason if system_prompt == REASON_PROMPT else ""
        yield {
            "id": f"toy.{fact.key[0]}.{index}",
            "system_prompt": system_prompt,
            "question": f"{fact.premise} {fact.ask}".strip(),
            # The base knows words behind a space only: its tokenizer sets one before a story.
            "response": f" {fact.answer} {reason}".rstrip(),
        }


def _write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the stories (text, one paragraph a line) and the instructions (JSON lines)."""
    parser = argparse.ArgumentParser(description="Write the toy world's stories and instructions.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="held-out files use the next seed")
    parser.add_argument("--stories-train", type=int, default=30_000)
    parser.add_argument("--stories-heldout", type=int, default=500)
    parser.add_argument("--instructions-train", type=int, default=2_400)
    parser.add_argument("--instructions-heldout", type=int, default=160)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(("train", "heldout"), start=options.seed):
        paragraphs = stories(getattr(options, f"stories_{part}"), seed)
        rows = instructions(getattr(options, f"instructions_{part}"), seed, part == "heldout")
        _write(options.output / f"stories_{part}.txt", paragraphs)
        _write(options.output / f"instructions_{part}.jsonl", map(json.dumps, rows))


if __name__ == "__main__":
    main()
