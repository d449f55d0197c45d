"""Callbacks for any Lightning Trainer: one public class per file.

They carry the `final` of typing_extensions: jsonargparse reads that mark (it lets a group be
written without `class_path`), and Python 3.10's own `final` leaves none.
"""

from rslightning.callbacks.activation_moments import ActivationMomentMonitor
from rslightning.callbacks.before_after import BeforeAfter
from rslightning.callbacks.checkpoint import TrainableCheckpoint
from rslightning.callbacks.gradient_norm import GradientNormMonitor
from rslightning.callbacks.merge_adapters import MergeAdapters
from rslightning.callbacks.non_finite_guard import NonFiniteGuard
from rslightning.callbacks.rank_stability import RankStabilityReport
from rslightning.callbacks.run_summary import RunSummary
from rslightning.callbacks.score_answers import ScoreAnswers
from rslightning.callbacks.stop_on_signal import StopOnSignal
from rslightning.callbacks.tensorboard_panels import TensorBoardPanels
from rslightning.callbacks.throughput import TokenThroughputMonitor

__all__ = [
    "ActivationMomentMonitor",
    "BeforeAfter",
    "GradientNormMonitor",
    "MergeAdapters",
    "NonFiniteGuard",
    "RankStabilityReport",
    "RunSummary",
    "ScoreAnswers",
    "StopOnSignal",
    "TensorBoardPanels",
    "TokenThroughputMonitor",
    "TrainableCheckpoint",
]
