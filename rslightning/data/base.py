"""The base of all DataModules: rows -> (prompt, response) -> ids and labels -> `Batch`."""

import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from rslightning.assets import resolve_asset
from rslightning.batch import Batch
from rslightning.data.collate import pad_batch, pad_prompts
from rslightning.data.encode import Example, encode_example, encode_prompt, truncate
from rslightning.data.rows import check_columns, load_rows
from rslightning.errors import UserError


class TextDataModule(LightningDataModule, ABC):
    """Prompts and responses of one data set, tokenized, masked and batched.

    A subclass names its columns and renders a row; everything else is here.

    Args:
        path: Hub name, folder (one file per split) or file (JSON lines, Parquet, CSV, plain text).
        tokenizer: Hub name or folder of the tokenizer; the command line fills in the base model's.
        max_length: Tokens per example; longer ones are cut, and counted.
        batch_size: Examples per batch and device.
        num_examples: How many training rows to draw (seeded); null takes all.
        held_out_examples: How many rows to hold out for validation. They come from the data's own
            validation or test split, or from the training rows where it has none; null takes the
            whole split.
        train_on_prompt: Whether the prompt's tokens are targets too.
        seed: Draws the subset and the order of the rows.
        num_workers: Processes that collate batches.

    Raises:
        UserError: If the path, a column or the tokenizer is missing, or no example has a target.
    """

    columns: ClassVar[tuple[str, ...]]
    subset: ClassVar[str | None] = None

    def __init__(
        self,
        path: str,
        tokenizer: str,
        max_length: int = 512,
        batch_size: int = 8,
        num_examples: int | None = None,
        held_out_examples: int | None = 200,
        train_on_prompt: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}.")
        self.path, self.tokenizer_name = path, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.num_examples, self.held_out_examples = num_examples, held_out_examples
        self.train_on_prompt, self.seed, self.num_workers = train_on_prompt, seed, num_workers
        self.train_examples: list[Example] = []
        self.held_out_rows: list[tuple[str, str]] = []
        self.held_out: list[Example] = []

    @abstractmethod
    def render(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Return (prompt, response) of a row; the prompt ends where the response begins."""

    def setup(self, stage: str) -> None:
        """Load, split, tokenize and cut the rows; every process computes the same."""
        if self.held_out:
            return
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        train, held_out = self._split()
        self.held_out_rows = held_out
        self.held_out = self._encode(held_out, "held-out")
        if stage == "fit":
            self.train_examples = self._encode(train, "training")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of training examples in an order drawn from `seed`."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader(self.train_examples, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the held-out examples, in their order."""
        return self._loader(self.held_out)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches of held-out prompts, padded on the left."""
        rows: Any = range(len(self.held_out_rows))
        return DataLoader(rows, self.batch_size, collate_fn=self.prompt_batch)

    def prompt_batch(self, rows: Sequence[int]) -> Batch:
        """Return the prompts of these held-out rows, padded on the left for generation."""
        prompts = [encode_prompt(self.tokenizer, self.held_out_rows[row][0]) for row in rows]
        return pad_prompts(prompts, self.pad_id)

    @property
    def pad_id(self) -> int:
        """Id that fills the ends of short examples; never seen by loss or attention."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.tokenizer.eos_token_id or 0)

    @property
    def largest_token_id(self) -> int:
        """The largest id of all examples, for comparison with a model's vocabulary."""
        examples = [*self.train_examples, *self.held_out]
        return max((max(example.input_ids) for example in examples), default=0)

    def _loader(self, examples: list[Example], **options: Any) -> DataLoader[Batch]:
        collate = partial(pad_batch, pad_id=self.pad_id)
        return DataLoader(
            examples,  # type: ignore[arg-type]
            self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _split(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        rows = load_rows(self.path, "train", self.subset)
        if rows is None:
            raise UserError(f"{self.path} has no training split.")
        held_out = load_rows(self.path, "held_out", self.subset)
        order = random.Random(self.seed).sample(range(len(rows)), len(rows))
        if held_out is None:
            count = self.held_out_examples or 0
            if count >= len(rows):
                raise UserError(
                    f"{self.path} has {len(rows)} rows, of which held_out_examples takes {count}: "
                    "none is left to train on."
                )
            held_out, order = rows.select(order[:count]), order[count:]
        elif self.held_out_examples is not None:
            held_out = held_out.select(range(min(self.held_out_examples, len(held_out))))
        train = rows.select(order[: self.num_examples])
        return self._rendered(train), self._rendered(held_out)

    def _rendered(self, rows: Any) -> list[tuple[str, str]]:
        check_columns(rows.column_names, self.columns, self.path)
        return [self.render(row) for row in rows.select_columns(list(self.columns))]

    def _encode(self, pairs: Iterable[tuple[str, str]], what: str) -> list[Example]:
        result = truncate(
            (encode_example(self.tokenizer, *pair, self.train_on_prompt) for pair in pairs),
            self.max_length,
        )
        rank_zero_info(f"data: {what}: {result}")
        if result.rows and not result.kept:
            raise UserError(
                f"No {what} row of {self.path} has a target within max_length = {self.max_length} "
                "tokens; raise data.max_length."
            )
        return result.kept


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a Hub name, folder or asset.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_asset(name))
    except Exception as error:  # the tokenizer's loaders raise bare Exception, too
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{name} has no tokenizer that can be loaded: {first_line}") from error
    tokenizer.model_max_length = sys.maxsize  # rows are cut, and counted, here; it would only warn
    return tokenizer
