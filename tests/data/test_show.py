import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rslightning.__main__ import main
from rslightning.batch import IGNORED
from rslightning.data.blocks import Block
from rslightning.data.show import (
    COLOURS,
    PLAIN,
    choose_marks,
    describe_blocks,
    describe_data,
    describe_packing,
    example_lengths,
    histogram,
    mark,
    packed_sizes,
    padded_positions,
    token_lines,
)

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@pytest.fixture(scope="module")
def packed_data(make_data):
    data = make_data(packing=True)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def unpacked_data(make_data):
    data = make_data()
    data.setup("fit")
    return data


def make_blocks(data, *groups):
    """Return blocks of (prompt, response) texts, whose responses are the targets."""
    blocks = []
    for group in groups:
        ids, labels, lengths = [], [], []
        for texts in group:
            prompt, response = (
                data.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
            )
            ids += prompt + response
            labels += [IGNORED] * len(prompt) + response
            lengths.append(len(prompt) + len(response))
        blocks.append(Block(np.array(ids), np.array(labels), np.array(lengths)))
    return blocks


def column(lines, name, number):
    """Return a number of the packing table's line."""
    line = next(line for line in lines if line.startswith(f"{name} "))
    return int(line.split()[number].replace(",", ""))


def test_targets_are_marked(unpacked_data):
    tokenizer = unpacked_data.tokenizer
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    labels = [IGNORED, *ids[1:-1], IGNORED]
    first, middle, last = (tokenizer.decode(part) for part in (ids[:1], ids[1:-1], ids[-1:]))
    assert mark(tokenizer, ids, labels) == f"{first}«{middle}»{last}"
    assert mark(tokenizer, ids, labels, COLOURS) == (
        f"{DIM}{first}{RESET}{GREEN}{middle}{RESET}{DIM}{last}{RESET}"
    )


