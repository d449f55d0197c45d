"""Hugging Face models: built with every default that matters spelled out."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME

from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder
from rslightning.rslora.quantized import require_bitsandbytes


def load_causal_lm(
    folder: Path,
    dtype: torch.dtype,
    attention: str | None = None,
    pretrained: bool = True,
    activation_checkpointing: bool = False,
    trust_remote_code: bool = False,
    quantization: Mapping[str, Any] | None = None,
    on_meta: bool = False,
) -> PreTrainedModel:
    """Build a causal language model from a folder, in training mode and without a KV cache.

    Args:
        folder: Local folder in Hugging Face's layout.
        dtype: Dtype of the weights, whatever they are stored in.
        attention: Attention implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None leaves
            the choice to transformers, which knows what the architecture has.
        pretrained: Load the folder's weights; false draws new ones (for training from scratch).
        activation_checkpointing: Recompute each decoder layer in the backward pass.
        trust_remote_code: Run model code that the folder brings along.
        quantization: Arguments of transformers' `BitsAndBytesConfig`: linear maps but the output
            head are loaded in 4 or 8 bit; None loads all in `dtype`.
        on_meta: Build it without weights and without memory, for a process that gets its part of
            them from another one.

    Raises:
        UserError: If the folder is incomplete, damaged, or not a causal language model, or
            `quantization` cannot be done: see `quantization_config`, or no weights are loaded, or
            those of the folder are quantized already.
    """
    description = ModelFolder(folder)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention,
        "trust_remote_code": trust_remote_code,
    }
    if quantization is not None:
        _refuse_quantization(description, pretrained)
        options["quantization_config"] = quantization_config(quantization, dtype)
        options["device_map"] = {"": str(torch.empty(0).device)}  # the Trainer's, not any GPU
    try:
        if on_meta:
            model = _build_on_meta(folder, options)
        elif pretrained:
            description.check_weights()
            model = _load_weights(folder, options)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(config, **options)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            f"{folder} cannot be loaded as a causal language model: {_reason(error)}"
        ) from error
    model.train()  # from_pretrained returns eval mode, which Lightning would keep
    model.config.use_cache = False
    _keep_one_layout(model)
    if activation_checkpointing:
        _enable_checkpointing(model)
    return model


def _load_weights(folder: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused here, by name
        **options,
    )
    model, info = loaded
    _refuse_mismatched(folder, info["mismatched_keys"])
    _refuse_missing(folder, info["missing_keys"])
    return model


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it brings code of its own; read that, and set model.trust_remote_code: true to run it."
        )
    return (str(error).strip() or repr(error)).splitlines()[0]


def quantization_config(quantization: Mapping[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers needs to load a base in 4 or 8 bit.

    Args:
        quantization: Arguments of `BitsAndBytesConfig` in plain values. Without a
            `bnb_4bit_compute_dtype`, dequantized weights are multiplied in `dtype`.
        dtype: Dtype of the weights before they are quantized.

    Raises:
        UserError: If bitsandbytes is not installed, a key or a value is not one of
            `BitsAndBytesConfig`, or neither 4 nor 8 bit are asked for.
    """
    known = [name for name in signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for name in quantization:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
            raise UserError(f"transformers' BitsAndBytesConfig has no argument {name!r}; {hint}")
    try:
        values: Any = {"bnb_4bit_compute_dtype": dtype, **quantization}
        config = BitsAndBytesConfig(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"quantization {dict(quantization)}: {error}.") from None
    if config.quantization_method() is None:
        raise UserError(
            f"quantization {dict(quantization)} quantizes nothing: set load_in_8bit: true, or "
            "load_in_4bit: true with a bnb_4bit_quant_type of nf4 or fp4."
        )
    require_bitsandbytes()
    return config


def _refuse_quantization(folder: ModelFolder, pretrained: bool) -> None:
    """Raise `UserError` where there are no plain weights to quantize."""
    if not pretrained:
        raise UserError("pretrained: false draws weights to be trained; leave quantization out.")
    if "quantization_config" in folder.config:
        raise UserError(f"{folder.path} is stored quantized already; leave quantization out.")


def _keep_one_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in evaluation, on CPUs with AVX512-BF16.

    The packed layout has no gradient with respect to the input, and stays after the first
    validation: the rest of the training would go wrong. It also fails for some sizes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _refuse_mismatched(
    folder: Path, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]
) -> None:
    """Raise `UserError` where a weight has another size than the configuration gives it."""
    for name, found, expected in sorted(mismatched):
        raise UserError(
            f"{name} has shape {list(found)} in {folder}, and {list(expected)} by its config.json: "
            "they do not belong together."
        )


def _refuse_missing(folder: Path, missing: Collection[str]) -> None:
    """Raise `UserError` where a weight would be made up: transformers only warns."""
    if missing:
        raise UserError(
            f"The weights in {folder} lack {len(missing)} tensors of the model that its "
            f"config.json describes, {min(missing)} first."
        )


def _build_on_meta(folder: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=options["trust_remote_code"])
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    if (folder / GENERATION_CONFIG_NAME).exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _enable_checkpointing(model: PreTrainedModel) -> None:
    # The method was renamed within transformers 5; the old name warns in newer ones.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def compile_decoder_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Let `torch.compile` translate each decoder layer when it is called first.

    Layers of one class share their code: it is translated once, and again for another shape.

    Args:
        model: What holds the layers.
        backend: Translator, one of torch's.

    Raises:
        UserError: If the model does not name the class of its layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} does not say what its decoder layers are; set model.compile "
            "to false."
        )
    for layer in layers:
        layer.compile(backend=backend)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the layers of a model by the class that it names as one; none if it names none."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def sharding_units(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the parts of a model that are gathered one by one where its weights are shared out.

    These are its decoder layers, and embedding and head where they are not tied.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    ends = [embedding, head] if head is not None else [embedding]
    tied = head is not None and head.weight is embedding.weight
    return decoder_layers(model) + ([] if tied else ends)
