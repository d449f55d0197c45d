"""The base of all DataModules: rows -> turns -> ids and labels -> packed blocks -> `Batch`."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rslightning.batch import Batch
from rslightning.data.blocks import Block, Blocks
from rslightning.data.build import BLOCKS_FILE, COUNTS_FILE, TEXTS_FILE, Encoding, write_part
from rslightning.data.cache import cache_key, cached_folder
from rslightning.data.collate import collate_blocks, pad_prompts
from rslightning.data.encode import Counts, Turns, encode_prompts
from rslightning.data.loader import OrderedLoader
from rslightning.data.parts import Partition
from rslightning.data.rows import Rows, TextUnit, check_columns, find_rows
from rslightning.data.steps import OptimizerSteps
from rslightning.data.stream import ChunkReader, Position, StreamLoader
from rslightning.data.template import template_source
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

    A subclass names its columns and renders a row; everything else is here. What it renders is
    kept, tokenized, until its code changes (see `template_source` for what is seen of that).

    Args:
        path: Hub name, folder (files named after their splits) or file (JSON, Parquet, CSV, text).
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
        on_bad_row: `error` stops at a row that cannot be used; `skip` counts it, as long as there
            are others.
        seed: Draws the subset and the order of the rows.
        num_workers: Processes that read and collate batches ahead.
        streaming: Encode and pack the training rows as they are read, for data that is too large
            to be prepared before the first step. The run's length is then `trainer.max_steps`, and
            what is held out is the beginning of the data where it has no split for that.
        shuffle_buffer: Where streaming, how many successive rows are shuffled and packed together.

    Raises:
        UserError: If the path, a column or the tokenizer is missing, a row cannot be used, no
            example has a target, or `streaming` meets an option that it cannot follow.
    """

    columns: tuple[str, ...]
    optional_columns: ClassVar[tuple[str, ...]] = ()
    subset: ClassVar[str | None] = None
    templated: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()
    text_unit: TextUnit = "line"

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
        streaming: bool = False,
        shuffle_buffer: int = 2000,
    ) -> None:
        super().__init__()
        for name, value, least, null in (
            ("max_length", max_length, 1, ""),
            ("batch_size", batch_size, 1, ""),
            ("shuffle_buffer", shuffle_buffer, 1, ""),
            ("num_examples", num_examples, 1, ", or null for all rows"),
            ("held_out_examples", held_out_examples, 0, ", or null for a whole split"),
        ):
            if value is not None and value < least:
                raise UserError(f"data.{name} must be at least {least}{null}, got {value}.")
        if streaming and num_examples is not None:
            raise UserError(
                "data.num_examples draws from all rows, which a stream has not read: leave it null "
                "and set trainer.max_steps, or turn data.streaming off."
            )
        if streaming and held_out_examples is None:
            raise UserError(
                "data.held_out_examples: null takes a whole split, which is prepared before the "
                "first step: with data.streaming give a number."
            )
        self.path, self.tokenizer_name = path, tokenizer
        self.max_length, self.batch_size, self.packing = max_length, batch_size, packing
        self.num_examples, self.held_out_examples = num_examples, held_out_examples
        self.train_on_prompt, self.on_bad_row = train_on_prompt, on_bad_row
        self.seed, self.num_workers = seed, num_workers
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.tokenizer: Any = None
        self.train: Blocks | None = None
        self.held_out: Blocks | None = None
        self._held_out_part: str | None = None
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
        verb = self.trainer.state.fn if self.trainer is not None else None
        self._load("fit" if verb is None else verb.value)

    def setup(self, stage: str) -> None:
        """Open the caches; every process sees the same blocks.

        Raises:
            UserError: If the training data is streamed and `trainer.max_steps` is not set.
        """
        if self.streaming and stage == "fit" and self.trainer and self.trainer.max_steps < 0:
            raise UserError("data.streaming needs trainer.max_steps: a stream has no end.")
        self._load(stage)

    def train_dataloader(self) -> OrderedLoader[Batch] | StreamLoader[Batch]:
        """Batches of packed training blocks, in an order drawn from `seed` and the pass."""
        if self.streaming:
            return self._stream_loader()
        assert self.train is not None
        return self._loader(self.train, shuffle=True, step_value=self._step_targets)

    def training_blocks(self) -> Sequence[Block]:
        """Return the training blocks; of a stream those of the first chunk."""
        if self.train is not None:
            return self.train
        return next(self._chunk_reader().read(Position())).blocks

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
        trainer, steps = self.trainer, OptimizerSteps(self.trainer)
        return OrderedLoader(
            dataset,
            self.batch_size,
            collate or partial(collate_blocks, pad_id=self.pad_id),
            shuffle=shuffle,
            seed=self.seed,
            rank=steps.rank,
            world_size=steps.processes,
            num_workers=self.num_workers,
            step_value=step_value,
            limit=steps.limit,
            pin_memory=bool(trainer and trainer.strategy.root_device.type == "cuda"),
        )

    def _step_targets(self, order: list[list[list[int | None]]]) -> list[float]:
        """Return `Batch.step_targets` for each batch of a pass."""
        assert self.train is not None
        targets = self.train.targets
        return OptimizerSteps(self.trainer).share_targets(
            [
                sum(int(targets[i]) for rows in batch for i in rows if i is not None)
                for batch in order
            ]
        )

    def _stream_loader(self) -> StreamLoader[Batch]:
        trainer, steps = self.trainer, OptimizerSteps(self.trainer)
        self.counts["training"] = Counts()

        def collate(blocks: Sequence[Block], targets: Tensor) -> Batch:
            return collate_blocks(blocks, targets / steps.shares, pad_id=self.pad_id)

        return StreamLoader(
            self._chunk_reader(),
            self.batch_size,
            collate,
            num_workers=self.num_workers,
            length=trainer.max_steps * trainer.accumulate_grad_batches if trainer else None,
            limit=steps.limit,
            window=steps.window,
            gather=steps.gather,
            on_chunk=self.counts["training"].add,
        )

    def _chunk_reader(self) -> ChunkReader:
        train, held_out = self._find("train"), self._find("held_out")
        steps = OptimizerSteps(self.trainer)
        assert train is not None
        return ChunkReader(
            train,
            self._encoding(self.packing),
            self.shuffle_buffer,
            skip_rows=0 if held_out else self.held_out_examples or 0,
            seed=self.seed,
            rank=steps.rank,
            world_size=steps.processes,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """On a GPU, fill up packed batches to `max_length`, others in a fit's first two steps.

        Packed rows are nearly full, and a compiler has one shape of them to translate. Of others no
        later step takes more memory: what does not fit is found out at once, and `RunSummary`
        compares. Loss and gradients are those without, to rounding.
        """
        trainer = self.trainer
        if trainer is None or not trainer.training or not _is_on_gpu(batch.input_ids):
            return batch
        due = self.packing or trainer.global_step < 2
        return batch.filled_up(self.max_length) if due else batch

    def teardown(self, stage: str) -> None:
        """Say what became of the rows of a stream."""
        if self.streaming and stage == "fit" and "training" in self.counts:
            rank_zero_info(f"data: training: {self.counts['training']} (first process)")

    def _load(self, stage: str) -> None:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.tokenizer_name)
        held_out = "test" if stage == "test" else "held-out"
        train_too = stage == "fit" and not self.streaming
        if held_out == self._held_out_part and not (train_too and self.train is None):
            return
        train, own = self._find("train"), self._find(held_out.replace("-", "_"))
        if train is None:
            raise UserError(f"{self.path} has no training split.")
        self.held_out, texts = self._part(held_out, own or train, own is not None)
        self.held_out_rows = [(prompt, response) for prompt, response in texts]
        self._held_out_part = held_out
        if train_too:
            self.train, _ = self._part("training", train, own is not None)

    @property
    def _partition(self) -> Partition:
        return Partition(self.num_examples, self.held_out_examples, self.seed, self.streaming)

    def _find(self, split: str) -> Rows | None:
        return find_rows(self.path, split, self.subset, self.streaming, self.text_unit)

    def _part(self, name: str, rows: Rows, own_split: bool) -> tuple[Blocks, list[list[str]]]:
        """Return the blocks and texts of a part of the data, from its cache."""
        training = name == "training"
        packing = self.packing and training

        def build(folder: Path) -> None:
            if self.columns:
                check_columns(rows.columns(), self.columns, rows.name)
            numbers = self._partition.select(rows, name, own_split)
            total = rows.count() if numbers is None else len(numbers)
            encoding = self._encoding(packing)
            chosen = rows.pick(numbers)
            write_part(folder, encoding, chosen, total, not training, self.seed)

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
                "rows": self._partition.identity(rows, name, own_split),
                "own_split": own_split,
                "tokenizer": tokenizer_identity(self.tokenizer),
                "template": template_source(type(self), TextDataModule),
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


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"
