"""Runs of several processes: how many there are, and that all of them end when one does.

Three ways start them. From the console, rank 0 starts the others of its node, as Lightning does;
torchrun and SLURM start all. Each process watches whoever can speak for the others:

    console    rank 0 waits for the processes that it started; each of these watches rank 0
    torchrun   the agent waits for all of its node; each of these watches the agent
    SLURM      srun --kill-on-bad-exit=1 does

A process that fails leaves at once, without tidying up: the others may be inside a collective
operation, where they would wait for it until a timeout of many minutes.
"""

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from subprocess import Popen
from threading import Lock, Thread
from typing import Any, Final, NamedTuple

from rslightning.errors import STOP_SIGNALS, StoppedError, UserError, describe_failure
from rslightning.redaction import redact

LAUNCHER_VARIABLE: Final = "RSLIGHTNING_LAUNCHER"
"""Process id of rank 0, for the processes that it starts."""

LOST_PEER: Final = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
"""What an error says that another process's death caused."""

LOST_PEER_SECONDS: Final = 5.0
WATCH_SECONDS: Final = 0.25
EXIT_SECONDS: Final = 60.0

ADVICE: Final = "the run has ended; --ckpt_path last goes on with it"

STOPPED: Final = tuple(128 + number for number in STOP_SIGNALS)
"""Statuses of processes that a signal has stopped together (`StoppedError`)."""


class Started(NamedTuple):
    """Processes that somebody else started."""

    by: str
    per_node: int
    nodes: int


def started_processes(environment: Mapping[str, str]) -> Started | None:
    """Return what torchrun or SLURM started, None where this process is on its own.

    Args:
        environment: Environment variables.

    Raises:
        UserError: If SLURM was told of several tasks in a way in which they cannot find each other.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        per_node, world = (int(environment[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        return Started("torchrun", per_node, world // per_node)
    if environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):  # a shell, not a step
        return None
    return _slurm_tasks(environment) if "SLURM_NTASKS" in environment else None


def _slurm_tasks(environment: Mapping[str, str]) -> Started:
    tasks, nodes = (int(environment.get(name, 1)) for name in ("SLURM_NTASKS", "SLURM_NNODES"))
    if tasks > 1 and "SLURM_STEP_ID" not in environment:
        raise UserError(
            f"SLURM holds {tasks} tasks and this process was not started by srun, so it would wait "
            "for the others forever: write srun before the command."
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise UserError(
            f"SLURM was given --ntasks={tasks}: give --ntasks-per-node={tasks // nodes} in its "
            "place, from which the processes learn where they are."
        )
    return Started("SLURM", int(environment.get("SLURM_NTASKS_PER_NODE", tasks)), nodes)


def choose_devices(devices: Any, num_nodes: int, environment: Mapping[str, str]) -> tuple[Any, int]:
    """Return the Trainer's `devices` and `num_nodes`: what was started, where that is known.

    On the CPU Lightning's `auto` would be one device, and each process a run of its own.

    Args:
        devices: `auto`, a number, or a list of devices, as the Trainer takes them.
        num_nodes: Number of nodes; 1, the default, is taken as `auto`.
        environment: Environment variables.

    Raises:
        UserError: If they contradict what was started, or `devices` is a word, and what
            `started_processes` raises.
    """
    started = started_processes(environment)
    if started is None:
        return devices, num_nodes
    said = f"{started.by} started {started.per_node} processes per node (nodes: {started.nodes})"
    if _count(devices) not in (None, started.per_node):
        raise UserError(
            f"{said}, but trainer.devices is {devices}: give --trainer.devices {started.per_node}, "
            f"or tell {started.by} to start {_count(devices)}."
        )
    if num_nodes not in (1, started.nodes):
        raise UserError(
            f"{said}, but trainer.num_nodes is {num_nodes}: give --trainer.num_nodes "
            f"{started.nodes}, or tell {started.by} to use {num_nodes}."
        )
    return (started.per_node if _count(devices) is None else devices), started.nodes


def _count(devices: Any) -> int | None:
    """Return how many devices the Trainer's argument means, None if as many as there are."""
    if devices in ("auto", -1, "-1"):
        return None
    if isinstance(devices, str):
        numbers = [word for word in devices.split(",") if word.strip()]
        if not all(word.strip().isdigit() for word in numbers):
            raise UserError(f"trainer.devices is a number, a list or auto, got {devices!r}.")
        return len(numbers) if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)


