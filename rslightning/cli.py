"""`fit`, `validate`, `test`, `predict`: LightningCLI with named callbacks and errors to read.

The configuration's top level holds `model`, `data`, `trainer` and one group per callback of ours,
because groups merge across several `--config` files where lists are replaced.
"""

import argparse
import difflib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, Final, get_args

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from rslightning.callbacks import BeforeAfter, MergeAdapters, RunSummary, TrainableCheckpoint
from rslightning.callbacks.merge_adapters import run_folder
from rslightning.callbacks.predictions import WritePredictions
from rslightning.data import TextDataModule
from rslightning.errors import UserError
from rslightning.module import CausalLMModule
from rslightning.recipes import find_config

# Group name -> (type, default). `null` turns a group off. They run in this order, the summary last.
GROUPS: Final[dict[str, tuple[Any, dict[str, Any] | None]]] = {
    "merge_adapters": (MergeAdapters | None, {}),
    "before_after": (BeforeAfter | None, None),
    "checkpoint": (TrainableCheckpoint | None, {}),
}

SUBCOMMANDS: Final = ("fit", "validate", "test", "predict")


class SaveRunConfig(SaveConfigCallback):
    """Write the resolved configuration into the run folder: `config.yaml`, then `config.resume-N`.

    A run that goes on in the same folder must neither fail nor overwrite how it began.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file on the first process before anything is trained."""
        if self.already_saved or stage != "fit":
            return
        self.already_saved = True
        folder = run_folder(trainer)  # asks all processes for the same name
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            path, number = folder / "config.yaml", 0
            while path.exists():
                number += 1
                path = folder / f"config.resume-{number}.yaml"
            self.parser.save(self.config, str(path), skip_none=False)


class RecipeCLI(LightningCLI):
    """LightningCLI over `CausalLMModule` and any DataModule."""

    def __init__(self, args: Sequence[str]) -> None:
        quiet = {"exit_on_error": False}
        super().__init__(
            CausalLMModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"enable_model_summary": False},
            parser_kwargs={**quiet, **dict.fromkeys(SUBCOMMANDS, quiet)},
            load_from_checkpoint_support=False,
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups of our callbacks, and hand the base model's name to the tokenizer."""
        for name, (kind, default) in GROUPS.items():
            parser.add_argument(f"--{name}", type=kind, default=default)
        parser.link_arguments("model.base_model", "data.init_args.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what `run` was given; Lightning warns of arguments beside `sys.argv`."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the callbacks of all groups that are on."""
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        groups = [self._get(self.config_init, name) for name in GROUPS]
        ours = [callback for callback in groups if callback is not None] + [RunSummary()]
        if self.subcommand == "predict":
            ours.append(WritePredictions())
        if config.get("enable_progress_bar") is not False:
            ours.append(TQDMProgressBar())  # Lightning's choice depends on what else is installed
        if not config.get("enable_checkpointing", True) or self.subcommand != "fit":
            ours = [callback for callback in ours if not isinstance(callback, TrainableCheckpoint)]
        return self._instantiate_trainer(config, ours)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint silently override the command line.

        What must not differ on resume is compared by `CausalLMModule.on_load_checkpoint`.
        """


def run(arguments: Sequence[str]) -> None:
    """Run one Trainer verb.

    Args:
        arguments: The verb and its options.

    Raises:
        UserError: If an option or a configuration is wrong; one sentence, with the nearest name.
    """
    _quiet_libraries()
    try:
        RecipeCLI(_resolve_configs(arguments))
    except argparse.ArgumentError as error:
        raise UserError(explain(str(error))) from None


def _resolve_configs(arguments: Sequence[str]) -> list[str]:
    """Replace the names after `--config` by files, the packaged ones included."""
    resolved: list[str] = []
    for argument in arguments:
        if resolved and resolved[-1] in ("--config", "-c"):
            argument = str(find_config(argument))
        elif argument.startswith("--config="):
            argument = f"--config={find_config(argument.removeprefix('--config='))}"
        resolved.append(argument)
    return resolved


def explain(message: str) -> str:
    """Reduce an error of jsonargparse to one sentence, with the nearest key where one is wrong."""
    wrong = _wrong_key(message)
    if wrong is not None:
        close = difflib.get_close_matches(wrong, list(known_keys()), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else "; see rslightning fit --help."
        return f"There is no option {wrong}{hint}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    key = next((m[1] for m in re.finditer(r'Parser key "([^"]+)"', message)), None)
    useful = [line for line in lines if re.search(r"Expected|required|Got value|Unable|not", line)]
    useful = [line for line in useful if not line.startswith(("Does not validate", "Subtypes"))]
    reason = (useful or lines)[0] if lines else message
    return f"{key}: {reason}" if key and key not in reason else reason


def _wrong_key(message: str) -> str | None:
    """Return the option that an error calls unknown, as far as the error names its group."""
    if found := re.search(r"unrecognized arguments: --?([\w.+]+)", message):
        return found[1]
    if found := re.search(r"Option '([\w.]+)' is not accepted before subcommand", message):
        return None
    option = re.search(r"[Oo]ption '([\w.]+)'(?: is not accepted)?", message)
    if option is None:
        return None
    group = re.search(r"Group '([\w.]+)'", message)
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    prefix = group[1] if group else ".".join(keys)
    return f"{prefix}.{option[1]}" if prefix else option[1]


def known_keys() -> Iterator[str]:
    """Yield every key of a configuration that can be known without choosing a class."""
    for name, kind in _sections():
        yield name
        for parameter, annotation in _parameters(kind):
            yield f"{name}.{parameter}"
            for option in get_args(annotation):
                if is_dataclass(option):
                    yield from (f"{name}.{parameter}.{f.name}" for f in fields(option))
    yield from ("config", "ckpt_path", "seed_everything")


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


def _quiet_libraries() -> None:
    """Silence advertisements and defects that our users can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "Tip:" not in record.getMessage()
