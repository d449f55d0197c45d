"""Under `test`: let the model answer, and count the answers that the data calls right."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric, SumMetric
from tqdm.auto import tqdm
from typing_extensions import final

from rslightning.callbacks.merge_adapters import run_folder
from rslightning.errors import UserError

ANSWERS_FILE: Final = "test_answers.jsonl"

NEEDED: Final = ("predict_dataloader", "held_out_rows", "tokenizer", "batch_size")
"""What a DataModule that can score must offer besides."""


class Answer(NamedTuple):
    """One line of the file."""

    prompt: str
    answer: str
    reference: str
    right: bool


@final
class ScoreAnswers(Callback):
    """Generate an answer to every row under test, in batches, and score it.

    Acts on `test` alone, and only if the DataModule has a method
    `score_answer(answer, reference) -> bool`, as GSM8K has; else nothing is generated. Answers are
    those of `predict`, up to the tokenizer's end of sequence; the module's `max_new_tokens` limits
    them, and `limit_test_batches` their number. Of several processes each answers its share.

    Every answer is written to `test_answers.jsonl` in the run folder: prompt, answer, reference,
    right. Of several processes each writes its own file, with its rank before the name.

    Args:
        examples: How many of the first process's answers are shown in TensorBoard.

    Raises:
        UserError: If `examples` is negative, or the data can score and the module or the data
            cannot answer.

    Logs:
        test/exact_match: share of the answers that are right, over all processes; once per pass.
        test/answers_cut: share that `max_new_tokens` cut off, which are seldom right.
        test/rows: number of answers.
        test/answers: the first answers, as text, where the logger is TensorBoard's.
    """

    def __init__(self, examples: int = 4) -> None:
        if examples < 0:
            raise UserError(f"score_answers.examples must not be negative, got {examples}.")
        self.examples = examples

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before the pass whether there can be answers."""
        data = _scoring_data(trainer)
        if data is None:
            return
        if not hasattr(pl_module, "generate") or not all(hasattr(data, name) for name in NEEDED):
            raise UserError(
                "score_answers needs a CausalLMModule and one of rslightning.data, or null."
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, score, write and log."""
        if _scoring_data(trainer) is None:
            return
        metrics = {"exact_match": MeanMetric(), "answers_cut": MeanMetric(), "rows": SumMetric()}
        for metric in metrics.values():
            metric.to(pl_module.device)
        path, shown = _answers_file(trainer), list[Answer]()
        precision = trainer.precision_plugin.forward_context()
        with _observed(pl_module), precision, path.open("w", encoding="utf-8") as file:
            for answers, is_cut in _answers(trainer, pl_module):
                right = torch.tensor([answer.right for answer in answers], device=is_cut.device)
                metrics["exact_match"].update(right.float())
                metrics["answers_cut"].update(is_cut.float())
                metrics["rows"].update(len(answers))
                shown += answers[: self.examples - len(shown)]
                file.writelines(_json_line(answer) for answer in answers)
        for name, metric in metrics.items():  # the same on all processes by now
            pl_module.log(f"test/{name}", metric.compute(), sync_dist=True)
        _show(trainer, shown)
        rank_zero_info(f"answers: {path}")


def _scoring_data(trainer: Trainer) -> Any:
    """Return the DataModule if it can score answers."""
    data = getattr(trainer, "datamodule", None)
    return data if getattr(data, "score_answer", None) is not None else None


def _answers_file(trainer: Trainer) -> Path:
    rank = f"{trainer.global_rank}." if trainer.world_size > 1 else ""
    folder = run_folder(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{rank}{ANSWERS_FILE}"


def _answers(trainer: Trainer, module: Any) -> Iterator[tuple[list[Answer], Tensor]]:
    """Yield this process's answers batch by batch, and which of them were cut off."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    end, special = data.tokenizer.eos_token_id, data.tokenizer.all_special_ids
    loader = data.predict_dataloader()
    batches = limited(len(loader), trainer.limit_test_batches)
    silent = not trainer.is_global_zero or trainer.progress_bar_callback is None
    numbered = zip(range(batches), loader, strict=False)
    for number, batch in tqdm(numbered, "answers", batches, disable=silent):
        batch = trainer.strategy.batch_to_device(batch, module.device)
        ids = module.predict_step(batch, number)
        # Processes take batches in turn, in the order of the rows; see `OrderedLoader`.
        first = (number * trainer.world_size + trainer.global_rank) * data.batch_size
        answers = [_score(data, *row) for row in enumerate(up_to_end(ids, end), first)]
        yield answers, ~torch.isin(ids, ids.new_tensor(special)).any(dim=1)


def _score(data: Any, row: int, ids: Tensor) -> Answer:
    prompt, reference = data.held_out_rows[row]
    answer = data.tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(prompt, answer, reference, bool(data.score_answer(answer, reference)))


def up_to_end(ids: Tensor, end: int | None) -> list[Tensor]:
    """Return each row of `ids` up to its first `end`: what comes after it fills up the batch.

    Shape:
        ids [B, T] int64.
    """
    if end is None:
        return list(ids)
    lengths = ((ids == end).cumsum(dim=1) == 0).sum(dim=1).tolist()
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def limited(batches: int, limit: float) -> int:
    """Return how many of `batches` a limit leaves: a number of them (int) or a share (float)."""
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)


@contextmanager
def _observed(module: nn.Module) -> Iterator[None]:
    """Evaluate a module; leave its modes and all random states as they were."""
    modes = {child: child.training for child in module.modules()}
    try:
        with isolate_rng():
            module.eval()
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def _json_line(answer: Answer) -> str:
    return json.dumps(answer._asdict(), ensure_ascii=False) + "\n"


def _show(trainer: Trainer, answers: list[Answer]) -> None:
    """Write answers as one text of TensorBoard, which reads it as Markdown."""
    if not answers or not trainer.is_global_zero:
        return
    text = "\n\n---\n\n".join(_as_markdown(answer) for answer in answers)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("test/answers", text, trainer.global_step)


def _as_markdown(answer: Answer) -> str:
    """Indent the texts, so that Markdown changes nothing in them."""
    parts = [f"**{'right' if answer.right else 'wrong'}**"]
    for name in ("prompt", "answer", "reference"):
        lines = getattr(answer, name).splitlines() or ["(nothing)"]
        parts += [f"{name}:", "\n".join(f"    {line}" for line in lines)]
    return "\n\n".join(parts)
