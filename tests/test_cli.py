import csv
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rslightning import CausalLMModule, __version__, recipe_cli
from rslightning.__main__ import main
from rslightning.cli import known_keys
from rslightning.cli_errors import explain
from rslightning.recipes import packaged_names, packaged_root
from rslightning.rslora import AdapterSpec, collect_adapter, inject_adapters, write_adapter


class Outcome(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


def run(*arguments) -> Outcome:
    """Run a command in this process, as the `rslightning` script does."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code or 0
        finally:
            for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # what seed_everything leaves
                os.environ.pop(name, None)
    return Outcome(status, out.getvalue(), err.getvalue())


def said(outcome: Outcome, status: int = 2) -> str:
    """Return the one sentence of a failed command; progress bars may stand above it."""
    assert outcome.status == status
    assert "Traceback" not in outcome.err
    *above, last = outcome.err.splitlines()
    assert last.startswith("rslightning: ")
    assert not any(line.startswith("rslightning: ") for line in above)
    return last.removeprefix("rslightning: ")


def config(base: Path, data: Path) -> dict:
    return {
        "seed_everything": 1,
        "model": {
            "base_model": str(base),
            "dtype": "float32",
            "adapter": {"rank": 3, "alpha": 5.0},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "max_new_tokens": 4,
        },
        "data": {
            "class_path": "rslightning.data.OpenOrca",
            "init_args": {"path": str(data), "batch_size": 4, "max_length": 128},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 3,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": "tiny", "default_hp_metric": False},
            },
        },
    }


@pytest.fixture
def recipe(tmp_path, monkeypatch, model_folder, orca_folder):
    """Write `tiny.yaml` into a fresh working folder and return its name."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(config(model_folder, orca_folder)))
    return "tiny.yaml"


def write_yaml(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def leftovers() -> set[str]:
    """Return what lies in the working folder beside the recipes."""
    return {path.name for path in Path().iterdir() if path.suffix != ".yaml"}


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_verb(arguments):
    outcome = run(*arguments)
    assert outcome.status == 0
    for verb in ("fit", "validate", "test", "predict", "merge", "export", "convert", "recipes"):
        assert f"\n    {verb} " in outcome.out
    assert "rslightning fit --config recipes/quickstart.yaml" in outcome.out


def test_version():
    assert run("--version") == (0, f"rslightning {__version__}\n", "")


@pytest.mark.parametrize("verb", ["merge", "export", "convert", "recipes"])
def test_help_of_a_light_verb(verb):
    outcome = run(verb, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"usage: rslightning {verb}")


def test_help_of_fit_lists_our_options():
    outcome = run("fit", "--help")
    assert outcome.status == 0
    for option in ("--model.base_model", "--merge_adapters", "--checkpoint", "--trainer.max_steps"):
        assert option in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "'fitt' is not known to rslightning; did you mean 'fit'?"),
        (["frobnicate"], "'frobnicate' is not known to rslightning; try rslightning --help."),
        (["fit"], "fit needs a configuration: --config recipes/quickstart.yaml"),
        (
            ["merge"],
            "the following arguments are required: --checkpoint, --output (see rslightning merge "
            "--help).",
        ),
        (["recipes", "shw"], "'shw' is not known to rslightning recipes; did you mean 'show'?"),
        (["recipes", "show"], "`recipes show` needs the name of a recipe."),
        (
            ["fit", "--config", "recipes/quikstart.yaml"],
            "There is no configuration recipes/quikstart.yaml; did you mean "
            "recipes/quickstart.yaml?",
        ),
        (
            ["recipes", "copy", "quikstart"],
            "There is no configuration quikstart; did you mean quickstart?",
        ),
        (
            ["fit", "--config=/no/x.yaml"],
            "There is no configuration /no/x.yaml; `rslightning recipes` lists them.",
        ),
        (["merge", "--checkpoint", "no.ckpt", "--output", "x"], "no.ckpt does not exist."),
        (["export", "--checkpoint", "no.ckpt", "--output", "x"], "no.ckpt does not exist."),
    ],
)
def test_a_wrong_word_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == (2, "", f"rslightning: {message}\n")
    assert leftovers() == set()