def test_the_space_that_a_tokenizer_sets_before_a_response_is_shown(shared_file):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_file("models/llama2-tokenizer"))
    prompt = tokenizer("Answer:\n")["input_ids"]
    response = [*tokenizer("Yes é.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(response)[0] == "▁Yes"
    labels = [IGNORED] * len(prompt) + response
    assert mark(tokenizer, prompt + response, labels) == "<s> Answer:\n« Yes é.</s>»"


def byte_tokenizer():
    """Return a tokenizer of bytes that opens no text, as GPT-2's and Qwen's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize(
    ("text", "targets", "shown"),
    [
        ("\U0001f642 hi", range(1, 7), "«\U0001f642 hi»"),  # the first token is never a target
        ("é hi", range(3, 5), "é «hi»"),
        ("a é", [3], "a «é»"),
        ("a éb", [2], "a «»éb"),  # only half of the letter is a target
        ("\ufffd b", [4], "\ufffd «b»"),
    ],
)
def test_a_character_of_several_tokens_is_whole(text, targets, shown):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    labels = [token if place in targets else IGNORED for place, token in enumerate(ids)]
    assert mark(tokenizer, ids, labels) == shown


def test_any_blocks_show_their_examples(unpacked_data):
    pairs = (("ask", " say"), ("Who?\n", "Tom."), ("more", " less"))
    blocks = make_blocks(unpacked_data, pairs[:2], pairs[2:], pairs[:1])
    texts = list(describe_blocks(iter(blocks), unpacked_data.tokenizer, 2))
    assert texts[0] == PLAIN.legend
    sizes = [len(block.input_ids) for block in blocks]
    assert texts[1] == f"== block 1: {sizes[0]} tokens, 2 examples"
    assert texts[2].splitlines()[1:] == ["ask« say»"]
    assert texts[3].splitlines()[1:] == ["Who?", "«Tom.»"]
    targets = sum(label != IGNORED for label in blocks[1].labels)
    assert texts[4:] == [
        f"== block 2: {sizes[1]} tokens, 1 examples",
        f"-- {sizes[1]} tokens, {targets} targets\nmore« less»",
    ]


def test_no_more_blocks_are_read_than_shown(unpacked_data):
    stream = iter(make_blocks(unpacked_data, [("a", "b")], [("c", "d")]))
    assert len(list(describe_blocks(stream, unpacked_data.tokenizer, 1))) == 3
    assert "c" in mark(unpacked_data.tokenizer, *next(stream)[:2])


def test_the_blocks_shown_are_those_that_training_begins_with(packed_data):
    shown = [text for text in describe_data(packed_data, 1) if text.startswith("-- ")]
    batch = next(iter(packed_data.train_dataloader()))
    size = int(batch.attention_mask[0].sum())
    first = Block(batch.input_ids[0, :size].numpy(), batch.labels[0, :size].numpy(), None)
    starts = [*np.flatnonzero(batch.position_ids[0, :size].numpy() == 0), size]
    assert len(shown) == len(starts) - 1 > 1
    for text, start, end in zip(shown, starts, starts[1:], strict=False):
        ids, labels = first.input_ids[start:end].tolist(), first.labels[start:end].tolist()
        assert text.partition("\n")[2] == mark(packed_data.tokenizer, ids, labels)
        assert text.endswith("</s>»")


def test_of_a_stream_the_first_chunk_is_shown(make_data):
    data = make_data(packing=True, streaming=True, held_out_examples=2, shuffle_buffer=9)
    data.setup("fit")
    lines = list(describe_data(data, 1))
    (first, *_) = data.training_blocks()
    assert lines[1] == f"== block 1: {len(first.input_ids)} tokens, {len(first.lengths)} examples"
    assert "== lengths of the 9 examples of the stream's first chunk, in tokens" in lines
    assert column(lines, "unpacked", 1) == 9


def test_each_token_has_a_line(unpacked_data):
    tokenizer = unpacked_data.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer("Tom\n")["input_ids"][1:], tokenizer.eos_token_id]
    labels = [*[IGNORED] * (len(ids) - 2), *ids[-2:]]
    lines = token_lines(tokenizer, ids, labels)
    assert [int(line.split()[0]) for line in lines] == list(range(len(ids)))
    assert [int(line.split()[1]) for line in lines] == ids
    assert [line.split()[2] for line in lines] == [
        repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids)
    ]
    assert [line.endswith("  target") for line in lines] == [label != IGNORED for label in labels]
    coloured = token_lines(tokenizer, ids, labels, COLOURS)
    assert coloured[:1] + coloured[-1:] == [f"{DIM}{lines[0]}{RESET}", f"{GREEN}{lines[-1]}{RESET}"]


def test_ids_stand_below_their_example(unpacked_data):
    (block,) = make_blocks(unpacked_data, [("ask", " say")])
    *_, text, tokens = describe_blocks([block], unpacked_data.tokenizer, 1, ids=True)
    assert text.endswith("ask« say»")
    assert len(tokens.splitlines()) == len(block.input_ids)


@pytest.mark.parametrize("max_length", [5, 8, 100, 512])
def test_the_histogram_counts_as_numpy_does(max_length):
    lengths = np.random.default_rng(0).integers(1, max_length + 1, 1000)
    lengths[0], lengths[1] = 1, max_length
    lines = [line.replace("-", " ").split() for line in histogram(lengths.tolist(), max_length)]
    firsts, lasts = ([int(line[side]) for line in lines] for side in (0, 1))
    assert firsts == [1, *[last + 1 for last in lasts[:-1]]]
    assert lasts[-1] == max_length
    assert 1 < len(lines) <= 8
    truth, _ = np.histogram(lengths, bins=[*(first - 0.5 for first in firsts), max_length + 0.5])
    assert [int(line[-2]) for line in lines] == truth.tolist()
    assert [line[-1] for line in lines] == [f"{count / 1000:.1%}" for count in truth]


def test_bars_are_in_proportion_and_a_lone_example_shows():
    bars = [line.count("█") for line in histogram([10] * 1000 + [20] * 500 + [80], 80)]
    assert bars == [40, 20, 0, 0, 0, 0, 0, 1]


def test_nothing_to_count_is_no_error():
    assert all(line.endswith("0.0%") for line in histogram([], 64))
    assert "0 examples into 0 blocks" in describe_packing([], [], 64, 4, 0)[-1]


def test_positions_are_those_of_the_loader(packed_data, unpacked_data):
    for data in (packed_data, unpacked_data):
        masks = [batch.attention_mask for batch in data.train_dataloader()]
        dense = sum(int(mask.any(dim=1).sum()) * mask.shape[1] for mask in masks)
        assert padded_positions(data.train.sizes(), data.batch_size, data.seed) == dense


def test_packing_is_measured_alike_whether_on_or_off(packed_data, unpacked_data):
    blocks = example_lengths(packed_data.train)
    lengths = [length for (length,) in example_lengths(unpacked_data.train)]
    assert sorted(length for block in blocks for length in block) == sorted(lengths)
    assert [sum(block) for block in blocks] == packed_data.train.sizes()
    assert packed_sizes(lengths, 128) == packed_data.train.sizes()
    for data in (packed_data, unpacked_data):
        lines = list(describe_data(data, 0))
        assert f"== packing (data.packing: {str(data.packing).lower()})" in lines
        assert column(lines, "packed", 1) == len(packed_data.train)
        assert column(lines, "unpacked", 1) == len(unpacked_data.train) == 24


def test_what_packing_saves_is_counted_by_hand():
    lengths, packed = [10, 2, 7, 1, 8], [10, 10, 8]
    rows = list(range(5))
    random.Random("3/0").shuffle(rows)
    batches = [rows[:2], rows[2:4], rows[4:]]
    dense = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    lines = describe_packing(lengths, packed, max_length=10, batch_size=2, seed=3)
    assert [column(lines, "unpacked", i) for i in range(1, 5)] == [5, 3, dense, dense - 28]
    rows = list(range(3))
    random.Random("3/0").shuffle(rows)
    after = 2 * max(packed[i] for i in rows[:2]) + packed[rows[2]]
    assert [column(lines, "packed", i) for i in range(1, 5)] == [3, 2, after, after - 28]
    assert lines[-1] == (
        f"Packing puts 5 examples into 3 blocks of 10, 93.3% full, and saves "
        f"{1 - after / dense:.1%} of the positions."
    )


@pytest.mark.parametrize(
    ("terminal", "environment", "marks"),
    [
        (True, {}, COLOURS),
        (True, {"NO_COLOR": ""}, COLOURS),
        (True, {"NO_COLOR": "1"}, PLAIN),
        (False, {}, PLAIN),
    ],
)
def test_colours_are_for_terminals_that_want_them(terminal, environment, marks):
    assert choose_marks(SimpleNamespace(isatty=lambda: terminal), environment) is marks


@pytest.fixture
def recipe(tmp_path, model_folder, orca_folder):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
model:
  base_model: {model_folder}
  adapter: {{rank: 2}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.001}}}}
data:
  class_path: rslightning.data.OpenOrca
  init_args: {{path: {orca_folder}, max_length: 128}}
trainer: {{logger: false}}
"""
    )
    return path


def test_the_command_shows_what_the_model_sees(recipe, capsys):
    assert main(["data", "show", "-n", "1", "--config", str(recipe), "--data.seed", "3"]) == 0
    output = capsys.readouterr().out
    assert "== block 1: " in output
    assert "<s>### Question:\n" in output
    assert "</s>»" in output
    assert "target\n" not in output
    assert "== lengths of the 24 training examples, in tokens\n  1- 16 " in output
    assert "\nPacking puts 24 examples into " in output


def test_the_command_lists_ids_in_colours_on_a_terminal(recipe, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["data", "show", "-n", "1", "--ids", "--config", str(recipe)]) == 0
    output = capsys.readouterr().out
    assert f"{DIM}<s>### Question:\n" in output
    assert f"</s>{RESET}\n" in output
    assert re.search(rf"'</s>' +target{re.escape(RESET)}\n", output)
    assert "«" not in output


def test_the_counts_are_said_once(recipe, capfd, caplog):
    assert main(["data", "show", "-n", "0", "--config", str(recipe)]) == 0
    text = "".join(capfd.readouterr())
    said = text.count("data: training: 24 rows") + caplog.text.count("data: training: 24 rows")
    assert said == 1


def test_several_configurations_merge(recipe, tmp_path, capsys):
    fragment = tmp_path / "unpacked.yaml"
    fragment.write_text("data: {init_args: {packing: false}}\n")
    assert main(["data", "show", "--config", str(recipe), "--config", str(fragment)]) == 0
    assert "data.packing: false" in capsys.readouterr().out


def test_a_negative_number_of_blocks_is_refused(recipe, capsys):
    assert main(["data", "show", "-n", "-1", "--config", str(recipe)]) == 2
    assert "-n is a number of blocks, got -1." in capsys.readouterr().err
