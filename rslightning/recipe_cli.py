"""LightningCLI over our module and any DataModule, with a group of options for each callback.

The configuration's top level holds `model`, `data`, `trainer` and one group per callback of ours,
because groups merge across several `--config` files where lists are replaced.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Final, get_args

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from rslightning.callbacks import (
    ActivationMomentMonitor,
    BeforeAfter,
    GradientNormMonitor,
    MergeAdapters,
    NonFiniteGuard,
    RankStabilityReport,
    RunSummary,
    ScoreAnswers,
    StopOnSignal,
    TensorBoardPanels,
    TokenThroughputMonitor,
    TrainableCheckpoint,
)
from rslightning.callbacks.merge_adapters import run_folder
from rslightning.callbacks.predictions import WritePredictions
from rslightning.callbacks.stop_evaluation import StopEvaluation
from rslightning.checkpoint import load_adapter, read_checkpoint
from rslightning.checkpoint_folder import (
    ADAPTER_FOLDER,
    CHECKPOINTS,
    MERGED_FOLDER,
    list_steps,
)
from rslightning.cli_errors import explain
from rslightning.data import TextDataModule
from rslightning.errors import RunError, UserError
from rslightning.hyperparameters import short_name
from rslightning.launch import CHILDREN
from rslightning.limits import check_limits
from rslightning.model_folder import ModelFolder, find_model_folder
from rslightning.module import CausalLMModule
from rslightning.plan import device_memory, read_plan
from rslightning.plan_text import describe_ways_out
from rslightning.redaction import redact_values
from rslightning.resolve import resolve_devices, resolve_rank, resolve_start
from rslightning.resume import hold
from rslightning.run_config import describe_changes, newest_config, next_config
from rslightning.storage import write_text

# Group name -> (type, default). `null` turns a group off. They run in this order, the summary last.
GROUPS: Final[dict[str, tuple[Any, dict[str, Any] | None]]] = {
    "gradient_norm": (GradientNormMonitor | None, {}),
    "activation_moments": (ActivationMomentMonitor | None, {}),
    "throughput": (TokenThroughputMonitor | None, {}),
    "rank_stability": (RankStabilityReport | None, None),
    "non_finite_guard": (NonFiniteGuard | None, {}),
    "merge_adapters": (MergeAdapters | None, {}),
    "before_after": (BeforeAfter | None, None),
    "checkpoint": (TrainableCheckpoint | None, {}),
    "score_answers": (ScoreAnswers | None, {}),
}

DESCRIBE: Final = ("config.yaml", "hparams.yaml")  # a run, and are written before its first step

EVENTS: Final = re.compile(r"events\.out\.tfevents\.(\d+)\.")  # with the second they began

SUBCOMMANDS: Final = ("fit", "validate", "test", "predict")


class SaveRunConfig(SaveConfigCallback):
    """Write the resolved configuration into the run folder: `config.yaml`, then `config.resume-N`.

    A run that goes on in the same folder must neither fail nor overwrite how it began.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: a run that is refused until the fit starts leaves no folder."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file on the first process before anything is trained."""
        folder = run_folder(trainer)  # asks all processes for the same name
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            hold(folder)
            # Not `parser.save`: it enters the folder for a moment, in which the thread that writes
            # TensorBoard's files would not find them where their relative paths say.
            text = self.parser.dump(self.config, skip_none=False)
            write_text(next_config(folder), _without_secrets(text))


