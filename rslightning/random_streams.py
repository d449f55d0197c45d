"""What a run draws while it trains: a pure function of its seed and of the place in the run.

A state of a generator would have to be kept for each process, in every checkpoint; and whatever
draws a number between a checkpoint and a kill would move all that come after it.
"""

import random

import numpy as np
import torch


def begin_stream(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Let torch, NumPy and Python draw, from now on, numbers that depend on the arguments alone.

    Args:
        seed: The run's.
        step: Number of optimizer steps that are done.
        micro_batch: Number of the micro-batch within the step.
        rank: Number of the process: no two draw the same.
    """
    words = np.random.SeedSequence((seed, step, micro_batch, rank)).generate_state(3, np.uint64)
    torch.manual_seed(int(words[0] >> np.uint64(1)))
    np.random.seed(int(words[1] >> np.uint64(32)))
    random.seed(int(words[2]))
