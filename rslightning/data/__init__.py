"""One DataModule per data set, over one base."""

from rslightning.data.base import TextDataModule
from rslightning.data.gsm8k import GSM8K
from rslightning.data.openorca import OpenOrca
from rslightning.data.plain_text import PlainText

__all__ = ["GSM8K", "OpenOrca", "PlainText", "TextDataModule"]
