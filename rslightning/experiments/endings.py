"""Whether a run that nobody watched was trained to its end: what its folder says of that.

A fit ends with a checkpoint of its last step and, if it merges, with the folders of its results.
Curves say less: a loss that is logged every 10 steps has no point at most last steps.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Final

CHECKPOINT: Final = re.compile(r"step-(\d+)\.ckpt")
META_FILE: Final = "meta.pt"
"""What is no tensor, where a checkpoint is a folder."""


def is_at_its_end(
    folder: Path, logged: int, max_steps: int | None, max_epochs: int | None, adapts: bool
) -> bool:
    """Tell whether a run took all its steps or wrote its results.

    Args:
        folder: The run folder.
        logged: Number of optimizer steps up to the last point of its training loss.
        max_steps: Where it is to end; null if passes over the data decide alone.
        max_epochs: After how many passes it is to end; null if steps decide alone.
        adapts: Whether it trains adapters, of which a fit leaves a folder beside the merged model.
    """
    steps = {int(found[1]): path for path, found in _checkpoints(folder / "checkpoints")}
    if max_steps is not None and max([logged, *steps]) >= max_steps:
        return True
    if max_epochs is not None and steps and _passes(steps[max(steps)]) >= max_epochs:
        return True
    # `rslightning merge` may have written `merged` there alone, from whatever checkpoint.
    return all((folder / name).is_dir() for name in ("merged", *["adapter"] * adapts))


def _checkpoints(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    paths = list(folder.iterdir()) if folder.is_dir() else []
    matches = [(path, CHECKPOINT.fullmatch(path.name)) for path in paths]
    return [(path, match) for path, match in matches if match]


def _passes(checkpoint: Path) -> int:
    """Return how many passes over the data are in a checkpoint whole; 0 if it does not say."""
    try:
        loop = _read(checkpoint)["loops"]["fit_loop"]
        begun = int(loop["epoch_progress"]["current"]["ready"])
        return begun if loop["epoch_loop.batch_progress"]["is_last_batch"] else begun - 1
    except Exception:  # what is raised depends on the bytes that are found
        return 0


def _read(checkpoint: Path) -> Any:
    """Return the plain values of what torch.save wrote, with neither torch nor any code of it."""
    file = checkpoint / META_FILE if checkpoint.is_dir() else checkpoint
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(name) as content:
            return _PlainUnpickler(content).load()


class _StandIn(dict[Any, Any]):
    """Takes the place of whatever class or function a pickle names, none of which is called."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _StandIn

    def persistent_load(self, pid: Any) -> None:
        """Leave out the tensors' bytes, which are other entries of the archive."""
