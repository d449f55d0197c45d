"""The base of all DataModules: rows -> turns -> ids and labels -> packed blocks -> `Batch`."""

import inspect
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from rslightning.batch import Batch
from rslightning.data.blocks import Blocks
from rslightning.data.build import BLOCKS_FILE, COUNTS_FILE, TEXTS_FILE, Encoding, PartBuilder
from rslightning.data.cache import cache_key, cached_folder
from rslightning.data.collate import collate_blocks, pad_prompts
from rslightning.data.encode import Counts, Turns, encode_prompts
from rslightning.data.loader import OrderedLoader
from rslightning.data.rows import Rows, find_rows
from rslightning.data.tokenizer import load_tokenizer, tokenizer_identity
from rslightning.errors import UserError

SETTINGS: Final = (
    "max_length",
    "packing",
    "num_examples",
    "held_out_examples",
    "train_on_prompt",
    "on_bad_row",
    "seed",
)
"""Attributes that decide what is in a cache."""


class TextDataModule(LightningDataModule, ABC):
    """Prompts and responses of one data set, tokenized, masked, packed and batched.

    A subclass names its columns and renders a row; everything else is here.

    Args:
        path: Hub name, folder (one file per split) or file (JSON lines, Parquet, CSV, plain text).
        tokenizer: Hub name or folder of the tokenizer; the command line fills in the base model's.
        max_length: Tokens per example and per block; longer examples are cut, and counted.
        batch_size: Rows per batch and device: blocks where packed, else examples.
        packing: Put several examples into each training block, with attention kept inside of each;
            loss and gradient are those of the unpacked examples, without their padding.
        num_examples: How many training rows to draw (seeded); null takes all.
        held_out_examples: How many rows to hold out for validation. They come from the data's own
            validation or test split, or from the training rows where it has none; null takes the
            whole split.
        train_on_prompt: Whether the prompts' tokens are targets too.
        on_bad_row: `error` stops at a row that cannot be used; `skip` counts it.
        seed: Draws the subset and the order of the rows.
        num_workers: Processes that read and collate batches ahead.

    Raises:
        UserError: If the path, a column or the tokenizer is missing, a row cannot be used, or no
            example has a target.
    """

    columns: ClassVar[tuple[str, ...]]
    optional_columns: ClassVar[tuple[str, ...]] = ()
    subset: ClassVar[str | None] = None
    templated: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        path: str,
        tokenizer: str,
        max_length: int = 512,
        batch_size: int = 8,
        packing: bool = True,
        num_examples: int | None = None,
        held_out_examples: int | None = 200,
        train_on_prompt: bool = False,
        on_bad_row: Literal["error", "skip"] = "error",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}.")
        self.path, self.tokenizer_name = path, tokenizer
        self.max_length, self.batch_size, self.packing = max_length, batch_size, packing
        self.num_examples, self.held_out_examples = num_examples, held_out_examples
        self.train_on_prompt, self.on_bad_row = train_on_prompt, on_bad_row
        self.seed, self.num_workers = seed, num_workers
        self.tokenizer: Any = None
        self.train: Blocks | None = None
        self.held_out: Blocks | None = None
        self.counts: dict[str, Counts] = {}
        self.held_out_rows: list[tuple[str, str]] = []

    @abstractmethod
    def render(self, row: Mapping[str, Any]) -> Turns:
        """Return the (prompt, response) pairs of a row; each prompt ends where its response begins.

        Raises:
            BadRowError: If the row cannot be used.
        """

    def prepare_data(self) -> None:
        """Build the caches on one process, so that the others find them."""
        self._load("fit" if self.trainer is None else str(self.trainer.state.fn.value))

    def setup(self, stage: str) -> None:
        """Open the caches; every process sees the same blocks."""
        self._load(stage)

    def train_dataloader(self) -> OrderedLoader[Batch]:
        """Batches of packed training blocks, in an order drawn from `seed` and the pass."""
        assert self.train is not None
        return self._loader(self.train, shuffle=True, step_value=self._step_targets)

    def val_dataloader(self) -> OrderedLoader[Batch]:
        """Batches of the held-out examples, in their order, one example per row."""
        assert self.held_out is not None
        return self._loader(self.held_out)

    def test_dataloader(self) -> OrderedLoader[Batch]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> OrderedLoader[Batch]:
        """Batches of held-out prompts, padded on the left."""
        rows = range(len(self.held_out_rows))
        return self._loader(rows, collate=lambda batch, _: self.prompt_batch(batch))

    def prompt_batch(self, rows: Sequence[int]) -> Batch:
        """Return the prompts of these held-out rows, padded on the left for generation."""
        prompts = [self.held_out_rows[row][0] for row in rows if row is not None]
        return pad_prompts(encode_prompts(self.tokenizer, prompts, self.templated), self.pad_id)

    @property
    def pad_id(self) -> int:
        """Id that fills the ends of short rows; never seen by loss or attention."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.tokenizer.eos_token_id or 0)

    @property
    def largest_token_id(self) -> int:
        """The largest id of all examples, for comparison with a model's vocabulary."""
        return max(b.largest_token_id() for b in (self.train, self.held_out) if b is not None)

    def _loader(
        self,
        dataset: Any,
        collate: Callable[[Sequence[Any], Any], Batch] | None = None,
        shuffle: bool = False,
        step_value: Any = None,
    ) -> OrderedLoader[Batch]:
        trainer = self.trainer
        return OrderedLoader(
            dataset,
            self.batch_size,
            collate or partial(collate_blocks, pad_id=self.pad_id),
            shuffle=shuffle,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            num_workers=self.num_workers,
            step_value=step_value,
            pin_memory=bool(trainer and trainer.strategy.root_device.type == "cuda"),
        )

    def _step_targets(self, order: list[list[list[int | None]]]) -> list[float]:
        """Return for each batch the targets of its optimizer step, per micro-batch and process."""
        assert self.train is not None
        targets = self.train.targets
        counts = [
            sum(int(targets[i]) for rows in batch for i in rows if i is not None) for batch in order
        ]
        micro = self.trainer.accumulate_grad_batches if self.trainer else 1
        world_size = self.trainer.world_size if self.trainer else 1
        return [
            max(1, sum(counts[i - i % micro : i - i % micro + micro])) / (micro * world_size)
            for i in range(len(order))
        ]

    def _load(self, stage: str) -> None:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.tokenizer_name)
        if self.held_out is not None and (stage != "fit" or self.train is not None):
            return
        train = find_rows(self.path, "train", self.subset)
        held_out = find_rows(self.path, "held_out", self.subset)
        if train is None:
            raise UserError(f"{self.path} has no training split.")
        own_split = held_out is not None
        self.held_out, texts = self._part("held-out", held_out or train, own_split)
        self.held_out_rows = [(prompt, response) for prompt, response in texts]
        if stage == "fit":
            self.train, _ = self._part("training", train, own_split)

    def _part(self, name: str, rows: Rows, own_split: bool) -> tuple[Blocks, list[list[str]]]:
        """Return the blocks and texts of a part of the data, from its cache."""
        held_out = name == "held-out"
        packing = self.packing and not held_out

        def build(folder: Path) -> None:
            opened = rows.open()
            numbers = self._select(len(opened), held_out, own_split)
            PartBuilder(self._encoding(packing), opened, numbers, rows.name).write(folder, held_out)

        folder = cached_folder(self._key(name, rows, own_split), build)
        blocks = Blocks(folder / BLOCKS_FILE)
        counts = Counts(**json.loads((folder / COUNTS_FILE).read_text(encoding="utf-8")))
        self.counts[name] = counts
        rank_zero_info(f"data: {name}: {counts}{self._fill(blocks) if packing else ''}")
        if counts.rows and not len(blocks):
            raise UserError(
                f"No {name} row of {self.path} has a target within max_length = {self.max_length} "
                "tokens; raise data.max_length."
            )
        return blocks, json.loads((folder / TEXTS_FILE).read_text(encoding="utf-8"))

    def _key(self, name: str, rows: Rows, own_split: bool) -> str:
        return cache_key(
            {
                "part": name,
                "rows": rows.identity(),
                "own_split": own_split,
                "tokenizer": tokenizer_identity(self.tokenizer),
                "template": _source(type(self)),
                "settings": {name: getattr(self, name) for name in (*SETTINGS, *self.settings)},
            }
        )

    def _encoding(self, packing: bool) -> Encoding:
        return Encoding(
            tokenizer=self.tokenizer,
            render=self.render,
            columns=self.columns,
            optional_columns=self.optional_columns,
            templated=self.templated,
            max_length=self.max_length,
            packing=packing,
            train_on_prompt=self.train_on_prompt,
            skip_bad_rows=self.on_bad_row == "skip",
        )

    def _fill(self, blocks: Blocks) -> str:
        share = sum(blocks.sizes()) / max(1, len(blocks) * self.max_length)
        return f"; packed into {len(blocks)} blocks of {self.max_length}, {share:.1%} full"

    def _select(self, total: int, held_out: bool, own_split: bool) -> list[int]:
        """Return the numbers of the rows of a part, in the part's order."""
        count = self.held_out_examples
        if own_split and held_out:
            return list(range(total if count is None else min(count, total)))
        order = random.Random(self.seed).sample(range(total), total)
        if not own_split:
            count = count or 0
            if count >= total:
                raise UserError(
                    f"{self.path} has {total} rows, of which held_out_examples takes {count}: "
                    "none is left to train on."
                )
            if held_out:
                return order[:count]
            order = order[count:]
        return order[: self.num_examples]


def _source(kind: type) -> str:
    """Return the code of a DataModule, so that another template has another cache."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed into an interpreter
        return kind.__qualname__
