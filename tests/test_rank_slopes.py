"""The paper's Figure 1 at step 0: how the gradient norm depends on the rank, on real models.

With B = 0 only B has a gradient, gamma_r G (A x)^T summed over the tokens, where G does not depend
on the adapter. A has r rows of equal variance, so its norm grows as gamma_r sqrt(r) = r^(1/2 - p).
"""

import math

import numpy as np
import pytest
import torch

from rslightning.data import GSM8K
from rslightning.hf import load_causal_lm
from rslightning.losses import token_nats
from rslightning.rslora.inject import inject_adapters
from rslightning.rslora.linear import adapter_layers
from rslightning.rslora.merge import unwrap_adapters
from rslightning.rslora.scaling import scaling_factor
from rslightning.rslora.spec import AdapterSpec

pytestmark = pytest.mark.slow

RANKS = [4, 16, 64, 256, 512]
SEEDS = [0, 1, 2]
SLOPES = {"lora": -0.5, "rslora": 0.0, "quarter_root": 0.25, "inverse_square": -1.5}
ALPHA = 16.0
MODELS = ["stories260k", "babyllama361"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run several times faster on one thread where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODELS)
def setting(request, gsm8k):
    """Return a model and a batch of 4 examples of GSM8K of at most 256 tokens."""
    folder = request.getfixturevalue(request.param)
    data = GSM8K(str(gsm8k), str(folder), max_length=256, batch_size=4, num_examples=64)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids.shape == (4, 256)
    return load_causal_lm(folder, torch.float32), batch


def gradients_of_b(model, batch, rank, scaling, seed, a_too=False):
    """Return the gradient of every B at step 0; A has its own, which is 0, only on request."""
    torch.manual_seed(seed)
    inject_adapters(model, AdapterSpec(rank=rank, alpha=ALPHA, scaling=scaling))
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        layer.lora_a.requires_grad_(a_too)
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    nats, targets = token_nats(output.logits, batch.labels)
    (nats / targets).backward()
    unwrap_adapters(model)
    assert not a_too or not any(layer.lora_a.grad.any() for layer in layers)
    return [layer.lora_b.grad for layer in layers]


@pytest.fixture(scope="module")
def norms(setting):
    """Return the norm of B's gradients per rank under `rslora`: mean over tensors, and total."""
    mean, total = np.empty((2, len(SEEDS), len(RANKS)))
    for i, seed in enumerate(SEEDS):
        for j, rank in enumerate(RANKS):
            each = [float(g.norm()) for g in gradients_of_b(*setting, rank, "rslora", seed)]
            mean[i, j], total[i, j] = np.mean(each), math.hypot(*each)
    return {"mean": mean.mean(axis=0), "total": total.mean(axis=0)}


@pytest.mark.parametrize("scaling", SLOPES)
@pytest.mark.parametrize("norm", ["mean", "total"])
def test_slope_of_the_gradient_norm_over_the_rank(norms, scaling, norm):
    # One set of backward passes serves all scalings; the next test shows that it may.
    factor = [scaling_factor(r, 1.0, scaling) / scaling_factor(r, 1.0, "rslora") for r in RANKS]
    slope = np.polyfit(np.log(RANKS), np.log(norms[norm] * factor), 1)[0]
    assert slope == pytest.approx(SLOPES[scaling], abs=0.03)


def test_the_gradient_is_proportional_to_gamma(setting):
    reference = gradients_of_b(*setting, 16, "rslora", seed=0, a_too=True)
    for scaling in SLOPES.keys() - {"rslora"}:
        factor = scaling_factor(16, ALPHA, scaling) / scaling_factor(16, ALPHA, "rslora")
        gradients = gradients_of_b(*setting, 16, scaling, seed=0)
        for ours, truth in zip(gradients, reference, strict=True):
            assert (ours - factor * truth).norm() < 1e-5 * factor * truth.norm()
