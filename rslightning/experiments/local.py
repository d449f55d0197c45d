"""Run cells on this machine: a process each, as many at once as there are devices or cores.

The processes come from one that has imported torch and Lightning before (`forkserver` of Python's
multiprocessing): a cell starts in a fraction of a second. They end when this process does, however
it ends.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import RLock, Thread
from typing import Any, Final

from tqdm import tqdm

from rslightning.experiments.cells import Status, Task, alone, read_status, run_cell

PRELOADED: Final = ["rslightning.cli", "rslightning.experiments.cells"]
POLL_SECONDS: Final = 1.0


class LocalLauncher:
    """Runs tasks in processes of this machine.

    Args:
        slots: What each of the processes that run at once gets as `CUDA_VISIBLE_DEVICES`; None
            where there is no GPU. One process at a time runs in each slot.
        threads: Threads of a process. It decides the rounding of sums on a CPU, and so the last
            bits of a loss: it does not depend on how many processes run at once.
    """

    def __init__(self, slots: Sequence[str | None], threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
        self.slots = list(slots)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function returns in a process that has torch.

        Raises:
            Exception: What it raises.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(sender, function, arguments))
        process.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"a process ended with status {process.exitcode}") from None
        process.join()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[set[str], dict[str, Status | None]]]:
        """Run tasks; yield, about once a second, which run and how others have ended since.

        A task that has no status was killed: it said nothing.
        """
        waiting = list(tasks)
        running: dict[int, tuple[Task, BaseProcess]] = {}
        try:
            while waiting or running:
                for slot in range(len(self.slots)):
                    if slot not in running and waiting:
                        task = replace(waiting.pop(0), devices=self.slots[slot])
                        running[slot] = task, self._start(task)
                names = {task.name for task, _ in running.values()}
                yield names, {}
                connection.wait([p.sentinel for _, p in running.values()], POLL_SECONDS)
                ended = {
                    slot: running.pop(slot)
                    for slot, (_, process) in list(running.items())
                    if not process.is_alive()
                }
                if ended:
                    yield names, {t.name: read_status(t.folder) for t, _ in ended.values()}
        finally:
            for _, process in running.values():
                _kill_group(process)

    def _start(self, task: Task) -> BaseProcess:
        process = self._context.Process(target=_run, args=(task,), name=task.name)
        process.start()
        return process


def visible_devices(count: int, environment: Mapping[str, str]) -> list[str]:
    """Return what names each of `count` GPUs in `CUDA_VISIBLE_DEVICES`."""
    named = environment.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in named.split(",") if name] or [str(index) for index in range(count)]


def _run(task: Task) -> None:
    os.setpgid(0, 0)  # an interrupt at the terminal is the parent's business
    for name in set(os.environ) - set(alone(os.environ)):
        del os.environ[name]
    if task.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task.devices
    Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(RLock())  # its own is of the system's, which a killed process leaves behind
    run_cell(task)


def _end_with_parent() -> None:
    """Kill this process, and those that it started, when the sweep's has died."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _kill_group(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError, PermissionError):  # it has just begun, or ended
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _answer(sender: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.dup2(2, 1)  # what libraries print belongs to no answer
    try:
        answer = function(*arguments)
    except Exception as error:
        answer = error
    sender.send(answer)
