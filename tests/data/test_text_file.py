"""Documents of text files, through the rows that a DataModule reads."""

import pytest

from rslightning.data.rows import find_rows
from rslightning.errors import UserError


@pytest.fixture
def documents(tmp_path):
    def read(content, unit="line"):
        path = tmp_path / "text.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        rows = list(find_rows(str(path), "train", text_unit=unit).pick())
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))
        return [row.values["text"] for row in rows]

    return read


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\n\n \t\ntwo", ["one", "two"]),
        ("one\r\ntwo\rthree\n", ["one", "two", "three"]),
        ("  indented  \n", ["  indented  "]),
        ("a\u2028b\nc\x0cd\ne\x85f\n", ["a\u2028b", "c\x0cd", "e\x85f"]),  # no ends of lines
        ("\ufeffone\n\ufefftwo\n", ["one", "\ufefftwo"]),  # only the file's first is its mark
    ],
)
def test_lines(documents, content, lines):
    assert documents(content) == lines


@pytest.mark.parametrize(
    ("content", "paragraphs"),
    [
        ("a\nb\n\nc\n", ["a\nb", "c"]),
        ("a\n\n\nb\n\n\n\nc", ["a", "b", "c"]),
        ("a\n \nb\n\t\n\nc", ["a", "b", "c"]),
        ("\n\na\r\nb\r\n\r\nc\r\n", ["a\nb", "c"]),
        ("  def f():\n    x\n\n    y\n", ["  def f():\n    x", "    y"]),
        ("\ufeffa\n\nb", ["a", "b"]),
    ],
)
def test_paragraphs(documents, content, paragraphs):
    assert documents(content, "paragraph") == paragraphs


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_many_documents_are_read_in_order(documents, unit):
    expected = [f"{number} {'word ' * (number % 50)}." for number in range(2500)]
    assert documents("\n\n".join(expected), unit) == expected


def test_a_text_that_is_not_utf8_is_named(documents):
    with pytest.raises(UserError, match=r"text\.txt cannot be read: 'utf-8' codec can't decode"):
        documents("good\ncafé\n".encode("latin-1"))


def test_a_text_without_documents_is_named(documents):
    with pytest.raises(UserError, match=r"text\.txt has no rows"):
        documents("\n \n")