class Children:
    """The processes that rank 0 started: the first that fails ends all of them, and rank 0.

    Lightning looks at them every five seconds, and kills all, itself included, without a word that
    names the rank. Here a thread waits for each, and is there first.
    """

    def __init__(self) -> None:
        self._launcher: Any = None
        self._thread: Thread | None = None
        self._speaker = Lock()
        self._ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background

    @property
    def processes(self) -> list[Popen[Any]]:
        """What was started up to now."""
        return [] if self._launcher is None else self._launcher.procs

    def watch(self, launcher: Any) -> None:
        """Watch the processes that Lightning's launcher will start; most launchers start none."""
        starts = getattr(launcher, "num_processes", 1) > 1 and hasattr(launcher, "procs")
        if starts and not launcher.cluster_environment.creates_processes_externally:
            os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
            self._launcher = launcher
            self._thread = Thread(target=self._watch, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait until all have ended as they should: one that fails now ends this process, too."""
        if self.processes and self._thread is not None:
            self._thread.join(EXIT_SECONDS)

    def kill(self) -> bool:
        """Kill all that still run; return False if another thread has begun to."""
        if not self._speaker.acquire(blocking=False):
            return False
        for process in self.processes:
            with suppress(OSError):
                process.kill()
        return True

    def _watch(self) -> None:
        while len(self.processes) < self._launcher.num_processes - 1:
            time.sleep(WATCH_SECONDS)
        threads = [
            Thread(target=self._follow, args=(rank, process), daemon=True)
            for rank, process in enumerate(self.processes, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _follow(self, rank: int, process: Popen[Any]) -> None:
        status = process.wait()
        if status in STOPPED:  # rank 0 is about to end in the same way
            time.sleep(EXIT_SECONDS)
        # After an interrupt Lightning ignores more of them, and kills the others itself.
        interrupted = signal.getsignal(signal.SIGINT) is signal.SIG_IGN and not self._ignored
        if status != 0 and not interrupted and self.kill():
            _leave(f"rank {rank} {_describe(status)}: {ADVICE}.", max(status, 1))


CHILDREN: Final = Children()


@contextmanager
def ending_together() -> Iterator[None]:
    """Run the block so that no process of a run outlives another one that failed.

    A failure that all processes share is told once, by rank 0, for which the others wait; that of
    one alone is told by it. A process on its own only runs the block.
    """
    _watch_launcher()
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, StoppedError) and error.signum == signal.SIGUSR1 and _rank() == 0:
            _ask_for_another_turn()
        if CHILDREN.processes or _is_started():
            _fail(error)
        raise
    CHILDREN.finish()
    if CHILDREN.processes or _is_started():
        # Threads of the communication libraries now and then abort a process that ends by itself.
        atexit._run_exitfuncs()
        _leave(None, 0)


def _ask_for_another_turn() -> None:
    """Ask SLURM to queue the job again, which it then ends."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is not None:
        with suppress(OSError):
            subprocess.run(["scontrol", "requeue", job], check=False)


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", _local_rank())))


def _is_started() -> bool:
    """Return whether this process was started with others: by rank 0, torchrun or srun."""
    return _launcher() is not None or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _launcher() -> tuple[int, str, int] | None:
    """Return the process that started this one, its name, and the local rank that tells its end."""
    first = int(os.environ.get(LAUNCHER_VARIABLE, os.getpid()))
    if first != os.getpid():
        return first, "rank 0", 1
    return (os.getppid(), "torchrun", 0) if "TORCHELASTIC_RUN_ID" in os.environ else None


def _watch_launcher() -> None:
    """End this process when the one that started it is gone: nobody else would end it."""
    if (launcher := _launcher()) is None:
        return
    process, name, speaker = launcher

    def watch() -> None:
        while os.getppid() == process:
            time.sleep(WATCH_SECONDS)
        _leave(f"{name} is gone: {ADVICE}." if _local_rank() == speaker else None, 1)

    Thread(target=watch, daemon=True).start()


def _fail(error: BaseException) -> None:
    """Tell the error, unless somebody else ends this process before its turn, and leave."""
    if isinstance(error, StoppedError):
        _leave_together(error)
    rank, lost_peer = _rank(), _is_lost_peer(error)
    time.sleep(LOST_PEER_SECONDS if lost_peer else 2.0 * (rank > 0) + 1.0 * (_local_rank() > 0))
    if not CHILDREN.kill():
        time.sleep(EXIT_SECONDS)  # the other thread ends this process
    if isinstance(error, KeyboardInterrupt):
        _leave("interrupted", 130)
    if lost_peer:
        _leave(f"rank {rank} failed in communication: {' '.join(str(error).split())}", 1)
    _leave(*describe_failure(error))


def _leave_together(stopped: StoppedError) -> None:
    """Leave as all processes of the run do now, their state saved; rank 0 says why.

    Those that it started go first. torchrun and srun end what is left when one has ended: so the
    others leave rank 0 a moment.
    """
    if _rank() > 0:
        time.sleep(0.0 if LAUNCHER_VARIABLE in os.environ else 2.0)
        _leave(None, stopped.status)
    for process in CHILDREN.processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_SECONDS / 2)
    CHILDREN.kill()
    _leave(str(stopped), stopped.status)


def _is_lost_peer(error: BaseException) -> bool:
    text = f"{type(error).__name__}: {error}".lower()
    return text.startswith("dist") or any(word in text for word in LOST_PEER)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def _describe(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def _leave(message: str | None, status: int) -> None:
    """End this process now: no thread, library or other process is waited for."""
    with suppress(Exception):  # nobody may read it any more
        if message is not None:
            print(f"\nrslightning: {redact(message)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
