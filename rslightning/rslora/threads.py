"""Threads that share out work which torch would split too finely, or not at all."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_each() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Yield as many threads as torch has, with their count, and let torch split the work of none.

    Torch's own would wait for each other after every step of every block: on a machine that has
    something else to do, most of the time.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as threads:
            yield threads, count
    finally:
        torch.set_num_threads(count)
