"""Run cells as jobs of SLURM, submitted as one array by submitit (`pip install submitit`).

The sweep's process submits and watches. Killed and started again, it watches the jobs that it had
submitted. A job whose time is over is queued again by submitit, and its cell goes on.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rslightning.errors import UserError
from rslightning.experiments.cells import Status, Task, read_status, run_cell

JOBS_FILE: Final = "jobs.json"
POLL_SECONDS: Final = 10.0


class SlurmLauncher:
    """Runs tasks as jobs.

    Args:
        folder: Where submitit keeps the jobs' scripts and output.
        options: What submitit's `AutoExecutor` takes, as `slurm_partition` or `timeout_min`.
        cluster: Where submitit submits to.
        poll_seconds: Time between two looks at the jobs.

    Raises:
        UserError: If submitit is not installed, or SLURM not there, or an option is wrong.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any],
        cluster: str = "slurm",
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError("The SLURM launcher needs submitit: pip install submitit.") from None
        self._folder, self._poll_seconds = folder, poll_seconds
        self._attach = submitit.SlurmJob if cluster == "slurm" else None
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**options)
        except (RuntimeError, TypeError, NameError, AssertionError) as error:
            raise UserError(f"SLURM jobs: {' '.join(str(error).split())}") from None

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[set[str], dict[str, Status | None]]]:
        """Submit tasks; yield, now and then, which run and how others have ended since."""
        folders = {task.name: task.folder for task in tasks}
        jobs = self._submit(tasks)
        while jobs:
            ended = {name for name, job in jobs.items() if job.done()}
            running = {name for name, job in jobs.items() if job.state == "RUNNING"}
            yield running | ended, {name: read_status(folders[name]) for name in sorted(ended)}
            for name in ended:
                del jobs[name]
            if not ended:
                time.sleep(self._poll_seconds)

    def _submit(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """Return cell -> job: those that an earlier process submitted, and new ones."""
        jobs = self._submitted({task.name for task in tasks})
        # A job's fit is a process of its own: submitit's gets the signals.
        new = [replace(task, in_processes=True) for task in tasks if task.name not in jobs]
        if new:
            submitted = self._executor.map_array(_job(), new)
            jobs |= {task.name: job for task, job in zip(new, submitted, strict=True)}
            self._folder.mkdir(parents=True, exist_ok=True)
            numbers = {name: job.job_id for name, job in jobs.items()}
            (self._folder / JOBS_FILE).write_text(json.dumps(numbers), encoding="utf-8")
        return jobs

    def _submitted(self, names: set[str]) -> dict[str, Any]:
        path = self._folder / JOBS_FILE
        if self._attach is None or not path.exists():
            return {}
        numbers = json.loads(path.read_text(encoding="utf-8"))
        jobs: dict[str, Any] = {
            n: self._attach(self._folder, id_) for n, id_ in numbers.items() if n in names
        }
        return {name: job for name, job in jobs.items() if not job.done()}


def _job() -> Any:
    """Return what a job calls: submitit queues it again when its time is over."""
    from submitit.helpers import Checkpointable

    class RunCell(Checkpointable):
        def __call__(self, task: Task) -> None:
            run_cell(task)

    return RunCell()
