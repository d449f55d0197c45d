"""Strategies of Lightning, with what YAML cannot say about them; loaded when they are asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rslightning.strategies.fsdp2 import FSDP2Strategy
    from rslightning.strategies.zero import ZeroStrategy

__all__ = ["FSDP2Strategy", "ZeroStrategy"]

_HOME = {"FSDP2Strategy": "fsdp2", "ZeroStrategy": "zero"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
