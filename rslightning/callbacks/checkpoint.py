"""Checkpoints that are counted in optimizer steps, of the trainable state."""

import errno
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer
from typing_extensions import final

from rslightning.callbacks.due_validation import is_validation_due, let_begin, validate_now
from rslightning.callbacks.merge_adapters import run_folder
from rslightning.callbacks.non_finite_guard import NonFiniteError
from rslightning.callbacks.stop_on_signal import StopNow
from rslightning.checkpoint_folder import (
    CHECKPOINTS,
    STEP_NAME,
    list_steps,
    point_last,
    step_name,
)
from rslightning.errors import RunError, StoppedError, UserError
from rslightning.manifest import write_manifest
from rslightning.storage import put_in_place, reason_of, remove

PARTIAL: Final = ".partial.ckpt"
PROBE_BYTES: Final = 2**20


@final
class TrainableCheckpoint(Checkpoint):
    """Save every n optimizer steps and at the end of training; keep the newest few.

    Files are `checkpoints/step-N.ckpt` in the run folder, and `last.ckpt` is a link to the newest.
    What they hold is the module's business: a `CausalLMModule` saves its trainable state, the
    optimizer's and the loops'. Each is written under another name, flushed, and gets its own when
    it is whole: whenever a process dies, or its machine, the checkpoints of before can be read.

    Where the disk refuses (it is full, or the folder is gone), a warning says so, the checkpoints
    of before stay, and the next one is due at the next interval; if the last one fails, too, so
    does the run, after whatever else it can still write.

    A validation that is due after a saved step, and was not over when the run ended, is made before
    the run goes on.

    A signal that ends the run (`StopOnSignal`) leaves the state of its last whole step. So does any
    exception: the run that goes on repeats the step that failed. Where there are several processes,
    only one that all of them raise at the same step does (`NonFiniteGuard`'s): for any other those
    that save would wait for those that compute, and the run would hang.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        keep_last: How many of the newest stay.

    Raises:
        ValueError: If one of them is not positive.
        UserError: If checkpoints are written by `AsyncCheckpointIO`.
        RunError: At the end of the fit, if the final state could not be saved.
    """

    def __init__(self, every_n_steps: int = 500, keep_last: int = 2) -> None:
        for name, value in {"every_n_steps": every_n_steps, "keep_last": keep_last}.items():
            if value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; it must be positive.")
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self.dirpath: str | None = None
        self.problem: str | None = None
        self._saved_step = 0  # nothing is worth saving before the first step
        self._between_steps: dict[str, Any] | None = None  # the fit loop's state after a step
        self._seen_step = 0  # a batch may have several
        self._steps = False  # whether an optimizer step is being made
        self._validates = False  # whether a validation is due or under way
        self._max_steps: int | None = None  # to give back: see `let_begin`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, the same for all processes; forget a fit that failed."""
        if stage == "fit":
            self.problem = self._between_steps = self._max_steps = None
            self._steps = self._validates = False
        self.dirpath = trainer.strategy.broadcast(str(run_folder(trainer) / CHECKPOINTS))
        if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise UserError(
                "AsyncCheckpointIO does not tell when a file is whole, and a checkpoint gets its "
                "name only then: leave it out of trainer.plugins."
            )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = FileIO()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the folder in order: a process that was killed may not have come to it."""
        assert self.dirpath is not None
        start, folder = Path(trainer.ckpt_path or ""), Path(self.dirpath)
        match = STEP_NAME.fullmatch(start.name)
        if match and start.parent.resolve() == folder.resolve() and trainer.is_global_zero:
            self._make_newest(folder, int(match[1]))
        if self._validates:
            self._max_steps = let_begin(trainer, self._saved_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step that the run goes on from; make the validation that it has left due."""
        self._saved_step = self._seen_step = trainer.global_step
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        if self._validates:
            validate_now(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that what was due is done."""
        self._validates = False

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Note that the weights are about to change."""
        self._steps = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimizer steps only: gradients of a begun one are in no checkpoint."""
        if trainer.fit_loop._should_accumulate() or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._step_is_over(trainer)
        passed, self._seen_step = self._seen_step, trainer.global_step
        if trainer.global_step // self.every_n_steps > passed // self.every_n_steps:
            self._log_step(trainer)
            self.save(trainer, f"; the next one is due in {self.every_n_steps} steps")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state, whatever the interval; a dry run leaves nothing."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fail if the final state is not on the disk; other callbacks have written theirs."""
        if self.problem:
            raise RunError(f"The final state is in no checkpoint: {self.problem}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the state after the last whole step, if all processes are here to save it.

        Raises:
            RunError: If a signal ended the run, and that state could not be saved.
        """
        together = isinstance(exception, NonFiniteError | SIGTERMException | StoppedError)
        if isinstance(exception, StopNow) or (trainer.world_size > 1 and not together):
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._is_between_callbacks(trainer):  # one before this failed
            self._step_is_over(trainer)
            self._log_step(trainer)
        if isinstance(exception, NonFiniteError):
            self._steps = False  # it is raised before the step is made
        if self._between_steps is not None and not self._steps:
            self.save(trainer)
        if isinstance(exception, StoppedError) and self.problem:
            raise RunError(f"{exception}, and that step is in no checkpoint: {self.problem}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a run that goes on begin right after the last step, whenever that was saved.

        Of a step that failed it repeats the batches. After the end of an epoch Lightning would
        count one more, which it begins with the loader's first pass, or leaves after one batch.
        """
        if self._is_between_callbacks(trainer):  # one before this saves
            self._step_is_over(trainer)
        if self._between_steps is not None:
            checkpoint["loops"]["fit_loop"] = self._between_steps
        checkpoint["validation_due"] = self._validates

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Learn whether a validation is due."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._validates = checkpoint.get("validation_due", False)
        self._saved_step = checkpoint["global_step"]
        if self._validates and trainer.strategy.restore_checkpoint_after_setup:  # and fit start
            self._max_steps = let_begin(trainer, self._saved_step)

    def _is_between_callbacks(self, trainer: Trainer) -> bool:
        """Tell whether an optimizer step is made, and this callback has not been told of it."""
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return self._steps and bool(batches.processed == batches.ready)

    def _step_is_over(self, trainer: Trainer) -> None:
        self._steps = False
        self._between_steps = trainer.fit_loop.state_dict()
        self._validates = is_validation_due(trainer)

    def _log_step(self, trainer: Trainer) -> None:
        """Log what Lightning logs after the save: a process killed between would lack it."""
        trainer._logger_connector.update_train_step_metrics()

    def save(self, trainer: Trainer, then: str = "") -> None:
        """Save what the last optimizer step left, unless that is done; all processes call it."""
        step = trainer.global_step
        if step == self._saved_step and not self.problem:
            return
        assert self.dirpath is not None
        folder = Path(self.dirpath)
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.save()  # what was logged up to here is on its way to the disk before
        self.problem = save_whole(trainer, folder / step_name(step))
        if self.problem is None and trainer.is_global_zero:
            self.problem = self._make_newest(folder, step)
        self.problem = trainer.strategy.broadcast(self.problem)
        if self.problem:
            rank_zero_warn(
                f"{folder / step_name(step)} could not be saved: {self.problem} "
                f"{_describe_kept(folder)}{then}."
            )
            return
        self._saved_step = step
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.after_save_checkpoint(self)  # type: ignore[arg-type]

    def _make_newest(self, folder: Path, step: int) -> str | None:
        """Let `last.ckpt` be the checkpoint of a step, and remove those before that are over."""
        try:
            point_last(folder, step)
        except OSError as error:
            return f"{reason_of(error)}."
        for number, path in list_steps(folder)[: -self.keep_last]:
            if number < step:
                remove(path)
        return None


class FileIO(TorchCheckpointIO):
    """Writes a checkpoint straight into its file, and remembers an error instead of raising it.

    Lightning's own makes a copy in memory first. Only the first process writes; were it to raise,
    the others would wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problem: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the file; `problem` says what came between."""
        self.problem = None
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, path)
        except OSError as error:
            self.problem = error


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:  # torch's writer keeps the system's reason to itself
        with path.open("ab") as file:
            file.write(bytes(PROBE_BYTES))
        raise OSError(errno.EIO, str(error).partition("\n")[0]) from error


def save_whole(trainer: Trainer, path: Path) -> str | None:
    """Save a checkpoint, file or folder, that has its name when it is whole; all processes call it.

    Args:
        trainer: Whose state is saved, as its strategy does.
        path: The file or folder, the same on all processes; it may replace another.

    Returns:
        What came between, the same on all processes; None if it is saved.
    """
    aside = path.with_name(PARTIAL)
    _clear(trainer, aside)  # what a run that died left
    trainer.strategy.barrier()
    problem: OSError | None = None
    try:
        trainer.save_checkpoint(aside, weights_only=False)
        problem = getattr(trainer.strategy.checkpoint_io, "problem", None)
        trainer.strategy.barrier()
        if trainer.is_global_zero and problem is None:
            if aside.is_dir():
                write_manifest(aside)
            put_in_place(aside, path)
    except OSError as error:
        if isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.world_size > 1:
            raise  # its other processes may be waiting: the run has to end
        problem = error
    _clear(trainer, aside)
    said = f"{reason_of(problem)}." if problem else None
    return trainer.strategy.broadcast(said)


def _clear(trainer: Trainer, path: Path) -> None:
    if trainer.is_global_zero:
        with suppress(OSError):  # which the writing will meet again
            remove(path)


def _describe_kept(folder: Path) -> str:
    steps = list_steps(folder)
    return f"{steps[-1][1].name} stays the newest" if steps else "There is none of before"
