"""Merge an adapter into a model folder on disk, shard by shard: W' = W + gamma_r B A.

Where the adapter was trained on a base in 4 or 8 bit, W' = Q(W) + gamma_r B A, with Q(W) what
quantizing and dequantizing leaves of W (`rslora/quantized.py`): that is the model that was trained.

Only one shard is in memory at a time, so that a 70B model merges on a laptop. The product is formed
in float32 and rounded once.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from rslightning.errors import RunError, UserError
from rslightning.model_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, ModelFolder, unique_key
from rslightning.rslora.adapters import Adapter, LayerAdapter
from rslightning.rslora.kept_dtypes import kept_names, stored_dtypes
from rslightning.rslora.merge import LayerMerge, all_finite, dtype_name, merge_weight
from rslightning.rslora.orientation import orient
from rslightning.rslora.quantized import seen_weight
from rslightning.storage import in_file_order, open_tensors, tensor_writer

T = TypeVar("T")

REPORT_FILE: Final = "merge_report.json"

LOST_SHARE_WARNING: Final = 0.2
"""Above this share of an update lost to rounding, a merge is warned about."""


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        dtype: Dtype of the merged weights, `mixed` where the base mixes several.
        layers: Path of each adapted module -> its numbers.
        largest_logit_difference: Largest difference of a logit before and after on a real batch;
            None where no batch was at hand.
        dequantized_from: `nf4`, `fp4` or `int8` where the base was quantized in training.
    """

    dtype: str
    layers: dict[str, LayerMerge] = field(default_factory=dict)
    largest_logit_difference: float | None = None
    dequantized_from: str | None = None

    @property
    def largest_lost_share(self) -> float:
        """The largest `lost_share` of all layers."""
        return max((layer.lost_share for layer in self.layers.values()), default=0.0)

    @property
    def worst(self) -> str:
        """The largest `lost_share` in words: percent, or how many times the update itself."""
        share = self.largest_lost_share
        return f"{share:.2g} times it" if share > 1 else f"{share:.1%}"

    @property
    def where(self) -> str:
        """Dtype of the merged weights, and what they were merged into where that is another."""
        source = self.dequantized_from
        return self.dtype + (f", onto the base dequantized from {source}" if source else "")

    @property
    def warning(self) -> str | None:
        """One sentence if rounding lost a large share of an update, else None."""
        bad = [path for path, x in self.layers.items() if x.lost_share > LOST_SHARE_WARNING]
        if not bad:
            return None
        return (
            f"Rounding to {self.dtype} lost more than {LOST_SHARE_WARNING:.0%} of the update in "
            f"{len(bad)} of {len(self.layers)} layers (at most {self.worst}, "
            f"{bad[0]} first); merge with dtype float32 to keep it."
        )

    def write(self, folder: Path) -> None:
        """Write `merge_report.json`."""
        content: dict[str, Any] = {
            **asdict(self),
            "largest_lost_share": self.largest_lost_share,
            "warning": self.warning,
        }
        (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def merge_folder(
    base: ModelFolder,
    adapter: Adapter,
    output: Path,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda file: None,
    float32: Sequence[str] = (),
) -> MergeReport:
    """Write `base` with `adapter` merged into `output`, an existing folder (see `new_folder`).

    Args:
        base: The model that the adapter was trained on.
        adapter: Matrices by module path.
        output: Gets weights under the base's file names, configuration and tokenizer.
        dtype: Dtype of the floating-point weights, save those that `base` keeps wider than most of
            its own; None keeps each tensor's own.
        progress: Called with each shard's file name before it is merged.
        float32: Parts of names of tensors that stay in float32, see `float32_parts`.

    Raises:
        UserError: If a module of the adapter is not in `base` or has another shape there, or it is
            not known which way it is stored, or `base` holds no plain weights, or a quantized base
            needs bitsandbytes, which is missing.
        RunError: If a merged weight is not finite.
    """
    keys = match_weights(base, adapter)
    adapter = orient(adapter, base, keys)
    scheme = adapter.quantized.scheme if adapter.quantized else None
    stored_dtype = dtype_name(dtype) if dtype else _stored_dtype(base)
    report = MergeReport(stored_dtype, dequantized_from=scheme)
    kept = kept_names(stored_dtypes(base), float32) if dtype else set()
    weight_map: dict[str, str] = {}
    total_size = 0
    for file, names in base.shards.items():
        progress(file)
        with open_tensors(base.path / file) as tensors:
            layout = _layout(tensors, names, dtype, kept)
            work = [
                partial(_merged, tensors, name, keys.get(name), adapter, result.dtype)
                for name, result in layout.items()
            ]
            with tensor_writer(output / file, layout) as write:
                for name, (merged, numbers) in zip(layout, _one_ahead(work), strict=True):
                    write(merged)
                    if numbers is not None:
                        report.layers[keys[name]] = numbers
        weight_map |= dict.fromkeys(names, file)
        total_size += sum(t.numel() * t.element_size() for t in layout.values())
    if list(base.shards) != [WEIGHTS_FILE]:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (output / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    copy_description(base, output, dtype)
    report.layers = {path: report.layers[path] for path in adapter.layers}
    return report


def _layout(
    tensors: Any, names: Iterable[str], dtype: torch.dtype | None, kept: set[str]
) -> dict[str, Tensor]:
    """Return what a merged file will hold, on the meta device, in the order of the file."""
    layout = {}
    for name in names:
        weight = tensors.get_tensor(name)  # mapped, not read
        casts = weight.is_floating_point() and name not in kept
        target = dtype if dtype and casts else weight.dtype
        layout[name] = torch.empty(weight.shape, dtype=target, device="meta")
    return in_file_order(layout)


def _merged(
    tensors: Any, name: str, path: str | None, adapter: Adapter, dtype: torch.dtype
) -> tuple[Tensor, LayerMerge | None]:
    """Return a tensor of a merged file, and of an adapted weight what its rounding cost."""
    weight = tensors.get_tensor(name)
    seen = _as_trained(path, weight, adapter)
    if path in adapter.layers:
        return _merge(path, weight, seen, adapter.layers[path], dtype)
    return cast_weight(name, seen, dtype), None


def _one_ahead(work: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield what the functions return, in order; each is called while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        before = None
        for function in work:
            begun = thread.submit(function)
            if before is not None:
                yield before.result()
            before = begun
        if before is not None:
            yield before.result()


def match_weights(base: ModelFolder, adapter: Adapter) -> dict[str, str]:
    """Return tensor name in the checkpoint -> path of the module, adapted or quantized.

    Raises:
        UserError: If a module of the adapter is not in `base`, or the weights of `base` are missing
            or damaged, or stored quantized.
    """
    if "quantization_config" in base.config:
        raise UserError(
            f"{base.path} is stored quantized, and holds no plain weights to merge into; name the "
            "model that it was made from (--base-model, merge_adapters.base_model)."
        )
    quantized: Iterable[str] = adapter.quantized.modules if adapter.quantized else ()
    keys = {}
    for path in {**adapter.layers, **dict.fromkeys(quantized)}:
        key = unique_key(base.tensor_names, f"{path}.weight")
        if key is None:
            raise UserError(
                f"The adapter has matrices for {path}, of which {base.path} has no weight: it was "
                "trained on another base model."
            )
        keys[key] = path
    return keys


def _as_trained(path: str | None, stored: Tensor, adapter: Adapter) -> Tensor:
    """Return what the model in training computed with in the place of a stored weight."""
    base = adapter.quantized
    if path is None or base is None or path not in base.modules:
        return stored
    # On the device of the training, whose kernels round as they did then.
    device = next(iter(adapter.layers.values())).lora_a.device
    return seen_weight(stored.to(device), base, base.modules[path]).to(stored.device)


def _merge(
    path: str, stored: Tensor, weight: Tensor, layer: LayerAdapter, dtype: torch.dtype
) -> tuple[Tensor, LayerMerge]:
    turned = _is_turned(path, tuple(weight.shape), layer)
    a, b = (matrix.to(weight.device) for matrix in (layer.lora_a, layer.lora_b))
    parts = (weight, a, b, layer.numbers.gamma, dtype)
    try:
        merged, numbers = merge_weight(*parts, transposed=turned)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None
    if weight is stored:
        return merged, numbers
    return merged, replace(numbers, quantization_error=_relative_distance(weight, stored))


def _relative_distance(seen: Tensor, stored: Tensor) -> float:
    """Return ||seen - stored|| / ||stored|| in float64, 0 for a weight of zero."""
    exact = stored.double()
    norm = exact.norm()
    return float((seen.double() - exact).norm() / norm) if norm > 0 else 0.0


def cast_weight(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight without adapter in another dtype.

    Raises:
        RunError: If an entry is not finite in it: float16 is too small for some.
    """
    cast = weight.to(dtype)
    if cast.dtype != weight.dtype and not all_finite(cast):
        raise RunError(f"{name} has entries that are not finite in {dtype_name(dtype)}.")
    return cast


def _is_turned(path: str, shape: tuple[int, ...], layer: LayerAdapter) -> bool:
    """Tell whether the base keeps a weight as [in, out]; only square ones need to be told."""
    straight = (layer.lora_b.shape[0], layer.lora_a.shape[1])
    if shape == straight[::-1] and (layer.transposed or shape != straight):
        return True
    if shape == straight:
        return False
    raise UserError(
        f"The adapter's update of {path} has shape {list(straight)}, the base's weight "
        f"{list(shape)}: it was trained on another base model."
    )


def copy_description(base: ModelFolder, output: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer and templates of `base`, with another dtype if one is given."""
    for path in base.other_files():
        shutil.copyfile(path, output / path.name)
    if dtype is not None:
        config = {key: value for key, value in base.config.items() if key != "torch_dtype"}
        config["dtype"] = dtype_name(dtype)
        text = json.dumps(config, indent=2)
        (output / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _stored_dtype(base: ModelFolder) -> str:
    """Return the one dtype of the base's floating-point weights, or `mixed`."""
    found = {dtype for dtype, _ in stored_dtypes(base).values()}
    return dtype_name(found.pop()) if len(found) == 1 else "mixed"
