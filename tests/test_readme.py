"""What the README shows runs as it stands."""

import re
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

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
