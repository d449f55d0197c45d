"""Callbacks for any Lightning Trainer: one public class per file.

They carry the `final` of typing_extensions: jsonargparse reads that mark (it lets a group be
written without `class_path`), and Python 3.10's own `final` leaves none.
"""

from rslightning.callbacks.before_after import BeforeAfter
from rslightning.callbacks.checkpoint import TrainableCheckpoint
from rslightning.callbacks.merge_adapters import MergeAdapters
from rslightning.callbacks.run_summary import RunSummary

__all__ = ["BeforeAfter", "MergeAdapters", "RunSummary", "TrainableCheckpoint"]
