"""Models, data and paths that several tests use."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).parents[2] / "shared"


def shared(path: str) -> Path:
    """Return a file or folder of the shared data, or skip the test where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} of the shared data, which is not beside this checkout")
    return SHARED / path


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    return shared("data/gsm8k")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    return shared("models/stories260k-llama")


@pytest.fixture(scope="session")
def babyllama361() -> Path:
    return shared("models/babyllama361-llama")


@pytest.fixture
def tiny_llama():
    """Return a random Llama whose sizes are all distinct, so that a swap shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)
