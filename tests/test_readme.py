"""What the README shows runs as it stands."""

import re
import shlex
import subprocess
from pathlib import Path

import lightning.pytorch
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch.distributed.run import get_args_parser
from torch.utils.data import DataLoader

from rslightning.__main__ import main
from rslightning.recipes import packaged_names

README = Path(__file__).parents[1] / "README.md"


def python_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def example_with(text: str) -> str:
    (found,) = (example for example in python_examples() if text in example)
    return found


class PeftModule(LightningModule):
    """Somebody else's module around a PEFT model, with batches as mappings."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = LoraConfig(r=4, target_modules="all-linear", use_rslora=True)
        self.model = get_peft_model(base, config).train()

    def training_step(self, batch, batch_idx):
        return self.model(**batch, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.fixture
def quiet_trainers(monkeypatch, tmp_path):
    """Let a Trainer of the README make three steps, and log to a folder of the test."""
    from lightning.pytorch.loggers import TensorBoardLogger

    original = lightning.pytorch.Trainer

    def make(**options):
        quiet = {
            "max_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": TensorBoardLogger(tmp_path, name="", version=""),
        }
        return original(**(options | quiet))

    monkeypatch.setattr(lightning.pytorch, "Trainer", make)


def test_the_callbacks_run_in_a_project_that_is_not_ours(quiet_trainers, model_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ids = torch.randint(3, 200, (12, 9), generator=torch.Generator().manual_seed(0))
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids
    ]
    names = {"your_module": PeftModule(model_folder), "your_data": DataLoader(rows, batch_size=4)}
    exec(example_with("GradientNormMonitor"), names)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    groups = {tag.partition("/")[0] for tag in tags}
    assert groups >= {"grad_norm", "activation", "adapter_output", "input_grad"}
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_adapters_are_injected_and_merged(tiny_llama, capsys):
    example = example_with("inject_adapters").replace("rank=512", "rank=8")
    ids = torch.arange(7)[None]
    before = tiny_llama(ids).logits
    exec(example, {"model": tiny_llama})
    assert "0% of the linear weights uncovered" in capsys.readouterr().out
    torch.testing.assert_close(tiny_llama(ids).logits, before)  # B is 0, and nothing was trained


# --- several GPUs and nodes -----------------------------------------------------------------------

NODES, DEVICES = 2, 8
FIT = "fit --config recipes/llama2_openorca.yaml --config configs/strategy/ddp.yaml"
LAUNCHES = {  # name -> the whole block, as the README shows it
    "console": f"rslightning {FIT} --trainer.devices {DEVICES}\n",
    "one node": f"torchrun --nproc-per-node {DEVICES} -m rslightning {FIT}\n",
    "two nodes": f"torchrun --nnodes {NODES} --nproc-per-node {DEVICES} --rdzv-backend c10d "
    f"--rdzv-endpoint FIRST_NODE:29500 --rdzv-id 1 \\\n    -m rslightning {FIT}\n",
    "slurm": f"""#!/bin/bash
#SBATCH --nodes={NODES}
#SBATCH --ntasks-per-node={DEVICES}
#SBATCH --gpus-per-node={DEVICES}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@90
srun --kill-on-bad-exit=1 --cpus-per-task=8 \\
    rslightning {FIT} \\
    --trainer.devices {DEVICES} --trainer.num_nodes {NODES} --auto_resume true
""",
}


def bash_examples() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def words_of(block: str) -> list[str]:
    """Return the words of a block's one command, as bash would see them."""
    lines = [line for line in block.splitlines() if not line.startswith("#")]
    return shlex.split("\n".join(lines).replace("\\\n", " "))


def trainer_options(words: list[str], capsys) -> dict:
    """Return the Trainer's options that our command line makes of the words after its name."""
    with pytest.raises(SystemExit) as ended:
        main([*words[words.index("rslightning") + 1 :], "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["trainer"]


def test_all_ways_to_launch_are_those_that_are_checked_here():
    assert sorted(bash_examples()) == sorted(LAUNCHES.values())


@pytest.mark.parametrize("block", bash_examples())
def test_bash_accepts_a_block(block):
    checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", LAUNCHES)
def test_our_options_parse(name, capsys):
    trainer = trainer_options(words_of(LAUNCHES[name]), capsys)
    given = (trainer["devices"], trainer["num_nodes"])
    started = {"console": (str(DEVICES), 1), "slurm": (str(DEVICES), NODES)}
    assert given == started.get(name, ("auto", 1))  # torchrun says it
    assert trainer["strategy"] == "ddp"


@pytest.mark.parametrize(("name", "nodes"), [("one node", "1:1"), ("two nodes", str(NODES))])
def test_torchrun_accepts_its_options(name, nodes):
    program, *options = words_of(LAUNCHES[name])
    parsed = get_args_parser().parse_args(options)
    assert (program, parsed.nnodes, parsed.nproc_per_node) == ("torchrun", nodes, str(DEVICES))
    assert (parsed.module, parsed.training_script) == (True, "rslightning")
    assert " ".join(parsed.training_script_args) == FIT
    if nodes != "1:1":
        assert (parsed.rdzv_backend, parsed.rdzv_endpoint) == ("c10d", "FIRST_NODE:29500")


def test_slurm_starts_a_task_for_each_device(capsys):
    (block,) = (example for example in bash_examples() if "#SBATCH" in example)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", block, re.MULTILINE))
    trainer = trainer_options(words_of(block), capsys)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == trainer["devices"]
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert asked["signal"] == "SIGUSR1@90"
    assert words_of(block)[:2] == ["srun", "--kill-on-bad-exit=1"]


def test_the_readme_names_every_strategy_fragment():
    named = set(re.findall(r"configs/strategy/\w+\.yaml", README.read_text(encoding="utf-8")))
    assert named == {name for name in packaged_names() if name.startswith("configs/strategy/")}
