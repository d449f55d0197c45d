"""Which tensors keep their dtype where the other weights of a model are rounded to 16 bit.

Some are not made for it: DeepSeek-V3 chooses its experts by biases whose differences bfloat16 does
not hold, and keeps them in float32.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from rslightning.model_folder import ModelFolder

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What safetensors calls them."""


def float32_parts(model_class: Any, dtype: torch.dtype | None) -> list[str]:
    """Return parts of the names of what transformers keeps in float32 where the rest is `dtype`."""
    names = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }
    settings = names.get(dtype, ()) if dtype else ()
    return [part for name in settings for part in getattr(model_class, name, None) or ()]


def stored_dtypes(base: ModelFolder) -> dict[str, tuple[torch.dtype, int]]:
    """Return name -> dtype and number of entries of the floating-point tensors of `base`."""
    return {
        name: (DTYPES[code], torch.Size(shape).numel())
        for name, (code, shape) in base.table.items()
        if code in DTYPES
    }


def kept_names(
    tensors: Mapping[str, tuple[torch.dtype, int]], parts: Sequence[str] = ()
) -> set[str]:
    """Return the names of those that keep their dtype where the others are cast.

    That is what is wider than most of the entries are, and what is in float32 and named in `parts`.

    Args:
        tensors: Name -> dtype and number of entries of the floating-point tensors of a model.
        parts: Parts of names, see `float32_parts`.
    """
    entries: Counter[torch.dtype] = Counter()
    for dtype, count in tensors.values():
        entries[dtype] += count
    most = max(entries, key=lambda dtype: entries[dtype], default=torch.float32)
    return {
        name
        for name, (dtype, _) in tensors.items()
        if dtype.itemsize > most.itemsize
        or (dtype == torch.float32 and any(part in name for part in parts))
    }
