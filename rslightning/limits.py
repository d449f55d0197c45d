"""Numbers of a configuration that mean nothing below a limit, which libraries take all the same."""

from collections.abc import Mapping
from typing import Any, Final

from rslightning.errors import UserError

LEAST: Final = {
    "seed_everything": 0,
    "model.max_new_tokens": 1,
    "data.init_args.batch_size": 1,
    "data.init_args.max_length": 1,
    "data.init_args.num_workers": 0,
    "before_after.example": 0,
    "trainer.accumulate_grad_batches": 1,
}
"""Key of a whole number -> the least that it can be."""

INTERVAL: Final = "trainer.val_check_interval"
"""Key of a number of batches, a share of a pass, or a time: more than 0."""


def check_limits(config: Mapping[str, Any]) -> None:
    """Raise `UserError` if a number of a configuration is below its limit.

    Args:
        config: Options of one verb, in plain values; what is no number there is another's matter.
    """
    for key, least in LEAST.items():
        value = _at(config, key)
        if _is_number(value) and value < least:
            raise UserError(
                f"{key.replace('.init_args', '')} must be at least {least}, got {value}"
            )
    value = _at(config, INTERVAL)
    if _is_number(value) and value <= 0:
        raise UserError(f"{INTERVAL} must be more than 0, got {value}")


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
