"""Fine-tuning of language models with rank-stabilized LoRA on PyTorch Lightning.

Names are resolved when they are first used: `import rslightning` itself imports neither torch nor
Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rslightning.module import CausalLMModule

__version__ = "0.1.0"

__all__ = ["CausalLMModule", "__version__"]

_HOMES = {"CausalLMModule": "rslightning.module"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rslightning' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