class RecipeCLI(LightningCLI):
    """LightningCLI over `CausalLMModule` and any DataModule."""

    def __init__(self, args: Sequence[str], run: bool = True, build: bool = True) -> None:
        self.runs, self.build, self.began = run, build, int(time.time())
        quiet = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            CausalLMModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            # Our loaders shard by themselves; Lightning's sampler would always shuffle.
            trainer_defaults={"enable_model_summary": False, "use_distributed_sampler": False},
            parser_kwargs={**quiet, **dict.fromkeys(SUBCOMMANDS, quiet)},
            load_from_checkpoint_support=False,
            args=list(args),
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups of our callbacks, and hand the base model's name to the tokenizer."""
        for name, (kind, default) in GROUPS.items():
            parser.add_argument(f"--{name}", type=kind, default=default)
        parser.add_argument("--auto_resume", type=bool, default=False)
        if not self.runs:  # they are of a verb, and stand in what a fit has saved
            for name in ("ckpt_path", "weights_only"):
                parser.add_argument(f"--{name}", type=Any, default=None)
        parser.link_arguments("model.base_model", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what `run` was given; Lightning warns of arguments beside `sys.argv`.

        Words that stand for a value get it here, before anything is built or written.
        """
        self.config = parser.parse_args(args)
        verb = self.config.get("subcommand")
        config = self.config if verb is None else self.config[verb]
        check_limits(config.as_dict())
        if self.build:
            if verb is not None:
                resolve_devices(config)
                resolve_start(config, verb, lambda: _plain(self._parser(verb), config))
            resolve_rank(config, verb is not None)

    def instantiate_classes(self) -> None:
        """Build everything; what a class says of its arguments is the user's business."""
        if not self.build:
            self.subcommand = None  # there is nothing to run, either
            return
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(explain(str(error), known_keys())) from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; where memory runs out, say what would need less."""
        try:
            super()._run_subcommand(subcommand)
        except UserError:
            _remove_unbegun(self.trainer, self.began)
            raise
        except torch.OutOfMemoryError as error:
            raise RunError(_describe_lack(self.config[subcommand].as_dict())) from error

    def before_fit(self) -> None:
        """Refuse a base that is not whole, and a checkpoint that this run cannot go on from.

        And a folder whose run would be overwritten. Now, and not after the data are tokenized,
        which may take long.
        """
        base = ModelFolder(find_model_folder(self.model.base_model))
        if self.model.pretrained:
            base.check_weights()
        path = self._get(self.config, "ckpt_path")
        if path is None:
            _refuse_used(self.trainer)
            return
        content = read_checkpoint(Path(path))
        self.model.refuse_other_structure(content.get("hyper_parameters") or {})
        in_parts = isinstance(self.trainer.strategy, DeepSpeedStrategy | ModelParallelStrategy)
        if Path(path).is_dir() and not in_parts:
            raise UserError(
                f"{path} was written in parts, from which {type(self.trainer.strategy).__name__} "
                "cannot go on: take the strategy that wrote it, or begin anew from its adapters "
                f"with --model.start_from {path}."
            )
        _keep_metrics(self.trainer)
        if 0 <= self.trainer.max_steps <= (step := content.get("global_step", 0)):
            rank_zero_info(
                f"{path} is of step {step}, and trainer.max_steps is {self.trainer.max_steps}: "
                "nothing is left to train."
            )
        self._tell_changes(Path(path).absolute().parent)

    def _tell_changes(self, checkpoints: Path) -> None:
        """Say in what the configuration differs from that of the run up to now."""
        saved = newest_config(checkpoints.parent) if checkpoints.name == CHECKPOINTS else None
        now = _plain(self._parser(self.subcommand), self.config[self.subcommand])
        if saved is not None and (changes := describe_changes(saved, now)):
            rank_zero_info(changes)

    def before_validate(self) -> None:
        """Take the adapter of the checkpoint alone: of any strategy and number of processes."""
        path = self._get(self.config, "ckpt_path")
        if path is None or self.model.adapter is None:
            return
        base, own = load_adapter(path).base_model, short_name(self.model.base_model)
        if base is not None and short_name(base) != own:
            raise UserError(
                f"{path} has base_model {short_name(base)!r}, this run {own!r}; set it to that or, "
                "where it has another name now, give --model.start_from in place of --ckpt_path."
            )
        self.model.start_from = path
        self.config_init[self.subcommand]["ckpt_path"] = None

    before_test = before_predict = before_validate

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the callbacks of all groups that are on."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        groups = [self._get(self.config_init, name) for name in GROUPS]
        ours = [callback for callback in groups if callback is not None]
        ours += [TensorBoardPanels(), RunSummary()]
        if self.subcommand == "predict":
            ours.append(WritePredictions())
        ours.append(StopOnSignal() if self.subcommand == "fit" else StopEvaluation())
        if config.get("enable_progress_bar") is not False:
            ours.append(TQDMProgressBar())  # Lightning's choice depends on what else is installed
        if config.get("enable_checkpointing") is False or self.subcommand != "fit":
            ours = [callback for callback in ours if not isinstance(callback, TrainableCheckpoint)]
        if config.get("enable_checkpointing") is None and not _any_checkpoint(ours, config):
            config["enable_checkpointing"] = False  # or Lightning adds one of its own
        trainer = self._instantiate_trainer(config, ours)
        CHILDREN.watch(trainer.strategy.launcher)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint silently override the command line.

        What must not differ on resume is compared by `CausalLMModule.on_load_checkpoint`.
        """


def _refuse_used(trainer: Trainer) -> None:
    """Refuse to begin a run in the folder of another one, which would be overwritten in part."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    folder = run_folder(trainer)
    if list_steps(folder / CHECKPOINTS):
        raise UserError(
            f"{folder} holds a run already: --ckpt_path {folder} goes on with it; to begin anew, "
            "choose another folder, or remove it."
        )
    results = (folder / ADAPTER_FOLDER, folder / MERGED_FOLDER)
    if found := [result.name for result in results if result.exists()]:
        raise UserError(
            f"{folder} holds what another run has left ({', '.join(found)}): choose another "
            "folder, or remove it."
        )


def _remove_unbegun(trainer: Trainer, since: int) -> None:
    """Remove the folder of a run that was refused before its first step; what it held is told.

    Lightning's logger makes one even when the run is refused before the fit starts.

    Args:
        trainer: The run's.
        since: Second of the clock at which the command began: older curves are another run's, in
            a folder of a fixed name.
    """
    if trainer.global_step > 0:
        return
    for logger in trainer.loggers if trainer.is_global_zero else ():
        place = getattr(logger, "log_dir", None)
        if not place or not (folder := Path(place)).is_dir():
            continue
        others = {path.name for path in folder.iterdir()} - set(DESCRIBE)
        events = [EVENTS.match(name) for name in others]
        if events and all(found and int(found[1]) >= since for found in events):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.parent != Path(logger.save_dir or folder.parent):
                with suppress(OSError):  # it holds other runs
                    folder.parent.rmdir()


def _keep_metrics(trainer: Trainer) -> None:
    """Rename what a CSVLogger wrote of a run that goes on in its folder: it would delete it."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if not isinstance(logger, CSVLogger):
            continue
        path, number = Path(logger.log_dir, "metrics.csv"), 1
        while (aside := path.with_name(f"metrics.before-resume-{number}.csv")).exists():
            number += 1
        if path.exists():
            path.rename(aside)


def _any_checkpoint(ours: list[Any], config: dict[str, Any]) -> bool:
    theirs = config.get("callbacks") or []
    theirs = theirs if isinstance(theirs, list) else [theirs]
    return any(isinstance(callback, Checkpoint) for callback in [*ours, *theirs])


def _without_secrets(text: str) -> str:
    """Return a configuration, in YAML, with nothing changed but secrets."""
    plain = yaml.safe_load(text)
    hidden = redact_values(plain)
    return text if hidden == plain else yaml.safe_dump(hidden, sort_keys=False)


def _describe_lack(config: dict[str, Any]) -> str:
    """Return what to say where a device had too little memory."""
    memory = device_memory()
    if memory is None:
        return "The memory is used up."
    try:
        ways = describe_ways_out(read_plan(config), memory)
    except UserError as error:  # a model or data that no plan is made for
        ways = f"what would need less is not known: {error}"
    return f"The device is out of memory: {ways}"


def _plain(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """Return a configuration in plain values, as a run saves it."""
    plain: dict[str, Any] = redact_values(yaml.safe_load(parser.dump(config, skip_none=False)))
    return plain


def known_keys() -> Iterator[str]:
    """Yield every key of a configuration that can be known without choosing a class."""
    for name, kind in _sections():
        yield name
        for parameter, annotation in _parameters(kind):
            yield f"{name}.{parameter}"
            for option in get_args(annotation):
                if is_dataclass(option):
                    yield from (f"{name}.{parameter}.{f.name}" for f in fields(option))
    yield from ("config", "ckpt_path", "seed_everything", "auto_resume")


def _sections() -> Iterator[tuple[str, Any]]:
    yield "model", CausalLMModule
    yield "trainer", Trainer
    yield "data", TextDataModule
    yield "data.init_args", TextDataModule
    for name, (kind, _) in GROUPS.items():
        yield name, get_args(kind)[0]


def _parameters(kind: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    for name, parameter in signature(kind).parameters.items():
        yield name, parameter.annotation
