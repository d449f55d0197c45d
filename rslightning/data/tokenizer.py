"""The tokenizer of a base model, and what tells two of them apart."""

import sys
from pathlib import Path
from typing import Any, Final

from rslightning.assets import resolve_asset
from rslightning.errors import UserError

FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a Hub name, folder or asset.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = resolve_asset(name)
    if folder.startswith((".", "/", "~")):
        folder = str(Path(folder).expanduser())
        if not Path(folder).is_dir():
            raise UserError(f"Tokenizer folder {name} does not exist.")
    if Path(folder).is_dir() and not any((Path(folder) / file).exists() for file in FILES):
        raise UserError(f"{name} holds no tokenizer: none of {', '.join(FILES)} is there.")
    try:
        # Left out, it would ask on the terminal whether code of the folder may run.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizer's loaders raise bare Exception, too
        first_line = (str(error).strip() or repr(error)).splitlines()[0].rstrip(" :.")
        raise UserError(f"{name} has no tokenizer that can be loaded: {first_line}.") from error
    tokenizer.model_max_length = sys.maxsize  # rows are cut, and counted, here; it would only warn
    return tokenizer


def tokenizer_identity(tokenizer: Any) -> list[Any]:
    """Return what makes two tokenizers encode alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return [vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template]