def test_the_script_itself_exits_with_the_status():
    command = [sys.executable, "-m", "rslightning", "fitt"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert (
        outcome.stderr == "rslightning: 'fitt' is not known to rslightning; did you mean 'fit'?\n"
    )


def run_unread(*arguments, stderr=subprocess.PIPE) -> subprocess.CompletedProcess:
    """Run a command as a process whose output goes into a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "rslightning", *map(str, arguments)]
        stderr = writing if stderr is subprocess.STDOUT else stderr
        return subprocess.run(command, stdout=writing, stderr=stderr, text=True, check=False)
    finally:
        os.close(writing)


@pytest.mark.parametrize(
    "arguments",
    [
        ("recipes",),
        ("recipes", "show", "recipes/quickstart.yaml"),
        ("sweep", "--config", "recipes/paper/figure2.yaml", "--dry-run"),
    ],
)
@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_output_that_nobody_reads_ends_a_command_quietly(tmp_path, monkeypatch, arguments, stderr):
    monkeypatch.chdir(tmp_path)
    ended = run_unread(*arguments, stderr=stderr)
    assert ended.returncode == 128 + signal.SIGPIPE
    assert not ended.stderr
    assert not list(tmp_path.iterdir())


def test_data_that_nobody_reads_ends_quietly(recipe):
    ended = run_unread("data", "show", "--config", recipe)
    assert ended.returncode == 128 + signal.SIGPIPE
    assert "BrokenPipe" not in ended.stderr
    assert "rslightning:" not in ended.stderr


def test_a_fit_whose_output_nobody_reads_says_that_it_ended(recipe):
    ended = run_unread("fit", "--config", recipe, "--trainer.enable_progress_bar=true")
    assert ended.returncode == 128 + signal.SIGPIPE
    assert ended.stderr.endswith("\nrslightning: nobody reads the output any more\n")


LONG_FIT = ("--trainer.max_steps=100000", "--trainer.enable_progress_bar=true")


def read_steps(descriptor: int) -> None:
    """Read the output of a fit until its progress bar has shown a few steps."""
    seen = b""
    while seen.count(b"train/loss") < 5:
        seen += os.read(descriptor, 65536)  # raises, or blocks, if the fit has ended


def last_step() -> int:
    last = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    return torch.load(last, weights_only=True)["global_step"]


def test_a_fit_whose_output_is_read_no_longer_saves_what_it_did(recipe):
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "rslightning", "fit", "--config", recipe, *LONG_FIT]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True) as fit:
        os.close(writing)
        read_steps(reading)
        os.close(reading)
        said = fit.communicate()[1]
    assert fit.returncode == 128 + signal.SIGPIPE
    assert said.endswith("\nrslightning: nobody reads the output any more\n")
    assert last_step() >= 2


def test_a_fit_whose_terminal_is_closed_saves_its_last_step(recipe, hangs_up):
    process, terminal = pty.fork()
    if process == 0:
        os.execv(
            sys.executable,
            [sys.executable, "-m", "rslightning", "fit", "--config", recipe, *LONG_FIT],
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    read_steps(terminal)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == 128 + signal.SIGHUP
    assert last_step() >= 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["recipes", "fit"])
def test_output_that_is_closed_is_not_missed(recipe, command, closed):
    options = f"fit --config {recipe} --trainer.max_steps 1" if command == "fit" else command
    ended = subprocess.run(
        f"exec {sys.executable} -m rslightning {options} {closed}",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0
    assert "rslightning: " not in ended.stderr
    if command == "fit":
        folder = Path("runs/tiny/version_0")
        (events,) = folder.glob("events.*")
        assert last_step() == 1
        assert b"0 rows cut" not in events.read_bytes()  # what is printed is in no file
        assert (folder / "merged/config.json").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_onto_a_full_disk_is_told(unbuffered):
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "rslightning", "recipes"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert ended.returncode == 1
    assert ended.stderr == "rslightning: The output took no more: No space left on device.\n"


def test_a_broken_pipe_elsewhere_is_a_failure(monkeypatch):
    def fail(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("rslightning.cli.run", fail)
    outcome = run("fit")
    assert outcome.status == 1
    assert outcome.err.startswith("rslightning: BrokenPipeError: [Errno 32] Broken pipe (this is ")


def test_an_interrupt_has_its_own_status(monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("rslightning.cli.run", interrupt)
    assert run("fit") == (130, "", "rslightning: interrupted\n")


def test_an_interrupted_fit_keeps_its_checkpoint(recipe, monkeypatch):
    step = CausalLMModule.training_step

    def interrupt(module, batch, batch_idx):
        if batch_idx == 2:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(CausalLMModule, "training_step", interrupt)
    try:
        outcome = run("fit", "--config", recipe)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it deaf
    assert said(outcome, status=130) == "interrupted"
    saved = torch.load("runs/tiny/version_0/checkpoints/step-2.ckpt", weights_only=True)
    assert saved["global_step"] == 2


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_are_listed_with_their_purpose():
    outcome = run("recipes")
    assert outcome == run("recipes", "list")
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert list(lines) == packaged_names()
    assert "recipes/quickstart.yaml" in lines
    assert all(purpose[-1] in ".?" for purpose in lines.values())


def test_a_recipe_is_shown_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (packaged_root() / "recipes/quickstart.yaml").read_text()
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert run("recipes", "show", name) == (0, text, "")
    assert run("recipes", "copy", "quickstart").status == 0
    assert Path("quickstart.yaml").read_text() == text
    Path("quickstart.yaml").write_text("# changed")
    assert said(run("recipes", "copy", "quickstart")) == (
        "quickstart.yaml exists here; remove it or copy in another folder."
    )
    assert run("recipes", "show", "quickstart.yaml").out == "# changed"  # the folder's own wins


# --- wrong options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "--model.adaptr.rank 8",
            "There is no option model.adaptr.rank; did you mean model.adapter.rank?",
        ),
        (
            "--model.adapter.rnk 8",
            "There is no option model.adapter.rnk; did you mean model.adapter.rank?",
        ),
        ("--modl.rank 8", "There is no option modl.rank; did you mean model.adapter.rank?"),
        ("--rank 8", "There is no option rank; did you mean model.adapter.rank?"),
        ("--data.pth x", "There is no option data.pth; did you mean data.path?"),
        (
            "--merge_adapters.dtpe float32",
            "There is no option merge_adapters.dtpe; did you mean merge_adapters.dtype?",
        ),
        (
            "--merge_adaptrs.dtype float32",
            "There is no option merge_adaptrs.dtype; did you mean merge_adapters.dtype?",
        ),
        ("--model.adapter.rank 0", "rank must be a positive integer, got 0"),
        ("--model.adapter.rank 2.5", "model.adapter.rank: Expected int or 'auto'; got 2.5"),
        ("--model.adapter.alpha=-1", "alpha must be positive and finite, got -1.0"),
        ("--model.adapter.alpha big", "model.adapter.alpha: Expected float. Got value: big"),
        ("--model.adapter.dropout 1.5", "dropout must be in [0, 1), got 1.5"),
        (
            "--model.adapter.scaling rslor",
            "model.adapter.scaling: Expected one of 'lora', 'rslora', 'quarter_root', "
            "'inverse_square', 'unit'. Got value: rslor",
        ),
        (
            "--model.dtype fp8",
            "model.dtype: Expected one of 'float32', 'bfloat16', 'float16'. Got value: fp8",
        ),
        ("--data.batch_size 0", "data.batch_size must be at least 1, got 0"),
        ("--data.num_workers -1", "data.num_workers must be at least 0, got -1"),
        ("--seed_everything -1", "seed_everything must be at least 0, got -1"),
        ("--model.max_new_tokens -5", "model.max_new_tokens must be at least 1, got -5"),
        ("--before_after.example -1", "before_after.example must be at least 0, got -1"),
        (
            "--trainer.accumulate_grad_batches -3",
            "trainer.accumulate_grad_batches must be at least 1, got -3",
        ),
        (
            "--trainer.val_check_interval 0",
            "trainer.val_check_interval must be more than 0, got 0",
        ),
        (
            "--trainer.devices -1",
            "`devices` selected with `CPUAccelerator` should be an int > 0.",
        ),
        (
            "--seed_everything 4294967296",
            "4294967296 is not in bounds, numpy accepts from 0 to 4294967295",
        ),
        ("--data.batch_size x", "data.batch_size: Expected int. Got value: x"),
        (
            "--data.class_path rslightning.data.OpenOrka",
            "module 'rslightning.data' has no attribute 'OpenOrka'",
        ),
        ("--trainer.max_steps x", "trainer.max_steps: Expected int. Got value: x"),
        (
            "--trainer.devices 0",
            "`Trainer(devices='0')` value is not a valid input using cpu accelerator.",
        ),
        ("--checkpoint.every_n_steps x", "checkpoint.every_n_steps: Expected int. Got value: x"),
        ("--ckpt_path no.ckpt", "There is no checkpoint no.ckpt."),
        ("extra", "unrecognized arguments: extra"),
        *(
            (
                f"--data.{name}",
                "data.tokenizer is always that of model.base_model, and cannot be given: put "
                "another one's files into the base's folder.",
            )
            for name in ("tokenizer nowhere", "tokenizer=nowhere", "init_args.tokenizer nowhere")
        ),
        (
            "--model.optimizer.lr nan",
            "model.optimizer.lr: Expected a finite number. Got value: nan",
        ),
        ("--model.adapter.rank 1e2", "model.adapter.rank: Expected int or 'auto'; got 100.0"),
        ("--ckpt_path tiny.yaml", "tiny.yaml is no checkpoint."),
        ("--config .", ". is a folder; give the file of a configuration."),
    ],
)
def test_a_wrong_option_is_one_line(recipe, wrong, message):
    assert run("fit", "--config", recipe, *wrong.split()) == (2, "", f"rslightning: {message}\n")
    assert leftovers() == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {adapter: {rnk: 8}}",
            "There is no option model.adapter.rnk; did you mean model.adapter.rank?",
        ),
        (
            "model: {bse_model: x}",
            "There is no option model.bse_model; did you mean model.base_model?",
        ),
        (
            "trainer: {max_step: 3}",
            "There is no option trainer.max_step; did you mean trainer.max_steps?",
        ),
        (
            "data: {init_args: {batchsize: 3}}",
            "There is no option data.batchsize; did you mean data.batch_size?",
        ),
        (
            "merge_adapters: {dtpe: float32}",
            "There is no option merge_adapters.dtpe; did you mean merge_adapters.dtype?",
        ),
        (
            "checkpoint: {every_n_step: 3}",
            "There is no option checkpoint.every_n_step; did you mean checkpoint.every_n_steps?",
        ),
        ("model: {adapter: {rank: 0}}", "rank must be a positive integer, got 0"),
        ("model: {adapter: {alpha: big}}", "model.adapter.alpha: Expected float. Got value: big"),
        *(
            (
                f"data: {{{options}}}",
                "wrong.yaml: data.tokenizer is always that of model.base_model, and cannot be "
                "given: put another one's files into the base's folder.",
            )
            for options in ("tokenizer: x", "init_args: {tokenizer: x}")
        ),
        (
            "model: &a [*a]",
            "wrong.yaml holds an alias within what it names, which has no end.",
        ),
        ("just text", "wrong.yaml holds no keys such as model, data and trainer."),
        ("", "wrong.yaml holds no keys such as model, data and trainer."),
    ],
)
def test_a_wrong_key_in_a_file_is_one_line(recipe, text, message):
    write_yaml("wrong.yaml", text)
    outcome = run("fit", "--config", recipe, "--config", "wrong.yaml")
    assert outcome == (2, "", f"rslightning: {message}\n")
    assert leftovers() == set()


def test_a_refused_run_removes_no_curves_of_another(recipe):
    """One whose logger has a fixed version, and which saves nothing but its curves."""
    once = ["fit", "--config", recipe, "--trainer.logger.init_args.version", "one"]
    only_curves = ["--checkpoint", "null", "--merge_adapters", "null"]
    assert run(*once, *only_curves).status == 0
    before = {path: path.read_bytes() for path in Path("runs/tiny/one").iterdir()}
    assert {path.name.partition(".out")[0] for path in before} == {
        *("config.yaml", "events", "hparams.yaml")
    }
    time.sleep(1.1)  # the time in a name has whole seconds
    said(run(*once, *only_curves, "--model.adapter.targets", "[q_prj]"))
    for path, content in before.items():
        assert path.read_bytes() == content


def test_a_refused_run_leaves_the_folder_that_was_given(recipe):
    Path("given").mkdir()
    logger = ["--trainer.logger.init_args.save_dir", str(Path("given").absolute())]
    said(run("fit", "--config", recipe, *logger, "--model.adapter.targets", "[q_prj]"))
    assert list(Path("given").iterdir()) == []


def test_a_file_that_is_no_yaml_is_one_line(recipe):
    outcome = run("fit", "--config", write_yaml("wrong.yaml", "model: [1,\ntrainer: {"))
    message = said(outcome)
    assert re.match(r"wrong\.yaml, line \d+, column \d+, is not YAML: ", message)
    assert "expected" in message
    assert outcome.err.count("\n") == 1


def test_an_error_that_names_no_key_stays_a_sentence():
    assert explain("something\nwent wrong", known_keys()) == "something; went wrong"


def test_known_keys_reach_into_groups_and_records():
    keys = set(known_keys())
    assert {"model.adapter.rank", "data.path", "merge_adapters.dtype", "trainer.max_steps"} <= keys


# --- wrong models and data ------------------------------------------------------------------------


def test_a_base_that_is_not_there(recipe, tmp_path):
    outcome = run("fit", "--config", recipe, "--model.base_model", tmp_path / "absent")
    assert said(outcome) == f"Base model {tmp_path / 'absent'} does not exist."
    assert leftovers() <= {"runs"}


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_base_without_its_weights(recipe, model_folder, damage):
    base = Path(shutil.copytree(model_folder, "base")).absolute()
    weights = base / "model.safetensors"
    if damage == "missing":
        weights.unlink()
        message = f"{base} has no model.safetensors and no model.safetensors.index.json."
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
        message = f"{weights} cannot be read as safetensors ("
    outcome = run("fit", "--config", recipe, "--model.base_model", base)
    assert said(outcome).startswith(message)
    assert leftovers() <= {"base", "runs"}


def test_a_tokenizer_of_a_larger_vocabulary(recipe, model_folder, orca_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, num_hidden_layers=1, **sizes)).save_pretrained(
        "base"
    )
    AutoTokenizer.from_pretrained(model_folder).save_pretrained("base")
    for verb in ("fit", "validate"):
        message = said(run(verb, "--config", recipe, "--model.base_model", "base"))
        assert message.startswith("The data has token id ")
        assert message.endswith(
            f", but {Path('base').absolute()} has a vocabulary of 100: "
            "tokenizer and model do not belong together."
        )


def test_data_that_is_not_there(recipe):
    outcome = run("fit", "--config", recipe, "--data.path", "./absent.jsonl")
    assert said(outcome) == "absent.jsonl does not exist."


def test_a_target_that_there_is_not(recipe):
    message = said(run("fit", "--config", recipe, "--model.adapter.targets", '["q_prj"]'))
    assert "'q_prj'" in message
    assert "did you mean 'q_proj'?" in message


def test_a_schedule_that_needs_a_metric(recipe):
    schedule = "torch.optim.lr_scheduler.ReduceLROnPlateau"
    assert said(run("fit", "--config", recipe, "--model.lr_scheduler", schedule)) == (
        "model.lr_scheduler: ReduceLROnPlateau waits for a metric, which is not supported."
    )


@pytest.mark.filterwarnings("ignore:.*could not be saved:UserWarning")
@pytest.mark.parametrize(
    ("max_bytes", "merges", "message"),
    [
        # Less than a checkpoint:
        (20_000, "null", "The final state is in no checkpoint: File too large."),
        # More than a checkpoint, less than the merged model:
        (80_000, "{}", "Could not write "),
    ],
)
def test_a_fit_onto_a_full_disk(recipe, small_disk, max_bytes, merges, message):
    with small_disk(max_bytes):
        outcome = run("fit", "--config", recipe, "--merge_adapters", merges)
    assert said(outcome, status=1).startswith(message)
    whole = {"config.yaml", "hparams.yaml", "adapter", "checkpoints"}
    for path in Path("runs/tiny/version_0").iterdir():
        assert path.name in whole or path.name.startswith("events.out.tfevents")
    for path in Path("runs/tiny/version_0").glob("checkpoints/*"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("content", [b"no archive", None])
def test_a_checkpoint_that_cannot_be_read(recipe, content):
    if content is None:
        torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, "bad.ckpt")
    else:
        Path("bad.ckpt").write_bytes(content)
    message = said(run("fit", "--config", recipe, "--ckpt_path", "bad.ckpt"))
    assert message.startswith("bad.ckpt ")
    assert leftovers() == {"bad.ckpt"}


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, model_folder, orca_folder):
    """Fit three steps through the command line; return the working folder."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config(model_folder, orca_folder)))
    before = Path.cwd()
    os.chdir(folder)
    try:
        outcome = run("fit", "--config", "tiny.yaml")
    finally:
        os.chdir(before)
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def fitted(whole_run, tmp_path, monkeypatch):
    """A copy of the working folder of `whole_run`, entered; returns the run folder in it."""
    shutil.copytree(whole_run, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return Path("runs/tiny/version_0")


def test_the_data_of_a_run_are_shown_from_its_configuration(fitted):
    outcome = run("data", "show", "--config", fitted / "config.yaml", "-n", "1")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out == run("data", "show", "--config", "tiny.yaml", "-n", "1").out


def test_a_fit_stays_in_the_working_folder(recipe, tmp_path, monkeypatch):
    # A thread writes TensorBoard's files, by relative paths, while the fit goes on.
    visited, start, change = [], recipe_cli.SaveRunConfig.on_fit_start, os.chdir

    def watched(*arguments):
        monkeypatch.setattr(os, "chdir", lambda path: (visited.append(path), change(path)))
        start(*arguments)

    monkeypatch.setattr(recipe_cli.SaveRunConfig, "on_fit_start", watched)
    assert run("fit", "--config", recipe, "--trainer.max_steps", "1").status == 0
    assert visited == []


def test_a_fit_leaves_its_results(fitted):
    names = {path.name for path in fitted.iterdir()}
    assert {"config.yaml", "checkpoints", "adapter", "merged"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    checkpoints = sorted((fitted / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["last.ckpt", "step-3.ckpt"]
    saved = yaml.safe_load((fitted / "config.yaml").read_text())
    assert saved["model"]["adapter"]["rank"] == 3
    assert saved["model"]["adapter"]["scaling"] == "rslora"  # defaults are spelled out
    assert saved["seed_everything"] == 1
    base = AutoModelForCausalLM.from_pretrained(saved["model"]["base_model"])
    peft = PeftModel.from_pretrained(base, fitted / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(fitted / "merged").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, peft(ids).logits, rtol=0, atol=1e-4)


def test_the_saved_configuration_runs_again_and_gives_the_same(fitted):
    assert run("fit", "--config", fitted / "config.yaml").status == 0
    again = Path("runs/tiny/version_1")
    first, second = (yaml.safe_load((f / "config.yaml").read_text()) for f in (fitted, again))
    assert first == second
    first, second = (load_file(f / "merged/model.safetensors") for f in (fitted, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("verb", "tag"), [("validate", "val"), ("test", "test")])
def test_evaluation_of_a_checkpoint(fitted, verb, tag):
    trained = run(verb, "--config", "tiny.yaml", "--ckpt_path", fitted / "checkpoints/last.ckpt")
    untrained = run(verb, "--config", "tiny.yaml")
    assert trained.status == untrained.status == 0
    assert f"{tag}/loss" in trained.out
    assert f"{tag}/perplexity" in trained.out
    assert trained.out != untrained.out


@pytest.mark.parametrize("place", ["", "adapter", "checkpoints", "checkpoints/step-3.ckpt"])
def test_evaluation_of_whatever_a_run_left(fitted, place):
    ours = ("--config", "tiny.yaml", "--model.adapter.rank", "auto", "--ckpt_path")
    merged = ("--model.base_model", fitted / "merged", "--model.adapter", "null")
    expected = run("validate", "--config", "tiny.yaml", *merged)
    assert "val/loss" in expected.out
    assert run("validate", *ours, fitted / place).out == expected.out


def test_evaluation_of_the_newest_state_of_a_run(fitted):
    (fitted / "checkpoints/last.ckpt").unlink()
    newest = fitted / "checkpoints/step-3.ckpt"
    content = torch.load(newest, weights_only=True)
    for name, tensor in content["state_dict"].items():
        content["state_dict"][name] = torch.ones_like(tensor)
    newest = newest.rename(newest.with_name("step-4.ckpt"))
    torch.save(content, newest)
    ours = ("validate", "--config", "tiny.yaml", "--ckpt_path")
    assert run(*ours, fitted).out == run(*ours, newest).out != run(*ours, fitted / "adapter").out


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("place", ["", "adapter", "checkpoints/step-3.ckpt"])
def test_evaluation_on_another_base_is_refused(fitted, model_folder, verb, place):
    other = (fitted / "merged").absolute()
    path = fitted / place
    options = ("--config", "tiny.yaml", "--model.base_model", other)
    taken = path if place else path / "adapter"
    assert said(run(verb, *options, "--ckpt_path", path)) == (
        f"{taken} has base_model {model_folder.name!r}, this run 'merged'; set it to that or, "
        "where it has another name now, give --model.start_from in place of --ckpt_path."
    )
    assert run(verb, *options, "--model.start_from", path).status == 0


def test_evaluation_on_a_base_that_has_moved(fitted, model_folder):
    moved = shutil.copytree(model_folder, Path("elsewhere") / model_folder.name)
    options = ("validate", "--config", "tiny.yaml", "--ckpt_path", fitted)
    assert run(*options, "--model.base_model", moved).out == run(*options).out


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name
)
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_evaluation_that_is_told_to_end_says_so(recipe, monkeypatch, hangs_up, verb, number):
    begin, batches = CausalLMModule.forward, []

    def forward(self, batch):
        batches.append(batch)
        os.kill(os.getpid(), number)
        return begin(self, batch)

    monkeypatch.setattr(CausalLMModule, "forward", forward)
    monkeypatch.setattr(CausalLMModule, "generate", lambda *given: forward(*given).argmax(-1))
    before = signal.getsignal(number)
    outcome = run(verb, "--config", recipe)
    assert said(outcome, status=128 + number) == f"stopped by {number.name}"
    assert signal.getsignal(number) is before
    assert len(batches) == 1  # of two
    assert f"{verb[:3]}/loss" not in outcome.out


def test_a_signal_that_nohup_ignores_ends_no_evaluation(recipe, monkeypatch):
    begin = CausalLMModule.on_validation_start
    told = lambda self: (begin(self), os.kill(os.getpid(), signal.SIGHUP))  # noqa: E731
    monkeypatch.setattr(CausalLMModule, "on_validation_start", told)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert "val/loss" in run("validate", "--config", recipe).out
    finally:
        signal.signal(signal.SIGHUP, before)


def test_predictions_of_a_checkpoint(fitted):
    outcome = run(
        "predict", "--config", "tiny.yaml", "--ckpt_path", fitted / "checkpoints/last.ckpt"
    )
    assert outcome.status == 0
    lines = Path("runs/tiny/version_1/predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 7
    assert all(set(row) == {"prompt", "answer", "reference"} for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(fitted / "merged")
    merged = AutoModelForCausalLM.from_pretrained(fitted / "merged").eval()
    inputs = tokenizer(rows[0]["prompt"], return_tensors="pt")
    ids = merged.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
    answer = tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert rows[0]["answer"] == answer


@pytest.mark.parametrize("source", ["checkpoints/last.ckpt", "adapter", "."])
def test_merging_gives_what_the_fit_left(fitted, source):
    outcome = run("merge", "--checkpoint", fitted / source, "--output", "out")
    assert outcome.status == 0
    assert outcome.out.startswith("Merged 14 layers of ")
    left, right = (load_file(f / "model.safetensors") for f in (fitted / "merged", Path("out")))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(
        p.name for p in (fitted / "merged").iterdir()
    )


def test_merging_into_another_dtype(fitted):
    command = ("merge", "--checkpoint", fitted, "--output", "out", "--dtype", "bfloat16")
    assert run(*command).status == 0
    merged = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_merging_keeps_what_transformers_has_in_float32(fitted, make_deepseek):
    model = make_deepseek(torch.float32)
    model.save_pretrained("experts")
    inject_adapters(model, AdapterSpec(rank=3, targets=["o_proj"]))
    write_adapter(collect_adapter(model, "experts"), "small")
    assert (
        run("merge", *["--checkpoint", "small", "--output", "out", "--dtype", "bfloat16"]).status
        == 0
    )
    merged, stored = (load_file(f"{folder}/model.safetensors") for folder in ("out", "experts"))
    wide = {name: tensor for name, tensor in merged.items() if tensor.dtype == torch.float32}
    assert len(wide) == 2
    assert all(name.endswith("e_score_correction_bias") for name in wide)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in wide.items())


@pytest.mark.parametrize("fold", [False, True])
def test_an_export_is_the_adapter(fitted, model_folder, fold):
    options = ["--fold-scaling"] if fold else []
    source = fitted / "checkpoints/last.ckpt"
    outcome = run("export", "--checkpoint", source, "--output", "out", *options)
    how = "gamma folded into B" if fold else "PEFT layout"
    assert outcome == (0, f"Exported the adapters of 14 layers to out ({how}).\n", "")
    settings = json.loads(Path("out/adapter_config.json").read_text())
    assert settings["use_rslora"] is not fold
    assert settings["lora_alpha"] == (3 if fold else 5.0)
    ids = torch.arange(3, 40)[None]
    logits = []
    for folder in ("out", fitted / "adapter"):
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, folder).eval()(ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_an_output_folder_that_is_not_empty(fitted, verb):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    outcome = run(verb, "--checkpoint", fitted, "--output", "out")
    path = Path("out").absolute()
    assert said(outcome) == f"{path} exists and is not empty; choose another folder or remove it."
    assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]


def test_merging_into_another_base(fitted, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=53, num_hidden_layers=2, **sizes)).save_pretrained(
        "other"
    )
    outcome = run("merge", "--checkpoint", fitted, "--output", "out", "--base-model", "other")
    message = said(outcome)
    assert message.startswith("The adapter's update of model.layers.0.")
    assert message.endswith("it was trained on another base model.")
    assert not Path("out").exists()


def test_merging_onto_a_full_disk(fitted, small_disk):
    with small_disk(max_bytes=50_000):
        outcome = run("merge", "--checkpoint", fitted, "--output", "out")
    message = said(outcome, status=1)
    assert message.startswith(f"Could not write {Path('out').absolute()}: ")
    assert {path.name for path in Path().iterdir()} == {"runs", "tiny.yaml"}


# What Lightning says of the folder of the run that goes on is expected here.
resumes = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:The dirpath has changed from:UserWarning",
)


@resumes
def test_resuming_goes_on_in_the_same_folder(fitted):
    outcome = run(
        *("fit", "--config", "tiny.yaml", "--trainer.max_steps", "5"),
        *("--trainer.logger.init_args.version", "0"),
        *("--ckpt_path", fitted / "checkpoints/last.ckpt"),
    )
    assert outcome.status == 0
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    steps = [
        yaml.safe_load((fitted / name).read_text())["trainer"]["max_steps"]
        for name in ("config.yaml", "config.resume-1.yaml")
    ]
    assert steps == [3, 5]
    saved = torch.load(fitted / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 5


@resumes
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
def test_what_a_csv_logger_wrote_is_kept(recipe):
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs")
    fit = ("fit", "--config", recipe, *logger, "--trainer.logger.name", "tiny")
    folder = Path("runs/tiny/version_0")

    def steps(name):
        lines = csv.DictReader((folder / name).read_text().splitlines())
        return {int(line["step"]) for line in lines if line["train/loss"]}

    assert run(*fit, "--trainer.limit_val_batches", "0").status == 0
    again = ("--trainer.logger.version", "0", "--ckpt_path", folder, "--trainer.max_steps", "5")
    assert run(*fit, *again).status == 0
    assert steps("metrics.before-resume-1.csv") == {0, 1, 2}
    assert steps("metrics.csv") == {3, 4}


@pytest.fixture
def told_at_step(monkeypatch):
    """Return a function: a signal is sent in that step of the runs that follow."""
    begin = CausalLMModule.on_train_batch_start

    def tell(step, number=signal.SIGTERM):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == step - 1:
                os.kill(os.getpid(), number)
            begin(self, batch, batch_idx)

        monkeypatch.setattr(CausalLMModule, "on_train_batch_start", on_train_batch_start)

    return tell


@resumes
@pytest.mark.parametrize("how", ["auto_resume", "last", "folder"])
def test_a_stopped_run_is_gone_on_with(recipe, caplog, told_at_step, how):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    options = ["fit", "--config", recipe, "--merge_adapters", "null"]
    if how == "auto_resume":
        options += ["--auto_resume", "true"]
    folder = Path("runs/tiny/version_0")
    told_at_step(2)
    assert said(run(*options), status=143) == "stopped by SIGTERM after step 2"
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    told_at_step(-1)
    if how != "auto_resume":
        name = "last" if how == "last" else folder
        options += ["--ckpt_path", name, "--trainer.logger.init_args.version", "0"]
    assert run(*options).status == 0
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "last.ckpt",
        "step-2.ckpt",
        "step-3.ckpt",
    }
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    told = [line for line in lines if line.startswith("auto_resume: ")]
    if how == "auto_resume":
        assert told == [
            "auto_resume: a new run begins; there is none yet.",
            f"auto_resume: going on with {folder} from step-2.ckpt.",
        ]
        # It has ended: nothing is trained again, and what it leaves is made anew.
        before = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert run(*options[:3], "--auto_resume", "true").status == 0
        after = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(before[name], after[name]) for name in before)


@resumes
def test_a_checkpoint_beyond_the_last_step_is_told(fitted, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    newest = fitted / "checkpoints/step-3.ckpt"
    options = ("--ckpt_path", newest, "--trainer.max_steps", "2", "--merge_adapters", "null")
    assert run("fit", "--config", "tiny.yaml", *options).status == 0
    assert (
        f"{newest} is of step 3, and trainer.max_steps is 2: nothing is left to train."
        in caplog.text
    )


@resumes
def test_a_damaged_newest_checkpoint_is_passed_over(recipe):
    options = ("fit", "--config", recipe, "--checkpoint.every_n_steps", "1")
    assert run(*options).status == 0
    folder = Path("runs/tiny/version_0")
    newest = folder / "checkpoints/step-3.ckpt"
    whole = torch.load(newest, weights_only=True)
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"step-3\.ckpt is not whole .*: going on from step-2"):
        outcome = run(*options, "--ckpt_path", folder, "--trainer.logger.init_args.version", "0")
    assert outcome.status == 0
    again = torch.load(newest, weights_only=True)
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(again["state_dict"][name], tensor)


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer.logger.init_args.version", "0"),
        ("--trainer.logger", "false", "--trainer.default_root_dir", "runs/tiny/version_0"),
        ("--trainer.logger.init_args.version", "0", "--auto_resume", "true"),
    ],
)
def test_a_new_run_in_the_folder_of_another_is_refused(fitted, options):
    before = content_of(fitted)
    outcome = run("fit", "--config", "tiny.yaml", "--model.adapter.rank", "4", *options)
    assert said(outcome) == (
        f"{fitted} holds a run already: --ckpt_path {fitted} goes on with it; to begin anew, "
        "choose another folder, or remove it."
    )
    assert content_of(fitted) == before
    shutil.rmtree(fitted / "checkpoints")
    outcome = run("fit", "--config", "tiny.yaml", "--model.adapter.rank", "4", *options)
    assert said(outcome) == (
        f"{fitted} holds what another run has left (adapter, merged): choose another folder, or "
        "remove it."
    )
    again = (*options, "--trainer.fast_dev_run", "true")
    assert run("fit", "--config", "tiny.yaml", *again).status == 0  # it would write nothing
    assert before.items() >= content_of(fitted).items()


