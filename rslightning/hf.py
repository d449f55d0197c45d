"""Hugging Face models: built with every default that matters spelled out."""

import difflib
from collections.abc import Collection, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

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
        if pretrained:
            description.check_weights()
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
            _refuse_missing(folder, info["missing_keys"])
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(config, **options)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    model.train()  # from_pretrained returns eval mode, which Lightning would keep
    model.config.use_cache = False
    _keep_one_layout(model)
    if activation_checkpointing:
        _enable_checkpointing(model)
    return model


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
            module.support_avx512bf16_for_cpu = False


def _refuse_missing(folder: Path, missing: Collection[str]) -> None:
    """Raise `UserError` where a weight would be made up: transformers only warns."""
    if missing:
        raise UserError(
            f"The weights in {folder} lack {len(missing)} tensors of the model that its "
            f"config.json describes, {min(missing)} first."
        )


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
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(model).__name__} does not say what its decoder layers are; set model.compile "
            "to false."
        )
    for layer in layers:
        layer.compile(backend=backend)  # type: ignore[no-untyped-call]
