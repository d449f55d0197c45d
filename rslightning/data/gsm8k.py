"""GSM8K: grade-school mathematics with worked solutions (openai/gsm8k)."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, final

from rslightning.data.base import TextDataModule
from rslightning.data.encode import Turns

MARK: Final = "####"
"""Stands before the final number of an answer."""

NUMBER: Final = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


@final
class GSM8K(TextDataModule):
    """Columns `question`, `answer`; the answer ends in `#### <number>`.

    An answer is right when its final number is the reference's, as in the evaluation of the data
    set's authors (`grade_school_math/dataset.py` of openai/grade-school-math). Two differences, for
    models that were not trained on the authors' form: numbers are compared as numbers, where the
    authors compare texts (72 is 72.0), and the last mark counts, where theirs is the first.
    """

    columns = ("question", "answer")
    subset = "main"

    def render(self, row: Mapping[str, Any]) -> Turns:
        """Set the answer on lines of its own, so that every tokenizer starts it alike."""
        return [(f"Question: {row['question']}\nAnswer:\n", row["answer"])]

    def score_answer(self, answer: str, reference: str) -> bool:
        """Return whether an answer's final number is that of the reference; none is wrong."""
        number = final_number(answer)
        return number is not None and number == final_number(reference)


def final_number(answer: str) -> Decimal | None:
    """Return the number that starts what stands after the last `####` on its line, or None.

    Commas, dollar signs and spaces are left out: `#### $1,234.50.` is 1234.5.
    """
    _, mark, rest = answer.rpartition(MARK)
    line = re.sub(r"[,$\s]", "", rest.partition("\n")[0])
    number = NUMBER.match(line)
    return Decimal(number[0]) if mark and number else None
