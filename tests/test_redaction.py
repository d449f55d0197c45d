import pytest

from rslightning.redaction import redact, redact_values


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "correct-horse")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "battery-staple")
    monkeypatch.setenv("SHORT_TOKEN", "x")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-false")
    monkeypatch.setenv("MONKEY", "banana-banana")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a correct-horse and a battery-staple", "a <hidden> and a <hidden>"),
        ("x false-false banana-banana", "x false-false banana-banana"),
        (f"hf_{'aB3' * 11}, next", "<hidden>, next"),
        ("https://tom:pass@host/x", "https://<hidden>@host/x"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        (f"ghp_{'a' * 36} sk-{'b' * 30} AKIA{'C' * 16}", "<hidden> <hidden> <hidden>"),
        ("hf_model is a name, and sk-learn another", "hf_model is a name, and sk-learn another"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(secrets, text, expected):
    assert redact(text) == expected


def test_values_are_hidden_by_their_names_too(secrets):
    values = {
        "token": "anything",
        "hub_token": None,
        "tokenizer": "asset:toy_llama",
        "max_new_tokens": 40,
        "api_key": "",
        "logger": [{"init_args": {"password": "p", "name": "correct-horse"}}],
    }
    assert redact_values(values) == {
        "token": "<hidden>",
        "hub_token": None,
        "tokenizer": "asset:toy_llama",
        "max_new_tokens": 40,
        "api_key": "",
        "logger": [{"init_args": {"password": "<hidden>", "name": "<hidden>"}}],
    }
