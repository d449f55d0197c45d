"""Which way a base keeps its square weights: as [out, in], or as [in, out], as `Conv1D` does."""

from collections.abc import Mapping
from dataclasses import replace

from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder
from rslightning.rslora.adapters import Adapter, LayerAdapter


def orient(adapter: Adapter, base: ModelFolder, keys: Mapping[str, str]) -> Adapter:
    """Return `adapter` with `transposed` as the files of `base` say, where its matrices do not.

    PEFT's configuration has one `fan_in_fan_out` for all layers, that of the last one.

    Args:
        adapter: Matrices by module path.
        base: The model that it was trained on.
        keys: Tensor name in `base` -> path of the module.

    Raises:
        UserError: If blocks of `base` keep weights both ways.
    """
    layers = dict(adapter.layers)
    for key, path in keys.items():
        if path in layers and _is_square(layers[path]):
            stored = _is_stored_transposed(base, key)
            if stored is not None:
                layers[path] = replace(layers[path], transposed=stored)
    return replace(adapter, layers=layers)


def _is_square(layer: LayerAdapter) -> bool:
    return layer.lora_b.shape[0] == layer.lora_a.shape[1]


def _is_stored_transposed(base: ModelFolder, key: str) -> bool | None:
    """Tell whether a square weight is kept as [in, out]; None where `base` does not say.

    A `Conv1D` always has a bias, which is as long as its output. Repeated blocks are of one kind of
    linear maps: those of them that are not square tell of those that are.
    """
    if _bias(key) not in base.tensor_names:
        return False
    blocks = _blocks(key)
    if blocks is None:
        return None
    shapes = {name: shape for name, (_, shape) in base.table.items()}
    found = set()
    for name, shape in shapes.items():
        bias = shapes.get(_bias(name), ())
        if _blocks(name) == blocks and len(shape) == 2 and shape[0] != shape[1] and len(bias) == 1:
            found |= {shape.index(bias[0])} if bias[0] in shape else set()
    if len(found) > 1:
        raise UserError(
            f"{base.path} keeps some weights in {blocks} as [out, in] and some as [in, out], so it "
            f"is not known which way {key} is: leave it out of the targets."
        )
    return found == {1} if found else None


def _bias(key: str) -> str:
    return f"{key.removesuffix('weight')}bias"


def _blocks(key: str) -> str | None:
    """Return the path of the list of blocks that a tensor is in; None outside of them."""
    segments = key.split(".")
    place = next((i for i, segment in enumerate(segments) if segment.isdigit()), None)
    return None if place is None else ".".join(segments[:place])
