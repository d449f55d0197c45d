"""`fit`, `validate`, `test`, `predict` and what reads their configurations: `data show`, `plan`.

What libraries raise is told here in one sentence.
"""

import argparse
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rslightning.cli_errors import explain
from rslightning.data.show import choose_marks, describe_data
from rslightning.errors import RunError, UserError
from rslightning.launch import ending_together
from rslightning.patient_events import waiting_events
from rslightning.plain_yaml import read_plain_yaml
from rslightning.plan import device_memory, parse_memory, read_plan
from rslightning.plan_text import describe_plan
from rslightning.recipe_cli import SUBCOMMANDS, RecipeCLI, known_keys
from rslightning.recipes import find_config
from rslightning.resume import give_back

OF_THE_USER: Final = re.compile(
    r"`devices` selected with|-?\d+ is not in bounds, numpy|Early stopping conditioned on metric"
)
"""How errors of other kinds begin by which Lightning tells of a wrong option."""

TOKENIZER: Final = (
    "data.tokenizer is always that of model.base_model, and cannot be given: put another one's "
    "files into the base's folder."
)

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

CLOSED: Final = (
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENOENT),
)


def run(arguments: Sequence[str]) -> None:
    """Run one Trainer verb.

    Args:
        arguments: The verb and its options.

    Raises:
        UserError: If an option or a configuration is wrong; one sentence, with the nearest name.
        RunError: If the disk is full.
    """
    with ending_together(), waiting_events():
        _parse(arguments)


def show_data(arguments: Sequence[str], count: int, ids: bool = False) -> None:
    """Print the first training blocks of a configuration, all lengths, and what packing saves.

    Args:
        arguments: Options as of `fit`.
        count: How many blocks.
        ids: Whether to list the tokens of each example, too.

    Raises:
        UserError: As `run`, if `count` is negative, and what the data itself raises.
    """
    if count < 0:
        raise UserError(f"-n is a number of blocks, got {count}.")
    data = _parse(arguments, run=False).datamodule
    data.setup("fit")
    for text in describe_data(data, count, choose_marks(sys.stdout, os.environ), ids):
        print(text)


def show_plan(arguments: Sequence[str], memory: str | None, devices: int | None) -> None:
    """Print what a configuration costs at each rank, and the highest that fits.

    Args:
        arguments: Options as of `fit`.
        memory: Memory of one device, as `80GiB`; None takes that of the GPU that is here.
        devices: Number of processes; None takes the configuration's.

    Raises:
        UserError: As `run`, what `read_plan` raises, if there is neither `memory` nor a GPU, or
            `devices` is not positive.
    """
    if devices is not None and devices < 1:
        raise UserError(f"--devices is a number of processes, got {devices}.")
    config = read_config(["fit", *arguments])
    size = device_memory() if memory is None else parse_memory(memory)
    if size is None:
        raise UserError("There is no GPU here whose memory could be taken: give --memory 80GiB.")
    print("\n".join(describe_plan(read_plan(config, devices), size)))


def read_config(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that a verb and its options make, without building anything.

    Raises:
        UserError: As `run`.
    """
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(
        logging.WARNING
    )  # nothing is drawn
    config: dict[str, Any] = _parse(arguments, build=False).config[arguments[0]].as_dict()
    return config


def _parse(arguments: Sequence[str], run: bool = True, build: bool = True) -> RecipeCLI:
    _quiet_libraries()
    try:
        return RecipeCLI(_resolve_configs(arguments), run, build)
    except argparse.ArgumentError as error:
        raise UserError(explain(str(error), known_keys())) from None
    except MisconfigurationException as error:
        said = " ".join(str(error).split())
        if "gpu backend" in said:
            said = "There is no GPU here: set trainer.accelerator to cpu, or leave it out."
        raise UserError(said) from error
    except (RuntimeError, TypeError, ValueError) as error:
        if OF_THE_USER.match(str(error)):
            raise UserError(" ".join(str(error).split())) from error
        raise
    except OSError as error:
        if (reason := _describe_refusal(error)) is None:
            raise
        raise RunError(reason) from error
    except SystemExit as stop:  # what Lightning makes of an interrupt
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        give_back()


def _describe_refusal(error: OSError) -> str | None:
    """Return what to say where the file system refused; None where it did something else."""
    if error.errno in FULL:
        return f"The disk took no more: {error.strerror}."
    if error.errno in CLOSED and error.filename is not None:
        return f"Could not open or write {error.filename}: {error.strerror}."
    return None


def _resolve_configs(arguments: Sequence[str]) -> list[str]:
    """Replace the names after `--config` by files, the packaged ones included."""
    if len(arguments) == 1 and arguments[0] in SUBCOMMANDS:
        raise UserError(f"{arguments[0]} needs a configuration: --config recipes/quickstart.yaml")
    resolved: list[str] = []
    for argument in arguments:
        if resolved and resolved[-1] in ("--config", "-c"):
            argument = str(_config_file(argument))
        elif re.match(r"--data\.(init_args\.)?tokenizer\b", argument):
            raise UserError(TOKENIZER)
        elif argument.startswith("--config="):
            argument = f"--config={_config_file(argument.removeprefix('--config='))}"
        resolved.append(argument)
    return resolved


def _config_file(name: str) -> Path:
    """Return the file of a configuration, which is a mapping in YAML."""
    path = find_config(name)
    content = read_plain_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys such as model, data and trainer.")
    data = content.get("data")
    for options in (data, data.get("init_args")) if isinstance(data, dict) else ():
        if isinstance(options, dict) and "tokenizer" in options:
            raise UserError(f"{path}: {TOKENIZER}")
    if "grids" in content:
        raise UserError(f"{name} is a sweep: run it with rslightning sweep --config {name}.")
    return path


def _quiet_libraries() -> None:
    """Silence advertisements and defects that our users can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # workers do not tokenize
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a cast at each call


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage() and "Tip:" not in record.getMessage()
