import json
import os
import shutil

import pytest

import rslightning.data.build
from rslightning.data import OpenOrca, PlainText
from rslightning.data.cache import cache_key, cached_folder, file_digest
from rslightning.errors import RunError
from rslightning.manifest import MANIFEST_FILE


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RSLIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folders(cache):
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def arrays(data):
    return [[column.tolist() for column in block] for block in (*data.train, *data.held_out)]


def test_a_second_start_does_not_tokenize(cache, make_data, monkeypatch):
    first = make_data(packing=True)
    first.setup("fit")
    assert len(folders(cache)) == 2  # training and held-out

    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(rslightning.data.build, "encode_rows", refuse)
    second = make_data(packing=True)
    second.setup("fit")
    assert arrays(second) == arrays(first)
    assert second.held_out_rows == first.held_out_rows
    assert second.counts == first.counts


class OtherTemplate(OpenOrca):
    def render(self, row):
        return [(row["question"], row["response"])]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 60},
        {"seed": 1},
        {"num_examples": 9},
        {"train_on_prompt": True},
        {"packing": True},
        {"on_bad_row": "skip"},
    ],
)
def test_another_setting_is_another_cache(cache, make_data, change):
    make_data().setup("fit")
    before = folders(cache)
    make_data(**change).setup("fit")
    assert len(folders(cache)) > len(before)


def test_settings_of_batches_share_a_cache(cache, make_data):
    make_data().setup("fit")
    make_data(batch_size=7, num_workers=1).setup("fit")
    assert len(folders(cache)) == 2


def test_validation_does_not_tokenize_the_training_rows(
    cache, make_trainer, make_module, make_data
):
    make_trainer().validate(make_module(), make_data())
    assert len(folders(cache)) == 1
    make_trainer(max_steps=1).fit(make_module(), make_data())
    assert len(folders(cache)) == 2


def test_other_rows_template_or_tokenizer_is_another_cache(
    cache, orca_folder, model_folder, tmp_path
):
    def keys(kind=OpenOrca, path=orca_folder, tokenizer=model_folder):
        before = set(folders(cache)) if cache.exists() else set()
        kind(str(path), str(tokenizer)).setup("fit")
        return set(folders(cache)) - before

    assert len(keys()) == 2
    assert keys() == set()
    assert len(keys(kind=OtherTemplate)) == 2
    copy = tmp_path / "copy"
    shutil.copytree(orca_folder, copy)
    assert keys(path=copy) == set()  # the same content elsewhere
    with (copy / "train.jsonl").open("a") as file:
        file.write(json.dumps({"system_prompt": "", "question": "Q", "response": "R"}) + "\n")
    assert len(keys(path=copy)) == 1  # the held-out rows are the same
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = tmp_path / "model" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["post_processor"] = None
    tokenizer.write_text(json.dumps(content))
    assert len(keys(tokenizer=tmp_path / "model")) == 2


def test_the_same_bytes_in_another_format_are_other_rows(cache, model_folder, tmp_path):
    def texts(name):
        data = PlainText(
            str(tmp_path / name), str(model_folder), held_out_examples=0, packing=False
        )
        data.setup("fit")
        return [data.tokenizer.decode(block.input_ids) for block in data.train]

    (tmp_path / "rows.txt").write_text('{"text": "Once"}\n')
    assert texts("rows.txt") == ['<s>{"text": "Once"}</s>']
    (tmp_path / "rows.txt").rename(tmp_path / "rows.jsonl")
    assert texts("rows.jsonl") == ["<s>Once</s>"]


@pytest.mark.parametrize("name", ["blocks.arrow", "texts.json"])
def test_a_damaged_cache_is_built_anew(cache, make_data, name):
    first = make_data()
    first.setup("fit")
    expected = arrays(first)
    for folder in folders(cache):
        path = cache / folder / name
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert path.stat().st_size == len(content)
    second = make_data()
    second.setup("fit")
    assert arrays(second) == expected
    assert second.held_out_rows == first.held_out_rows


def test_a_build_that_fails_leaves_nothing(cache):
    def build(folder):
        (folder / "half").write_text("?")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_folder("key", build)
    assert folders(cache) == []
    assert cached_folder("key", lambda folder: (folder / "whole").write_text("!")) == cache / "key"
    assert (cache / "key" / "whole").read_text() == "!"


def test_a_build_that_is_killed_leaves_no_cache(cache):
    child = os.fork()
    if child == 0:

        def build(folder):
            (folder / "half").write_text("?")
            os._exit(9)

        cached_folder("key", build)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (cache / "key").exists()
    cached_folder("key", lambda folder: (folder / "whole").write_text("!"))
    assert {path.name for path in (cache / "key").iterdir()} == {"whole", MANIFEST_FILE}


def test_processes_that_want_the_same_cache_build_it_once(cache, tmp_path):
    def build(folder):
        with (tmp_path / "builds").open("a") as file:
            file.write("x")
        (folder / "whole").write_text("!")

    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            folder = cached_folder("key", build)
            os._exit(0 if (folder / "whole").read_text() == "!" else 1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RSLIGHTNING_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunError) as caught:
        cached_folder("key", lambda folder: None)
    assert str(caught.value) == (
        f"The cache folder {tmp_path / 'file' / 'cache'} cannot be written (Not a directory); "
        "set RSLIGHTNING_CACHE to another one."
    )


def test_keys_do_not_depend_on_the_order_of_their_parts(tmp_path):
    assert cache_key({"a": 1, "b": [2]}) == cache_key({"b": [2], "a": 1}) != cache_key({"a": 1})
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    )
