"""Read trained parameters out of a DeepSpeed checkpoint folder, without DeepSpeed.

Of each trainable parameter one float32 copy exists, the master, of which every process keeps and
writes a part. ZeRO stages 1 and 2 lay the parameters of a group end to end and cut the whole;
stage 3 cuts each parameter by itself. Two matrices of 4 and 5 numbers on 2 processes:

    stages 1, 2    process 0: a a a a b       process 1: b b b b
    stage 3        process 0: a a b b b       process 1: a a b b 0
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from rslightning.errors import UserError
from rslightning.safe_load import load_plain

TAG: Final = "checkpoint"
"""The folder inside a checkpoint; so Lightning's strategy names it."""

CUT_AS_A_WHOLE: Final = "single_partition_of_fp32_groups"
CUT_ONE_BY_ONE: Final = "fp32_flat_groups"

PART_NAME: Final = re.compile(r"((?:bf16_)?zero_pp_rank_)\d+(_mp_rank_00_optim_states\.pt)")

DEEPSPEED_CLASSES: Final = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What else is in the files; none of it is looked at."""


def is_deepspeed_folder(path: Path) -> bool:
    """Return whether DeepSpeed wrote, or began to write, a checkpoint here."""
    return (path / TAG).is_dir() and any((path / TAG).glob("*_states.pt"))


def read_deepspeed_folder(path: Path, endings: tuple[str, ...]) -> dict[str, Any]:
    """Return what Lightning's checkpoint file would hold, with the masters as `state_dict`.

    That the files are of one step is told by the steps that the optimizer counted and, where they
    are inside, by the weights; of an optimizer that counts none and no weights it cannot be told.

    Args:
        path: The folder that Lightning calls the checkpoint.
        endings: Ends of the names of the trained parameters that are read.

    Raises:
        UserError: If it is incomplete, mixes two checkpoints, is damaged, or holds objects that
            only a pickle could restore.
    """
    try:
        parts = _read_parts(path)
        content = _read_model_states(path)
        masters = dict(_masters(content["param_shapes"], parts, endings))
        _check_weights(path, masters, content["module"])
    except UserError:  # a ValueError, too
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not laid out as checkpoints of ZeRO stages 1, 2 and 3 are: {error!r}."
        ) from None
    return {**content, "state_dict": masters}


def _read_model_states(path: Path) -> dict[str, Any]:
    """Return shapes and hyperparameters; all processes of stage 3 write the same ones."""
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if (path / TAG / name).exists():
            content: dict[str, Any] = load_plain(path / TAG / name, DEEPSPEED_CLASSES)
            return content
    raise UserError(f"{path} has no model states: it was not written to the end.")


def _read_parts(path: Path) -> list[dict[str, Any]]:
    """Return the optimizer's state on each process, in their order."""
    names = sorted(file.name for file in (path / TAG).glob("*_optim_states.pt"))
    if not names or not (path / "latest").exists():
        raise UserError(f"{path} was not written to the end, or not by ZeRO stage 1, 2 or 3.")
    if (found := PART_NAME.fullmatch(names[0])) is None:
        raise UserError(f"{path} holds {names[0]}: tensor parallelism cannot be read.")
    processes = _processes(_part(path / TAG / names[0]))
    parts = []
    for rank in range(processes):
        name = f"{found[1]}{rank}{found[2]}"
        if name not in names:
            raise UserError(f"{path} lacks {name}: it was not written or copied to the end.")
        parts.append(_part(path / TAG / name))
    _check_parts(path, parts, len(names))
    return parts


def _check_parts(path: Path, parts: Sequence[Mapping[str, Any]], files: int) -> None:
    if {_processes(part) for part in parts} != {files}:
        raise UserError(f"{path} mixes files of runs on different numbers of processes.")
    if len({steps for part in parts if (steps := _steps(part))}) > 1:
        raise _mixed_steps(path)


def _part(file: Path) -> dict[str, Any]:
    part: dict[str, Any] = load_plain(file, DEEPSPEED_CLASSES)["optimizer_state_dict"]
    return part


def _processes(part: Mapping[str, Any]) -> int:
    """Return on how many processes the parameters lay: one number, or one for each group."""
    count = part["partition_count"]
    return int(max(count) if isinstance(count, list) else count)


def _steps(part: Mapping[str, Any]) -> frozenset[float]:
    """Return the steps that the optimizer counted; some optimizers count none."""
    state = part.get("base_optimizer_state", part.get("optimizer_state_dict"))
    if not isinstance(state, dict):
        return frozenset()
    counts = [*state.get("state", {}).values(), *state.get("param_groups", ())]
    return frozenset(float(count["step"]) for count in counts if "step" in count)


def _mixed_steps(path: Path) -> UserError:
    return UserError(
        f"{path} mixes files of different steps, as when overwriting was interrupted: take an "
        "older checkpoint."
    )


def _masters(
    groups: Sequence[Mapping[str, torch.Size]],
    parts: Sequence[Mapping[str, Any]],
    endings: tuple[str, ...],
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of the parameters whose names end so."""
    if CUT_AS_A_WHOLE in parts[0]:
        for index, shapes in enumerate(groups):
            pieces = [part[CUT_AS_A_WHOLE][index] for part in parts]
            gaps = parts[0].get("param_alignment_paddings") or {index: [0] * len(shapes)}
            yield from _uncut_whole(shapes, pieces, gaps[index], endings)
    else:
        shapes = {name: shape for group in groups for name, shape in group.items()}
        yield from _uncut_each(shapes, [part[CUT_ONE_BY_ONE] for part in parts], endings)


def _uncut_whole(
    shapes: Mapping[str, torch.Size],
    pieces: Sequence[Tensor],
    gaps: Sequence[int],
    endings: tuple[str, ...],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a group that lie end to end, each followed by a gap."""
    start = 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        if name.endswith(endings):
            yield name, _between(pieces, start, start + shape.numel()).view(shape)
        start += shape.numel() + gap


def _uncut_each(
    shapes: Mapping[str, torch.Size],
    pieces: Sequence[Sequence[Tensor]],
    endings: tuple[str, ...],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of which every process has an equal share, the last one's padded."""
    start = 0
    for name, shape in shapes.items():
        end = start - (-shape.numel() // len(pieces))  # rounded up
        if name.endswith(endings):
            shares = [_between(mine, start, end) for mine in pieces]
            yield name, torch.cat(shares)[: shape.numel()].view(shape)
        start = end
    for mine in pieces:
        if sum(piece.numel() for piece in mine) != start:
            raise ValueError(f"the shapes take {start} numbers of a process, the file has others")


def _between(pieces: Sequence[Tensor], start: int, end: int) -> Tensor:
    """Return the numbers from `start` to `end` of pieces that lie end to end."""
    found = []
    for piece in pieces:
        found.append(piece[max(start, 0) : max(end, 0)])
        start, end = start - piece.numel(), end - piece.numel()
    return torch.cat(found).detach().float()


def _check_weights(path: Path, masters: Mapping[str, Tensor], module: Mapping[str, Tensor]) -> None:
    """Raise `UserError` if a master is not what the saved weight of its name was rounded from."""
    for name, master in masters.items():
        weight = module.get(name)
        if weight is None or not weight.numel():  # left out, or stage 3's
            continue
        rounded = master.to(weight.dtype)
        if not torch.allclose(rounded, weight, rtol=0.0, atol=0.0, equal_nan=True):
            raise _mixed_steps(path)
