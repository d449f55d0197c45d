"""One DataModule per data set, over one base."""

from rslightning.data.alpaca import Alpaca
from rslightning.data.base import TextDataModule
from rslightning.data.build import BadRowError
from rslightning.data.chat import Chat
from rslightning.data.gsm8k import GSM8K
from rslightning.data.jsonl import JSONL
from rslightning.data.openorca import OpenOrca
from rslightning.data.plain_text import PlainText

__all__ = [
    "GSM8K",
    "JSONL",
    "Alpaca",
    "BadRowError",
    "Chat",
    "OpenOrca",
    "PlainText",
    "TextDataModule",
]
