import pytest

from rslightning.batch import IGNORED
from rslightning.data.encode import (
    Counts,
    Example,
    encode_continuations,
    encode_prompts,
    encode_rows,
)
from rslightning.data.tokenizer import load_tokenizer

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

    def __call__(self, text: list[str], add_special_tokens: bool = True):
        rows = [[len(word) + 10 for word in one.split()] for one in text]
        if add_special_tokens:
            end = [self.eos_token_id] if self.closes else []
            rows = [[1, *ids, *end] for ids in rows]
        return {"input_ids": rows}

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def spacing_tokenizer():
    """Return a tokenizer that sets a space before every text, as SentencePiece's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "\u2581"]
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["Answer: The cups.\nUser: How many?", "The The The cups"], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def encode_example(tokenizer, prompt, response, **options) -> Example:
    (example,) = encode_rows(tokenizer, [[(prompt, response)]], **options)
    return example


def encode_prompt(tokenizer, prompt) -> list[int]:
    (ids,) = encode_prompts(tokenizer, [prompt], templated=False)
    return ids


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


@pytest.mark.parametrize(
    ("prompt", "response", "melts"),
    [
        ("Question: how many?\nAnswer:\n", "The cups.", False),
        ("", "The cups.", False),
        ("User: how many? Answer:", " The cups.", True),  # ":" and space are one token
        ("x T", "he cups.", True),
    ],
)
def test_no_space_is_set_between_prompt_and_response(prompt, response, melts):
    tokenizer = spacing_tokenizer()
    ids, _ = encode_example(tokenizer, prompt, response)
    assert tokenizer.decode(ids) == f"<s> {prompt}{response}</s>"
    whole = [*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]
    assert (ids != whole) == melts
    alone = encode_prompt(tokenizer, prompt)
    assert ids[: len(alone)] == alone  # what the model is given when it is asked


@pytest.mark.parametrize(
    ("before", "text"), [("Answer:", "</s>\nUser"), ("Answer</s>", "\nUser"), ("a</s>", "The")]
)
def test_a_continuation_is_encoded_as_in_the_whole_text(before, text):
    tokenizer = spacing_tokenizer()

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    (ids,) = encode_continuations(tokenizer, [(before, text)])
    assert encode(before) + ids == encode(before + text)


def test_the_prompt_is_a_target_on_request(tokenizer):
    ids, labels = encode_example(tokenizer, *PAIRS[0], train_on_prompt=True)
    assert labels == [IGNORED, *ids[1:]]  # nothing predicts the first token
    assert ids == encode_example(tokenizer, *PAIRS[0]).input_ids


def test_ids_and_labels_by_hand():
    assert encode_example(WordTokenizer(), "one three", "fives") == Example(
        [1, 13, 15, 15, 2], [IGNORED, IGNORED, IGNORED, 15, 2]
    )


def test_a_tokenizer_that_closes_texts_does_not_close_the_prompt():
    closing = WordTokenizer(closes=True)
    assert encode_prompt(closing, "one three") == [1, 13, 15]
    assert encode_example(closing, "one", "fives").input_ids == [1, 13, 15, 2]


class StoryTokenizer(WordTokenizer):
    """As above, but a text may hold the end itself."""

    def __call__(self, text: list[str], add_special_tokens: bool = True):
        encoded = super().__call__(text, add_special_tokens)
        for one, ids in zip(text, encoded["input_ids"], strict=True):
            for place, word in enumerate(one.split(), int(add_special_tokens)):
                if word == "</s>":
                    ids[place] = self.eos_token_id
        return encoded


# The last tokenizer opens a text with its end, as GPT-2's does where told to.
@pytest.mark.parametrize(("end", "closes"), [(2, False), (2, True), (1, False)])
@pytest.mark.parametrize("prompt", ["one </s>", "</s>", "one </s> </s>", "</s> one", "one", ""])
def test_an_end_that_the_prompt_holds_stays(end, closes, prompt):
    ids = [end if word == "</s>" else len(word) + 10 for word in prompt.split()]
    assert encode_prompt(StoryTokenizer(end, closes), prompt) == [1, *ids]


def test_a_templated_prompt_keeps_its_end(tokenizer):
    (ids,) = encode_prompts(tokenizer, ["Hi there</s>"], templated=True)
    assert tokenizer.decode(ids) == "Hi there</s>"


def test_a_real_prompt_keeps_its_end(tokenizer):
    assert tokenizer.decode(encode_prompt(tokenizer, "Q: hi</s>")) == "<s>Q: hi</s>"


def test_a_tokenizer_without_an_end_adds_none():
    tokenizer = WordTokenizer(eos_token_id=None)
    assert encode_example(tokenizer, "one", "fives") == Example([1, 13, 15], [IGNORED] * 2 + [15])


def test_rows_encoded_together_are_those_encoded_alone(tokenizer):
    dialogue = [("one ", "two"), (" three ", "four"), (" five ", "six")]
    rows = [[pair] for pair in PAIRS] + [dialogue]
    together = encode_rows(tokenizer, rows)
    assert together == [encode_rows(tokenizer, [row])[0] for row in rows]


def test_every_response_of_a_dialogue_is_a_target(tokenizer):
    dialogue = [("one ", "two"), (" three ", "four")]
    (example,) = encode_rows(tokenizer, [dialogue])
    written = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(written) == "two</s>four</s>"
    assert tokenizer.decode(example.input_ids) == "<s>one two</s> three four</s>"


def test_templated_texts_get_no_tokens_of_ours(tokenizer):
    (example,) = encode_rows(tokenizer, [[("<s>one ", "two</s>")]], templated=True)
    assert tokenizer.decode(example.input_ids) == "<s>one two</s>"
    assert tokenizer.decode([x for x in example.labels if x != IGNORED]) == "two</s>"


def test_truncation_cuts_and_counts():
    i = IGNORED
    examples = [
        Example([1, 5, 6], [i, 5, 6]),  # fits
        Example([1, 5, 6, 7, 8, 9], [i, i, 6, 7, 8, 9]),  # two tokens too long
        Example([1, 5, 6, 7, 8], [i, i, i, i, 8]),  # its only target is lost
        Example([1], [i]),  # never had one
        Example([1, 5, 6, 7], [i, i, i, 7]),  # exactly as long as allowed
    ]
    counts = Counts()
    assert [counts.cut(example, 4) for example in examples] == [
        Example([1, 5, 6], [i, 5, 6]),
        Example([1, 5, 6, 7], [i, i, 6, 7]),
        None,
        None,
        Example([1, 5, 6, 7], [i, i, i, 7]),
    ]
    assert counts == Counts(
        rows=5, rows_cut=2, rows_without_target=2, tokens=19, tokens_lost=3, longest_row=6
    )
    assert Counts(**counts.as_dict()) == counts
    assert str(counts) == (
        "5 rows, 19 tokens; longest row 6; 2 rows cut, 3 tokens lost, "
        "2 rows dropped because no target was left, 0 bad rows skipped"
    )
