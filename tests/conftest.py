"""Models, data and paths that several tests use."""

import faulthandler
import json
import math
import os
import resource
import signal
import socket
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CACHE = tempfile.TemporaryDirectory(prefix="rslightning-tests-")  # removed when the tests are over
os.environ["HF_DATASETS_CACHE"] = f"{CACHE.name}/datasets"
os.environ["RSLIGHTNING_CACHE"] = f"{CACHE.name}/rslightning"
torch.set_num_threads(1)  # on tiny models a second thread waits more than it works

SHARED = Path(__file__).parents[2] / "shared"


def shared(path: str) -> Path:
    """Return a file or folder of the shared data, or skip the test where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} of the shared data, which is not beside this checkout")
    return SHARED / path


@pytest.fixture(scope="session")
def shared_file():
    """Return the function that finds a shared file or skips the test."""
    return shared


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    return shared("data/gsm8k")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    return shared("models/stories260k-llama")


@pytest.fixture(scope="session")
def babyllama361() -> Path:
    return shared("models/babyllama361-llama")


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Remove what a test leaves in this process.

    From what `seed_everything` leaves, Lightning's processes would start; and a forked process
    waits for ever for threads of OpenMP, which it has not.
    """
    yield
    torch.set_num_threads(1)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture
def hangs_up():
    """SIGHUP ends processes that are started, also where `nohup` started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def tiny_llama():
    """Return a random Llama whose sizes are all distinct, so that a swap shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


NAMES = ("Tom", "Anna", "Ben", "Mia", "Leo", "Eva", "Max", "Zoe")
THINGS = ("cups", "books", "pens")


def orca_row(index: int) -> dict[str, str]:
    """Return a row in OpenOrca's columns; rows differ in length, some have no system prompt."""
    name, thing = NAMES[index % len(NAMES)], THINGS[index % len(THINGS)]
    return {
        "id": f"row.{index}",
        "system_prompt": "Answer in one sentence." if index % 3 == 0 else "",
        "question": f"{name} has {index} {thing}" + " and a hat" * (index % 4) + ". How many?",
        "response": f"{name} has {index} {thing}." + " That is all." * (index % 2),
    }


def gsm8k_row(index: int) -> dict[str, str]:
    """Return a row in GSM8K's columns."""
    question = f"{NAMES[index % len(NAMES)]} buys {index} pens and 2 books. How many things?"
    return {"question": question, "answer": f"{index} + 2 = {index + 2}\n#### {index + 2}"}


def write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def orca_folder(tmp_path_factory) -> Path:
    """A folder with 24 training rows and 7 held-out rows in OpenOrca's columns."""
    folder = tmp_path_factory.mktemp("data") / "orca"
    write_jsonl(folder / "train.jsonl", map(orca_row, range(24)))
    write_jsonl(folder / "held_out.jsonl", map(orca_row, range(100, 107)))
    return folder


@pytest.fixture(scope="session")
def gsm8k_folder(tmp_path_factory) -> Path:
    """A folder with 17 training rows and 5 test rows in GSM8K's columns."""
    folder = tmp_path_factory.mktemp("data") / "gsm8k"
    write_jsonl(folder / "train.jsonl", map(gsm8k_row, range(17)))
    write_jsonl(folder / "test.jsonl", map(gsm8k_row, range(50, 55)))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A random Llama with a byte-level tokenizer, saved; copy it before changing a file."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder)
    random_llama(len(tokenizer)).save_pretrained(folder)
    return folder


def train_tokenizer():
    """Return a fast tokenizer with begin, end and padding tokens, whose decoding is exact."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=301, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    text = [value for index in range(24) for value in orca_row(index).values()]
    core.train_from_iterator(text, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def random_llama(vocabulary: int, **changes):
    """Return a random Llama with distinct sizes; its logits differ by far more than rounding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **special, **(sizes | changes)))


@pytest.fixture(scope="session")
def make_llama():
    """Return the factory of random Llamas: vocabulary, and what differs from the defaults."""
    return random_llama


def random_gpt2(**changes):
    """Return a random GPT-2, whose linear maps are `Conv1D`; its attention output is square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 4}
    sizes |= {"n_inner": 40, "n_positions": 32}
    special = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**(special | sizes | changes)))


@pytest.fixture(scope="session")
def make_gpt2():
    """Return the factory of random GPT-2s: what differs from the defaults."""
    return random_gpt2


def random_deepseek(dtype: torch.dtype):
    """Return a DeepSeek-V3 whose experts are chosen by differences that bfloat16 does not hold."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8}
    sizes |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    experts |= {"moe_intermediate_size": 16, "first_k_dense_replace": 0, "n_shared_experts": 1}
    config = DeepseekV3Config(**sizes, **experts, use_cache=False)
    model = DeepseekV3ForCausalLM(config).to(dtype)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias = 4 + torch.randn(16) * 0.01
    return model


