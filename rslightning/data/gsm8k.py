"""GSM8K: grade-school mathematics with worked solutions (openai/gsm8k)."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, final

from rslightning.data.base import TextDataModule
from rslightning.data.encode import Turns

MARK: Final = "####"
"""Stands before the final number of an answer."""

WRITTEN: Final = re.compile(r"[\s$]*(-?\$?[0-9.,]+)")
"""A number as it may be written behind the mark."""

NUMBER: Final = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


@final
class GSM8K(TextDataModule):
    """Columns `question`, `answer`; the answer ends in `#### <number>`.

    An answer is right when its final number is the reference's, as in the evaluation of the data
    set's authors (`grade_school_math/dataset.py` of openai/grade-school-math). Three differences,
    for models that were not trained on the authors' form: numbers are compared as numbers, where
    the authors compare texts (72 is `72.0`, `72.` and the beginning of `72.0.1`); the last mark
    counts, where theirs is the first; and between mark and number any spaces and dollar signs may
    stand, or none (`####72`, `#### -$72`), where theirs is one space.
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

    A space ends it, as it does for the authors. Commas in it are left out, and dollar signs before
    it: `#### $1,234.50.` is 1234.5, and `#### 3 1/2` is 3.
    """
    _, mark, rest = answer.rpartition(MARK)
    written = WRITTEN.match(rest.partition("\n")[0])
    number = NUMBER.match(re.sub(r"[,$]", "", written[1])) if mark and written else None
    return Decimal(number[0]) if number else None
