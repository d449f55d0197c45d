"""Callbacks for any Lightning Trainer: one public class per file."""

from rslightning.callbacks.before_after import BeforeAfter
from rslightning.callbacks.checkpoint import TrainableCheckpoint
from rslightning.callbacks.merge_adapters import MergeAdapters
from rslightning.callbacks.run_summary import RunSummary

__all__ = ["BeforeAfter", "MergeAdapters", "RunSummary", "TrainableCheckpoint"]