@pytest.fixture(scope="session")
def make_deepseek():
    """Return the factory of random DeepSeek-V3s: the dtype of their weights."""
    return random_deepseek


def quiet_trainer(root: Path, **options):
    """Return a Trainer on one CPU process that only computes; its run folder is `root`."""
    from lightning.pytorch import Trainer

    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
    }
    return Trainer(**(quiet | options))


@pytest.fixture
def make_trainer(tmp_path):
    """Return a factory of quiet Trainers, whose run folder is `tmp_path`."""
    return partial(quiet_trainer, tmp_path)


def own_ports():
    """Yield port numbers that no other process of tests takes, whatever checkout it runs in.

    Two groups of processes that meet at one port join each other's, and abort in a collective.
    They are below those that the system gives to any connection.
    """
    for first in range(20_000, 32_000, 500):
        lock = FileLock(Path(tempfile.gettempdir(), f"rslightning-tests-{first}.lock"), timeout=0)
        with suppress(OSError), lock:  # until this process ends; `Timeout` is one
            yield from range(first, first + 500)


PORTS = own_ports()


def free_port() -> int:
    for port in PORTS:
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is no end of numbers")


@pytest.fixture(scope="session")
def free_ports():
    """Return the function that finds a port that nobody listens on."""
    return free_port


def wait_for(children):
    """Return the exit codes of processes; when one has failed the others have a minute left."""
    codes, end = {}, math.inf
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        if any(codes.values()):
            end = min(end, time.monotonic() + 60)
        time.sleep(0.01)
    return [codes[child] for child in children]


def fork_processes(world_size, function, nodes=1):
    """Fork processes that believe torchrun started them; return their exit codes.

    `function(rank)` runs in each; every Lightning strategy joins them as if launched, on as many
    nodes as they are told.
    """
    port, children, per_node = str(free_port()), [], world_size // nodes
    for rank in range(world_size):
        if (child := os.fork()) == 0:
            node, local_rank = divmod(rank, per_node)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(per_node)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": str(node)}
            faulthandler.enable(file=2)  # where pytest shows it, unlike its own
            try:
                torch.set_num_threads(1)
                function(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return wait_for(children)


@pytest.fixture(scope="session")
def run_processes():
    """Return the function that forks processes of one group."""
    return fork_processes


@pytest.fixture
def small_disk():
    """Return a context in which no file can grow beyond a limit, as on a disk that is full."""

    @contextmanager
    def limited(max_bytes: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def make_module(model_folder):
    """Return a factory of modules over the tiny Llama: rank 3 in float32, AdamW."""
    from rslightning import CausalLMModule
    from rslightning.rslora import AdapterSpec

    def make(base_model=model_folder, **options):
        defaults = {
            "adapter": AdapterSpec(rank=3, alpha=5.0),
            "optimizer": partial(torch.optim.AdamW, lr=1e-2),
            "dtype": "float32",
            "max_new_tokens": 6,
        }
        return CausalLMModule(str(base_model), **(defaults | options))

    return make


@pytest.fixture(scope="session")
def make_data(model_folder, orca_folder):
    """Return a factory of DataModules over the OpenOrca rows: batches of 4, all held-out rows."""
    from rslightning.data import OpenOrca

    def make(**options):
        defaults = {"batch_size": 4, "max_length": 128, "held_out_examples": None, "packing": False}
        return OpenOrca(str(orca_folder), str(model_folder), **(defaults | options))

    return make


class FittedRun(NamedTuple):
    """A fit that is over."""

    folder: Path
    module: Any
    data: Any


@pytest.fixture(scope="session")
def fitted_run(tmp_path_factory, make_module, make_data) -> FittedRun:
    """A fit of 5 steps with `checkpoints/`, `adapter/` and `merged/`; read it, do not change it."""
    from rslightning.callbacks import MergeAdapters, TrainableCheckpoint

    folder = tmp_path_factory.mktemp("runs") / "fitted"
    callbacks = [TrainableCheckpoint(every_n_steps=2), MergeAdapters()]
    trainer = quiet_trainer(folder, max_steps=5, callbacks=callbacks, enable_checkpointing=True)
    module, data = make_module(), make_data()
    trainer.fit(module, data)
    module.eval()
    return FittedRun(folder, module, data)


@pytest.fixture(scope="session")
def largest_allocation():
    """Return a function that runs another; it returns the largest allocation there, in bytes."""

    def measure(function):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            function()
        return max(event.self_cpu_memory_usage for event in profile.events())

    return measure
