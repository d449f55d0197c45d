"""What a CPU cannot show: orders, loss, training, resuming and merging on one GPU."""

import re
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from rslightning.batch import IGNORED
from rslightning.callbacks import BeforeAfter, MergeAdapters, RunSummary, TrainableCheckpoint
from rslightning.cost import ORDERS
from rslightning.hf import load_causal_lm
from rslightning.losses import linear_nats
from rslightning.rslora.contraction import adapted_linear

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of drivers and kernels, which differ by machine
]

DEVICE, ACCELERATOR = "cuda", "gpu"
GAMMA = 0.7
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, of a whole matrix


class Losses(Callback):
    """Keeps the loss of each step, and what the optimizer is told."""

    def __init__(self):
        self.losses, self.fused = [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert outputs["loss"].device.type == DEVICE or trainer.num_devices == 0
        self.losses.append(float(outputs["loss"]))
        self.fused = trainer.optimizers[0].param_groups[0]["fused"]


def fit(make_trainer, module, data, steps, callbacks=(), ckpt_path=None, **options):
    seen = Losses()
    torch.manual_seed(7)
    options = {"accelerator": ACCELERATOR, "limit_val_batches": 0} | options
    trainer = make_trainer(max_steps=steps, callbacks=[seen, *callbacks], **options)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return seen


def assert_near(found, exact, tolerance):
    error = (found.double() - exact).norm() / exact.norm()
    assert error < tolerance


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_the_dense_layer(order, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=DEVICE)
    x, dy = draw(96, 64).to(dtype), draw(96, 160).to(dtype)
    weight, bias = (0.1 * draw(160, 64)).to(dtype), draw(160).to(dtype)
    a, b = 0.1 * draw(16, 64), 0.1 * draw(160, 16)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    with torch.autocast(DEVICE, dtype, enabled=dtype == torch.bfloat16):
        y = adapted_linear(x, weight, bias, a, b, GAMMA, order=order)
    found = torch.autograd.grad(y, leaves, dy)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    merged = weight.double() + GAMMA * exact[2] @ exact[1]
    truth = exact[0] @ merged.T + bias.double()
    expected = torch.autograd.grad(truth, exact, dy.double())
    for mine, true in zip((y, *found), (truth, *expected), strict=True):
        assert_near(mine, true, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_loss_is_that_of_whole_logits(dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=DEVICE)
    hidden, weight = draw(300, 64).to(dtype).requires_grad_(), draw(211, 64).to(dtype)
    targets = torch.randint(0, 211, (300,), generator=generator, device=DEVICE)
    targets[::7] = IGNORED
    nats = linear_nats(hidden, weight, None, targets)
    (by_hidden,) = torch.autograd.grad(nats, hidden)
    exact = hidden.detach().double().requires_grad_()
    true = torch.nn.functional.cross_entropy(
        exact @ weight.double().T, targets, ignore_index=IGNORED, reduction="sum"
    )
    (expected,) = torch.autograd.grad(true, exact)
    assert_near(nats, true, ROUNDING[dtype])
    assert_near(by_hidden, expected, ROUNDING[dtype])


def test_a_gpu_trains_as_a_cpu_does(make_trainer, make_module, make_data):
    on_gpu = fit(make_trainer, make_module(), make_data(), 6)
    on_cpu = fit(make_trainer, make_module(), make_data(), 6, accelerator="cpu")
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-4)
    assert on_gpu.losses[-1] < on_gpu.losses[0]
    assert on_gpu.fused is True


def test_compiled_layers_train_the_same(make_trainer, make_module, make_data):
    losses = [
        fit(
            make_trainer, make_module(dtype="bfloat16", compile=compiled), make_data(), 4,
            precision="bf16-mixed",
        ).losses
        for compiled in (False, True)
    ]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_a_resumed_run_goes_on_the_same(make_trainer, make_module, make_data, tmp_path):
    checkpoint = TrainableCheckpoint(every_n_steps=3)
    whole = fit(
        make_trainer, make_module(), make_data(), 6, [checkpoint], enable_checkpointing=True
    )
    saved = tmp_path / "checkpoints" / "step-3.ckpt"
    resumed = fit(make_trainer, make_module(), make_data(), 6, ckpt_path=saved)
    assert resumed.losses == pytest.approx(whole.losses[3:], rel=1e-5)


def test_the_merged_model_is_the_trained_one(make_trainer, make_module, make_data, tmp_path):
    module = make_module()
    fit(make_trainer, module, make_data(), 5, [MergeAdapters(dtype="float32")])
    ids = torch.arange(3, 40).unsqueeze(0)
    merged = load_causal_lm(str(tmp_path / "merged"), dtype=torch.float32)
    with torch.no_grad():
        expected = module.cpu().eval().model(ids).logits
        torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_looks_before_and_after_are_at_the_models_of_both_times(
    make_trainer, make_module, make_data, caplog
):
    def look(**options):
        caplog.clear()
        module = make_module()
        fit(make_trainer, module, make_data(), 5, [BeforeAfter(example=4)], **options)
        assert module.device.type == "cpu"  # where Lightning leaves it
        said = "\n".join(record.getMessage() for record in caplog.records)
        found = re.search(r"before ([\d.]+), after ([\d.]+) nats per token\n(.*)", said, re.DOTALL)
        return [float(x) for x in found.groups()[:2]], found[3].split("answer after")[0]

    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    (before, after), answer = look()
    losses, expected = look(accelerator="cpu")
    assert [before, after] == pytest.approx(losses, rel=1e-3)
    assert after < before
    assert answer == expected


def test_the_summary_tells_the_peak(make_trainer, make_module, make_data, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    torch.cuda.reset_peak_memory_stats()
    fit(make_trainer, make_module(), make_data(), 3, [RunSummary()])
    said = [r.getMessage() for r in caplog.records if "GiB at most so far" in r.getMessage()]
    assert len(said) == 1
    assert "of the estimate" in said[0]
