import pytest

from rslightning.batch import IGNORED
from rslightning.data.base import load_tokenizer
from rslightning.data.encode import Example, encode_example, encode_prompt, has_target, truncate

PAIRS = [
    ("Question: how many?\nAnswer:\n", "Two cups."),
    ("", "A text without a prompt."),
    ("ends in a space ", " begins with one"),
    ("two", "gether in one word"),
    ("snowman \u2603 ", "\u2603\u2603 and \U0001f642\n\n"),
]


class WordTokenizer:
    """Encode each word as its length, opened by 1, closed by 2 where asked to; a test double."""

    def __init__(self, eos_token_id: int | None = 2, closes: bool = False) -> None:
        self.eos_token_id, self.closes = eos_token_id, closes

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [len(word) + 10 for word in text.split()]
        if not add_special_tokens:
            return ids
        return [1, *ids, *([self.eos_token_id] if self.closes else [])]


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(str(model_folder))


@pytest.mark.parametrize(("prompt", "response"), PAIRS)
def test_targets_decode_to_the_response_and_the_end(tokenizer, prompt, response):
    ids, labels = encode_example(tokenizer, prompt, response)
    written = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(written) == response + "</s>"
    assert tokenizer.decode(ids) == f"<s>{prompt}{response}</s>"
    assert ids[-len(written) :] == written  # a label sits where its token is
    assert len(ids) == len(labels)


@pytest.mark.parametrize(("prompt", "response"), PAIRS)
def test_the_prompt_alone_is_a_prefix_of_the_example(tokenizer, prompt, response):
    opening = encode_prompt(tokenizer, prompt)
    ids, labels = encode_example(tokenizer, prompt, response)
    assert ids[: len(opening)] == opening
    assert labels[: len(opening)] == [IGNORED] * len(opening)


def test_the_prompt_is_a_target_on_request(tokenizer):
    ids, labels = encode_example(tokenizer, *PAIRS[0], train_on_prompt=True)
    assert labels == ids
    assert ids == encode_example(tokenizer, *PAIRS[0]).input_ids


def test_ids_and_labels_by_hand():
    assert encode_example(WordTokenizer(), "one three", "fives") == Example(
        [1, 13, 15, 15, 2], [IGNORED, IGNORED, IGNORED, 15, 2]
    )


def test_a_tokenizer_that_closes_texts_does_not_close_the_prompt():
    closing = WordTokenizer(closes=True)
    assert encode_prompt(closing, "one three") == [1, 13, 15]
    assert encode_example(closing, "one", "fives").input_ids == [1, 13, 15, 2]


def test_a_tokenizer_without_an_end_adds_none():
    tokenizer = WordTokenizer(eos_token_id=None)
    assert encode_example(tokenizer, "one", "fives") == Example([1, 13, 15], [IGNORED] * 2 + [15])


def test_truncation_cuts_and_counts():
    i = IGNORED
    examples = [
        Example([1, 5, 6], [i, 5, 6]),  # fits
        Example([1, 5, 6, 7, 8, 9], [i, i, 6, 7, 8, 9]),  # two tokens too long
        Example([1, 5, 6, 7, 8], [i, i, i, i, 8]),  # its only target is lost
        Example([1], [1]),  # nothing precedes its only token
        Example([1, 5, 6, 7], [i, i, i, 7]),  # exactly as long as allowed
    ]
    result = truncate(iter(examples), max_length=4)
    assert result.kept == [
        Example([1, 5, 6], [i, 5, 6]),
        Example([1, 5, 6, 7], [i, i, 6, 7]),
        Example([1, 5, 6, 7], [i, i, i, 7]),
    ]
    assert (result.rows, result.rows_cut, result.rows_without_target) == (5, 2, 2)
    assert (result.tokens, result.tokens_lost, result.longest_row) == (19, 3, 6)
    assert str(result) == (
        "5 rows, 19 tokens; longest row 6; 2 rows cut, 3 tokens lost, "
        "2 rows dropped because no target was left"
    )


@pytest.mark.parametrize(
    ("labels", "answer"),
    [([], False), ([7], False), ([7, IGNORED], False), ([IGNORED, 0], True), ([7, 7], True)],
)
def test_only_a_label_after_the_first_is_a_target(labels, answer):
    assert has_target(labels) is answer
