"""Show what a fit changed: held-out loss and one answer, before and after."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import final

from rslightning.callbacks.back_on_device import back_on_device
from rslightning.errors import UserError


@dataclass(frozen=True)
class Snapshot:
    """What the model does at one moment."""

    loss: float
    answer: str


@final
class BeforeAfter(Callback):
    """Print held-out loss and the answer to one held-out prompt, before and after the fit.

    Works with a `CausalLMModule` and a `TextDataModule`.

    Args:
        example: Which held-out row is answered.

    Raises:
        UserError: If module or data cannot be asked (another class), or there is no such row.
    """

    def __init__(self, example: int = 0) -> None:
        self.example = example
        self._before: Snapshot | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the untrained model."""
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "held_out_rows") or not hasattr(pl_module, "nats"):
            raise UserError("before_after needs a CausalLMModule and one of rslightning.data.")
        if self.example >= len(data.held_out_rows):
            raise UserError(
                f"before_after.example is {self.example}, but there are "
                f"{len(data.held_out_rows)} held-out rows."
            )
        self._before = self._look(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again and print both."""
        before = self._before
        assert before is not None
        with back_on_device(trainer, pl_module):
            after = self._look(trainer, pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompt, reference = data.held_out_rows[self.example]
        rank_zero_info(
            f"held-out loss before {before.loss:.4f}, after {after.loss:.4f} nats per token\n"
            f"a held-out prompt:\n{_indent(prompt)}\n"
            f"answer before:\n{_indent(before.answer)}\n"
            f"answer after:\n{_indent(after.answer)}\n"
            f"reference:\n{_indent(reference)}"
        )

    @torch.no_grad()
    def _look(self, trainer: Trainer, module: Any) -> Snapshot:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        modes = {child: child.training for child in module.modules()}
        random_state = torch.get_rng_state()
        module.eval()
        with trainer.precision_plugin.forward_context():
            sums = torch.zeros(2, dtype=torch.float64, device=module.device)  # nats, targets
            for batch in data.val_dataloader():  # each process has its share
                batch = move_data_to_device(batch, module.device)
                sums += torch.stack([value.double() for value in module.nats(batch)])
            nats, targets = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            prompt = move_data_to_device(data.prompt_batch([self.example]), module.device)
            answer = data.tokenizer.decode(module.generate(prompt)[0], skip_special_tokens=True)
        for child, mode in modes.items():
            child.training = mode
        torch.set_rng_state(random_state)
        return Snapshot(nats / max(targets, 1), answer)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines() or ["(nothing)"])