@resumes
def test_resuming_another_rank_is_refused(fitted):
    outcome = run(
        *("fit", "--config", "tiny.yaml", "--model.adapter.rank", "4"),
        *("--trainer.logger.init_args.version", "0"),
        *("--ckpt_path", fitted / "checkpoints/last.ckpt"),
    )
    assert said(outcome) == (
        "The checkpoint has adapter.rank 3, this run 4; set it to the checkpoint's, or start a new "
        "run."
    )
    assert not (fitted / "config.resume-1.yaml").exists()


@resumes
def test_the_command_line_wins_over_the_checkpoint(fitted, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    outcome = run(
        *("fit", "--config", "tiny.yaml", "--model.optimizer.lr", "0.5"),
        *("--trainer.max_steps", "4", "--model.max_new_tokens", "9"),
        *("--ckpt_path", fitted / "checkpoints/last.ckpt"),
    )
    assert outcome.status == 0
    saved = yaml.safe_load(Path("runs/tiny/version_1/config.yaml").read_text())
    assert saved["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert saved["model"]["max_new_tokens"] == 9
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    assert [line for line in lines if line.startswith("going on with")] == [
        "going on with another configuration than before: trainer.max_steps is 4, and was 3; "
        "model.max_new_tokens is 9, and was 4.",
        "going on with other options than before: lr is 0.5, and was 0.01.",
    ]


# --- several files, groups ------------------------------------------------------------------------


def test_later_files_merge_into_groups(recipe):
    write_yaml(
        "small.yaml", "model: {adapter: {rank: 2, targets: mlp}}\ncheckpoint: {keep_last: 1}"
    )
    write_yaml("often.yaml", "checkpoint: {every_n_steps: 1}\nmerge_adapters: {dtype: bfloat16}")
    files = [x for name in (recipe, "small.yaml", "often.yaml") for x in ("--config", name)]
    assert run("fit", *files, "--model.adapter.alpha", "7").status == 0
    folder = Path("runs/tiny/version_0")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["checkpoint"] == {"every_n_steps": 1, "keep_last": 1}
    assert saved["merge_adapters"]["dtype"] == "bfloat16"
    adapter = saved["model"]["adapter"]
    assert (adapter["rank"], adapter["alpha"], adapter["targets"]) == (2, 7.0, "mlp")
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step-3.ckpt"}
    written = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert len(written["target_modules"]) == 2 * 3
    report = json.loads((folder / "merged/merge_report.json").read_text())
    assert report["dtype"] == "bfloat16"


def test_groups_are_turned_off_by_null(recipe):
    options = ("--merge_adapters", "null", "--checkpoint", "null")
    assert run("fit", "--config", recipe, *options).status == 0
    names = {path.name for path in Path("runs/tiny/version_0").iterdir()}
    assert not names & {"adapter", "merged", "checkpoints"}
    assert "config.yaml" in names


def test_before_after_is_turned_on_by_its_group(recipe, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    assert run("fit", "--config", recipe, "--before_after.example", "2").status == 0
    assert "held-out loss before" in "\n".join(record.getMessage() for record in caplog.records)


def test_full_fine_tuning_by_null(recipe):
    assert run("fit", "--config", recipe, "--model.adapter", "null").status == 0
    names = {path.name for path in Path("runs/tiny/version_0").iterdir()}
    assert "merged" in names
    assert "adapter" not in names
    source = "runs/tiny/version_0/checkpoints/last.ckpt"
    assert said(run("merge", "--checkpoint", source, "--output", "out")).startswith(
        f"{source} has no adapter: it is from full fine-tuning"
    )


def test_a_dry_run_writes_nothing(recipe):
    assert run("fit", "--config", recipe, "--trainer.fast_dev_run", "true").status == 0
    assert leftovers() == set()


def test_a_schedule_that_ends_before_the_run_is_told(recipe):
    outcome = run(
        *("fit", "--config", recipe, "--merge_adapters", "null"),
        *("--model.lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR"),
        *("--model.lr_scheduler.max_lr", "0.1", "--model.lr_scheduler.total_steps", "2"),
    )
    assert said(outcome).startswith("model.lr_scheduler: Tried to step 3 times.")
    assert last_step() == 3  # which was made


def test_several_strategies_of_optimizer_and_schedule(recipe):
    outcome = run(
        *("fit", "--config", recipe, "--merge_adapters", "null"),
        *("--model.optimizer", "torch.optim.Adafactor"),
        *("--model.lr_scheduler", "torch.optim.lr_scheduler.LinearLR"),
        *("--model.lr_scheduler.total_iters", "2"),
    )
    assert outcome.status == 0
    saved = torch.load("runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["lr_schedulers"][0]["total_iters"] == 2
