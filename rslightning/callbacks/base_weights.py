"""Is the base on disk the model that is trained? A merge takes all but the adapters from there."""

import math
from typing import Any, Final

from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder
from rslightning.storage import open_tensors

WAY_OUT: Final = (
    "a merge would take all but the adapters from there. Save the model before it is adapted "
    "(save_pretrained), and give MergeAdapters that folder as base_model."
)


def refuse_other_weights(model: Any, base: ModelFolder) -> None:
    """Raise `UserError` if `base` lacks the head of `model`, or has a weight in another size.

    Names and sizes are compared, no numbers. A weight that is not found under its name is left
    alone where it may have another one on disk: transformers renames and joins some.
    """
    shapes = _stored_shapes(base)
    for path, parameter in model.named_parameters():
        name = path.replace(".base_layer.", ".").replace(".base.", ".")  # in PEFT's layers, in ours
        stored = shapes.get(name, shapes.get(name.partition(".")[2]))
        shape = list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 keeps it there
        # 4-bit weights are, in bytes or (`bnb_4bit_quant_storage`) in the words of a float.
        is_packed = hasattr(parameter, "quant_state") or not parameter.is_floating_point()
        if stored is not None and not is_packed and math.prod(stored) != math.prod(shape):
            raise UserError(
                f"{name} has shape {shape} in the model and {stored} in {base.path}: {WAY_OUT}"
            )
    if head := _missing_head(model, base):
        raise UserError(f"{type(model).__name__} has a {head}, {base.path} has none: {WAY_OUT}")


def _stored_shapes(base: ModelFolder) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file, names in base.shards.items():
        with open_tensors(base.path / file) as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in names}
    return shapes


def _missing_head(model: Any, base: ModelFolder) -> str | None:
    """Return the name of a module beside the backbone that was not loaded from `base`.

    Where `base` is of the model's own class, its heads are there, under whatever names.
    """
    architectures = base.config.get("architectures") or []
    backbone = getattr(model, model.base_model_prefix or " ", None)
    if backbone is None or any(kind.__name__ in architectures for kind in type(model).__mro__):
        return None
    shared = {id(parameter) for parameter in backbone.parameters()}  # tied to embeddings
    for name, child in model.named_children():
        is_own = any(id(parameter) not in shared for parameter in child.parameters())
        if is_own and not any(f".{name}." in f".{stored}" for stored in base.tensor_names):
            return name
    return None
