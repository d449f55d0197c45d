"""Which rows of a data set are trained on, held out, or tested on."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from rslightning.data.rows import Rows
from rslightning.errors import UserError


@dataclass(frozen=True)
class Partition:
    """Divides the rows of a data set, the same way for the same seed.

    Attributes:
        num_examples: How many training rows are drawn; None takes all.
        held_out_examples: How many rows are held out; None takes a whole split.
        seed: Draws both.
        streaming: Whether the rows are not to be counted: what is held out is then the beginning.
    """

    num_examples: int | None
    held_out_examples: int | None
    seed: int
    streaming: bool

    def select(self, rows: Rows, part: str, own_split: bool) -> np.ndarray | None:
        """Return the positions of a part's rows among `rows`, ascending; None is all of them.

        Args:
            rows: Those of the part's own split, or of the training split.
            part: `training`, `held-out` or `test`.
            own_split: Whether there is a split to evaluate on, apart from the training split.

        Raises:
            UserError: If none is left to train on, or the rows cannot be read.
        """
        count = self.held_out_examples
        if part == "test" and own_split:
            return None
        if part != "training" and (own_split or self.streaming):
            return None if count is None else np.arange(count)
        if own_split and self.num_examples is None:
            return None
        total = rows.count()
        held_out = self._draw("held-out", total, 0 if own_split else count or 0)
        if part != "training":
            return held_out
        if len(held_out) == total:
            raise UserError(
                f"{rows.name} has {total} rows, of which held_out_examples takes {count}: none is "
                "left to train on."
            )
        left = np.delete(np.arange(total), held_out)
        if self.num_examples is not None:
            left = left[self._draw("training", len(left), self.num_examples)]
        return left

    def identity(self, rows: Rows, part: str, own_split: bool) -> Any:
        """Return what stands for the rows' content; of a stream, that of the part alone."""
        if not self.streaming:
            return rows.identity()
        chosen = rows.pick(self.select(rows, part, own_split))
        text = json.dumps([row.values for row in chosen], default=repr)  # dates and bytes, too
        return hashlib.sha256(text.encode()).hexdigest()

    def _draw(self, name: str, total: int, count: int) -> np.ndarray:
        """Return `count` of `total` positions (or all), ascending; fewer are a subset of more."""
        draw = np.random.RandomState([self.seed % 2**32, len(name)])  # its numbers never change
        return np.sort(draw.permutation(total)[:count])
