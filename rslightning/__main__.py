"""The `rslightning` command: answers the light verbs itself and hands the others on.

Help, version and recipes come from the standard library alone, in a tenth of a second; torch and
Lightning are imported by the verbs that need them.
"""

import argparse
import difflib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TextIO

from rslightning import __version__
from rslightning.errors import DEBUG, DEBUG_VARIABLE, UserError, describe_failure
from rslightning.redaction import redact

TRAINER_VERBS = {
    "fit": "fine-tune: --config RECIPE [--config FRAGMENT ...] [--model.adapter.rank 64 ...]",
    "validate": "measure the loss on held-out rows",
    "test": "measure the loss on test rows",
    "predict": "write answers to held-out prompts",
}

UNREAD: Final = 128 + signal.SIGPIPE

EPILOG = """\
start here:
  rslightning fit --config recipes/quickstart.yaml
  rslightning fit --help                            every option of a run

--debug anywhere shows where an error was raised.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status.

    0 is success, 1 a failure while running, 2 what the user can mend, 128 + n the end by signal n:
    141 also where nobody reads the output any more, as after `| head`, which is told for what
    trains alone. With `--debug` anywhere, the traceback stands above the sentence.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if DEBUG in arguments:
        arguments.remove(DEBUG)
        os.environ[DEBUG_VARIABLE] = "1"  # read wherever an error ends a process
    _open_closed()
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        if _silence_unread() and isinstance(error, BrokenPipeError):
            trains = arguments[:1] and arguments[0] in TRAINER_VERBS
            return _say("nobody reads the output any more", UNREAD) if trains else UNREAD
        if isinstance(error, OSError) and (error.errno, error.filename) == (errno.ENOSPC, None):
            _drop_unwritten()
            return _say(f"The output took no more: {error.strerror}.", 1)
        return _say(*describe_failure(error))
    return 0


def _dispatch(arguments: list[str]) -> None:
    verb = arguments[0] if arguments else "--help"
    if verb in TRAINER_VERBS:
        from rslightning.cli import run

        run(arguments)
        return
    parsed, rest = build_parser().parse_known_args(arguments or ["--help"])
    if rest and verb not in ("data", "plan", "sweep"):
        raise UserError(f"{rest[0]!r} is not known to rslightning {verb} (see --help).")
    parsed.options = rest
    parsed.run(parsed)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of everything that is not a Trainer's business."""
    parser = _Parser(
        prog="rslightning",
        description="Fine-tune language models with rank-stabilized LoRA.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rslightning {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, purpose in TRAINER_VERBS.items():
        verbs.add_parser(verb, help=purpose)
    _add_merge(verbs)
    _add_export(verbs)
    _add_convert(verbs)
    data = verbs.add_parser("data", help="data show --config RECIPE: what the model sees")
    data.add_argument("action", choices=("show",))
    data.add_argument("-n", type=int, default=3, metavar="N", help="training blocks to show")
    data.add_argument("--ids", action="store_true", help="list each token: id, piece, target")
    data.add_argument(
        "--config",
        required=True,
        action="append",
        metavar="RECIPE",
        help="and any option of fit; several files merge as there",
    )
    data.set_defaults(run=_show_data)
    _add_plan(verbs)
    _add_sweep(verbs)
    _add_report(verbs)
    recipes = verbs.add_parser("recipes", help="list, show or copy the packaged recipes")
    recipes.add_argument("action", nargs="?", choices=("list", "show", "copy"), default="list")
    recipes.add_argument("name", nargs="?")
    recipes.set_defaults(run=_lazily("rslightning.recipes", "run"))
    return parser


def _add_merge(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    merge = verbs.add_parser("merge", help="base + adapter -> a plain Hugging Face model folder")
    _add_source(merge)
    merge.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the merged weights (default: the base's)",
    )
    merge.set_defaults(run=_lazily("rslightning.verbs", "merge"))


def _add_export(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    export = verbs.add_parser("export", help="checkpoint -> a PEFT adapter folder")
    _add_source(export)
    export.add_argument(
        "--fold-scaling",
        action="store_true",
        help="multiply gamma into B and write use_rslora: false, lora_alpha: r, for servers that "
        "ignore use_rslora",
    )
    export.set_defaults(run=_lazily("rslightning.verbs", "export"))


def _add_convert(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    convert = verbs.add_parser("convert", help="a folder with .bin weights -> safetensors")
    convert.add_argument(
        "--pickle",
        required=True,
        metavar="DIR",
        help="a model's or adapter's folder that you trust; opened with weights_only=True even so",
    )
    convert.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    convert.set_defaults(run=_lazily("rslightning.verbs", "convert"))


def _add_plan(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    plan = verbs.add_parser("plan", help="memory and operations per rank; the highest that fits")
    plan.add_argument("--memory", metavar="SIZE", help="of one device: 80GiB (default: the GPU's)")
    plan.add_argument(
        "--devices", type=int, metavar="N", help="how many there are (default: the recipe's)"
    )
    plan.add_argument(
        "--config",
        required=True,
        action="append",
        metavar="RECIPE",
        help="and any option of fit; several files merge as there",
    )
    plan.set_defaults(run=_show_plan)


def _add_sweep(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    sweep = verbs.add_parser(
        "sweep",
        help="run a grid of fits, several at once; started again, it goes on",
        epilog="Any option of fit may follow; it holds for all cells.",
    )
    sweep.add_argument("--config", required=True, metavar="SWEEP", help="a file with grids")
    sweep.add_argument("--output", metavar="DIR", help="folder of the runs (default: runs/NAME)")
    sweep.add_argument(
        "--jobs", type=_positive, metavar="N", help="fits at once (default: one per GPU or core)"
    )
    sweep.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="of a fit on a CPU (default: 1)"
    )
    sweep.add_argument(
        "--retry-failed", action="store_true", help="run failed cells anew, from their beginning"
    )
    sweep.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="where the fits run: processes here, or jobs with the options under `slurm`",
    )
    sweep.add_argument("--dry-run", action="store_true", help="print the command of every cell")
    sweep.set_defaults(run=_lazily("rslightning.experiments.sweep", "sweep"))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _add_report(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    report = verbs.add_parser("report", help="figures, tables and verdicts from run folders")
    report.add_argument(
        "folders", nargs="+", metavar="RUN_FOLDER", help="sweeps, runs, or folders of them"
    )
    report.add_argument(
        "--output", required=True, metavar="DIR", help="a new folder, or that of an older report"
    )
    report.set_defaults(run=_lazily("rslightning.experiments.report", "run"))


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a checkpoint (file or folder), an adapter folder (ours or PEFT's) or a run folder",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--base-model", metavar="NAME", help="the base model, where it moved since training"
    )


def _show_data(arguments: argparse.Namespace) -> None:
    from rslightning.cli import show_data

    configs = [word for name in arguments.config for word in ("--config", name)]
    show_data([*configs, *arguments.options], arguments.n, arguments.ids)


def _show_plan(arguments: argparse.Namespace) -> None:
    from rslightning.cli import show_plan

    configs = [word for name in arguments.config for word in ("--config", name)]
    show_plan([*configs, *arguments.options], arguments.memory, arguments.devices)


def _lazily(module: str, function: str) -> Callable[[argparse.Namespace], None]:
    def run(arguments: argparse.Namespace) -> None:
        from importlib import import_module

        getattr(import_module(module), function)(arguments)

    return run


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one sentence, with the nearest right word."""

    def error(self, message: str) -> None:  # type: ignore[override]
        if "invalid choice: " in message:
            wrong = message.partition("invalid choice: ")[2].partition(" (")[0].strip("'\"")
            choices = [c for a in self._actions if a.choices for c in a.choices]
            close = difflib.get_close_matches(wrong, choices, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; try {self.prog} --help."
            raise UserError(f"{wrong!r} is not known to {self.prog}{hint}")
        raise UserError(f"{message} (see {self.prog} --help).")


def _open_closed() -> None:
    """Let output that was closed, as by `>&-`, go nowhere.

    Else a file that the command writes would get the number of the standard output or error, and
    hold what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    nowhere = Path(os.devnull)
    sys.stdout = sys.stdout or nowhere.open("w")
    sys.stderr = sys.stderr or nowhere.open("w")


def _drop_unwritten() -> None:
    """Drop what standard output, as /dev/full, has not taken; the interpreter would try again."""
    with suppress(OSError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _silence_unread() -> bool:
    """Return whether our output has no reader; what else is written there is dropped.

    That of a pipe has ended, or a terminal is closed.
    """
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:
        return False
    waiting = select.poll()
    waiting.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in waiting.poll(0))


def _say(message: str, status: int) -> int:
    print(f"rslightning: {redact(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
