"""Read trained tensors out of a sharded checkpoint of `torch.distributed.checkpoint`.

The folder holds one `.distcp` file per process, which is a row of files of `torch.save`, one per
piece of a tensor; `.metadata`, a pickle that says where each piece begins and which part of the
tensor it is; and `meta.pt`, where Lightning keeps whatever is no tensor.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from rslightning.errors import UserError
from rslightning.safe_load import StandIn, cannot_be_opened, load_plain

STATE: Final = "state_dict."
"""Before the names of the module's tensors, as Lightning's strategy saves them."""

METADATA_MODULES: Final = (
    "torch",  # dtypes
    "torch.serialization",  # layouts
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "pathlib",
    "pathlib._local",
)
"""Where the classes in `.metadata` come from; a `StandIn` takes the place of each."""


class MetadataUnpickler(pickle.Unpickler):
    """Builds lists, dictionaries and `StandIn` objects; nothing of a library is called."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what takes the place of a class.

        Raises:
            UnpicklingError: If it is none that the metadata of a checkpoint needs.
        """
        if (module, name) == ("torch", "Size"):
            return tuple
        if module in METADATA_MODULES:
            return StandIn
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def is_distributed_folder(path: Path) -> bool:
    """Return whether a sharded checkpoint was written, or begun, here."""
    return (path / ".metadata").exists() or any(path.glob("*.distcp"))


def read_distributed_folder(path: Path, endings: tuple[str, ...]) -> dict[str, Any]:
    """Return what Lightning's checkpoint file would hold, with whole tensors as `state_dict`.

    Args:
        path: The folder that Lightning calls the checkpoint.
        endings: Ends of the names of the tensors that are read.

    Raises:
        UserError: If it is incomplete, damaged, or holds objects that only a pickle could restore.
    """
    for name in (".metadata", "meta.pt"):
        if not (path / name).exists():
            raise UserError(f"{path} lacks {name}: it was not written to the end.")
    content = load_plain(path / "meta.pt")
    metadata = _read_metadata(path / ".metadata")
    try:
        return {**content, "state_dict": dict(_tensors(path, metadata, endings))}
    except UserError:  # a ValueError, too
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not laid out as checkpoints of torch.distributed are: {error!r}."
        ) from None


def _read_metadata(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            return MetadataUnpickler(stream).load()
    except Exception as error:  # what is raised depends on the bytes that are found
        raise cannot_be_opened(file, error) from None


def _tensors(path: Path, metadata: Any, endings: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    places = {
        (index.fqn, index.offset): place
        for index, place in metadata.storage_data.items()
        if index.fqn.endswith(endings)
    }
    for name, tensor in metadata.state_dict_metadata.items():
        if name.startswith(STATE) and name.endswith(endings):
            pieces = [(chunk, places[name, chunk.offsets]) for chunk in tensor.chunks]
            yield name.removeprefix(STATE), _assemble(path, tensor.size, pieces)


def _assemble(path: Path, size: tuple[int, ...], pieces: list[tuple[Any, Any]]) -> Tensor:
    """Return a whole tensor of pieces, each with what part it is and where it is found."""
    whole, numbers = torch.empty(size), 0
    for chunk, place in pieces:
        piece = _read_piece(path / Path(place.relative_path).name, place.offset, place.length)
        if piece.shape != chunk.sizes:
            raise ValueError(f"a piece has the shape {list(piece.shape)}, not {chunk.sizes}")
        where = (slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[tuple(where)] = piece.float()
        numbers += piece.numel()
    if numbers != whole.numel():
        raise ValueError(f"the pieces hold {numbers} of {whole.numel()} numbers of a tensor")
    return whole


def _read_piece(file: Path, start: int, length: int) -> Tensor:
    if not file.exists():
        raise UserError(
            f"{file.parent} lacks {file.name}: it was not written or copied to the end."
        )
    with file.open("rb") as stream:
        stream.seek(start)
        piece = load_plain(file, part=stream.read(length))
    if not isinstance(piece, Tensor):
        raise TypeError(f"{file.name} holds {type(piece).__name__} where a tensor should be")
    return piece
