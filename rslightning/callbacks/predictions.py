"""Write what `predict` generates."""

import json
from pathlib import Path
from typing import Any, Final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import final

from rslightning.callbacks.merge_adapters import run_folder

PREDICTIONS_FILE: Final = "predictions.jsonl"


@final
class WritePredictions(Callback):
    """Write prompt, answer and reference of every predicted row as JSON lines, batch by batch.

    The file is `predictions.jsonl` in the run folder; of several processes each writes its own,
    with its rank before the name. Works with a `TextDataModule`.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty file."""
        rank = f"{trainer.global_rank}." if trainer.world_size > 1 else ""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{rank}{PREDICTIONS_FILE}"
        self._path.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append one line per row."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert self._path is not None
        # Processes take batches in turn, in the order of the rows; see `OrderedLoader`.
        first = (batch_idx * trainer.world_size + trainer.global_rank) * data.batch_size
        with self._path.open("a", encoding="utf-8") as file:
            for row, ids in enumerate(outputs, first):
                prompt, reference = data.held_out_rows[row]
                answer = data.tokenizer.decode(ids, skip_special_tokens=True)
                line = {"prompt": prompt, "answer": answer, "reference": reference}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the file is."""
        rank_zero_info(f"predictions: {self._path}")
