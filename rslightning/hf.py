"""Hugging Face models: built with every default that matters spelled out."""

from collections.abc import Collection
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rslightning.errors import UserError
from rslightning.model_folder import ModelFolder


def load_causal_lm(
    folder: Path,
    dtype: torch.dtype,
    attention: str | None = None,
    pretrained: bool = True,
    activation_checkpointing: bool = False,
    trust_remote_code: bool = False,
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

    Raises:
        UserError: If the folder is incomplete, damaged, or not a causal language model.
    """
    description = ModelFolder(folder)
    options = {
        "dtype": dtype,
        "attn_implementation": attention,
        "trust_remote_code": trust_remote_code,
    }
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
    if activation_checkpointing:
        _enable_checkpointing(model)
    return model


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
