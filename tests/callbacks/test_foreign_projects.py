"""All monitors together in projects that are not ours: they measure, and change nothing."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from rslightning.callbacks import (
    ActivationMomentMonitor,
    GradientNormMonitor,
    NonFiniteGuard,
    TensorBoardPanels,
    TokenThroughputMonitor,
)


def demo_transformer():
    torch.manual_seed(0)
    demo = LightningTransformer(vocab_size=19)
    tokens = torch.randint(19, (4, 2, 3, 7))  # input and target [3, 7] of each step
    demo.prepare_data = lambda: None  # it would download
    demo.train_dataloader = lambda: DataLoader([tuple(pair) for pair in tokens], batch_size=None)
    return demo


class ByHand(LightningModule):
    """Two networks, each with an optimizer that steps in every batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 2)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.second(self.first(batch)).square().mean())
            optimizer.step()

    def train_dataloader(self):
        rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
        return DataLoader(rows, batch_size=3)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.first, self.second)]


@pytest.mark.parametrize(
    ("make_project", "norm"),
    [(demo_transformer, "grad_norm/mean"), (ByHand, "grad_norm/optimizer_1/mean")],
)
def test_all_monitors_together(make_trainer, tmp_path, make_project, norm):
    def fit(*callbacks):
        project = make_project()
        torch.manual_seed(1)  # for its dropout
        logger = TensorBoardLogger(tmp_path, name="", version=str(len(callbacks)))
        make_trainer(max_epochs=1, logger=logger, callbacks=list(callbacks)).fit(project)
        return project

    plain = fit()
    monitored = fit(
        GradientNormMonitor(every_n_steps=1),
        ActivationMomentMonitor(every_n_steps=1),
        TokenThroughputMonitor(every_n_steps=1),
        NonFiniteGuard(),
        TensorBoardPanels(),
    )
    pairs = zip(plain.parameters(), monitored.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    events = EventAccumulator(str(tmp_path / "5"))
    events.Reload()
    assert len(events.Scalars(norm)) == 4
    assert all(event.value > 0 for event in events.Scalars(norm))
    assert "perf/step_seconds" in events.Tags()["scalars"]
