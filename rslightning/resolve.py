"""Words in a configuration that stand for a value, and the values that they get before a run."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rslightning.checkpoint import is_adapter, read_checkpoint
from rslightning.errors import UserError
from rslightning.launch import choose_devices
from rslightning.model_folder import read_json
from rslightning.plan import choose_rank
from rslightning.resume import find_run, resolve_checkpoint
from rslightning.rslora import AdapterSpec
from rslightning.rslora.peft_format import CONFIG_FILE


def resolve_devices(config: Namespace) -> None:
    """Put what torchrun or SLURM started in the place of `trainer.devices` and `num_nodes`.

    Args:
        config: Options of one verb; changed in place.

    Raises:
        UserError: If they contradict each other, as `choose_devices` says.
    """
    trainer = config.trainer
    trainer.devices, trainer.num_nodes = choose_devices(
        trainer.devices, trainer.num_nodes, os.environ
    )


def resolve_start(config: Namespace, verb: str, plain: Callable[[], Mapping[str, Any]]) -> None:
    """Put the path of a whole checkpoint in the place of `ckpt_path` and of `auto_resume`.

    Where nothing is trained but adapters were, it may be that of an adapter folder.

    Args:
        config: Options of one verb; changed in place.
        verb: Its name.
        plain: Returns them in plain values, as a run saves them.

    Raises:
        UserError: As `resolve_checkpoint` and `find_run`.
    """
    if config.get("ckpt_path") is not None:
        adapter_alone = verb != "fit" and config.model.adapter is not None
        found = resolve_checkpoint(config.ckpt_path, plain()["trainer"], adapter_alone)
    elif config.get("auto_resume"):
        run, sentence = find_run(plain())
        rank_zero_info(sentence)
        if run is not None:
            _write_into(config.trainer, run.folder)
        if run is None or run.checkpoint is None:
            return
        found = run.checkpoint
    else:
        return
    for sentence in found.said:
        rank_zero_warn(sentence)
    config.ckpt_path = str(found.path)


def _write_into(trainer: Namespace, run: Path) -> None:
    """Let the logger go on in the folder of a run."""
    if trainer.logger is None or trainer.logger is True:
        options = {"save_dir": str(run.parents[1]), "name": run.parent.name}
        kind = "lightning.pytorch.loggers.TensorBoardLogger"
        trainer.logger = Namespace(class_path=kind, init_args=Namespace(**options))
    if trainer.logger is not False and run.name != trainer.logger.init_args.get("name"):
        trainer.logger.init_args.version = run.name


def resolve_rank(config: Namespace, is_run: bool) -> None:
    """Put a number in the place of `model.adapter.rank: auto`: a checkpoint's, or one that fits.

    Args:
        config: Options of one verb; changed in place.
        is_run: Whether a model is trained or used; if not, its rank does not matter.

    Raises:
        UserError: If the checkpoint says no rank, and what `choose_rank` raises.
    """
    adapter = config.model.adapter
    if adapter is None or adapter.rank != "auto":
        return
    checkpoint = config.get("ckpt_path")
    if not is_run:
        adapter.rank = AdapterSpec.rank
    elif checkpoint is not None:
        adapter.rank = _rank_of_checkpoint(checkpoint)
        rank_zero_info(f"rank: auto is {adapter.rank}, as in {checkpoint}.")
    else:
        adapter.rank, reason = choose_rank(config.as_dict())
        rank_zero_info(reason)


def _rank_of_checkpoint(path: str) -> int:
    if is_adapter(Path(path)):
        rank = read_json(Path(path) / CONFIG_FILE).get("r")
    else:
        hparams = read_checkpoint(Path(path)).get("hyper_parameters") or {}
        rank = (hparams.get("adapter") or {}).get("rank")
    if isinstance(rank, int):
        return rank
    raise UserError(
        f"rank: auto takes the rank of the checkpoint, and {path} does not say it: give "
        "--model.adapter.rank a number."
    )
