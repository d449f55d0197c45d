r"""AdaLoRA: adapters in the form of an SVD, of which training keeps the ranks that matter most.

An adapted layer computes `y = W x + b + gamma B diag(E) A x` (Q. Zhang et al., "Adaptive Budget
Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512, section 3.1, with P = B,
Lambda = E and Q = A). gamma is that of the rank r which the layers begin with, all through the run:
no output jumps where ranks are taken away. `scaling: lora` is thereby AdaLoRA as PEFT computes it,
and `scaling: rslora` its rank-stabilized form, alpha / sqrt(r).

The loss gets `orthogonality` times the mean over all A and B of |A A^T - 1|_F and |B^T B - 1|_F
(not squared, as in the authors' code and in PEFT).

After each step, entry w of a matrix with gradient g has the importance I = |w g|, and over the
steps (section 3.2)

    mean I      <- beta1 mean I + (1 - beta1) I
    deviation D <- beta2 D      + (1 - beta2) |I - mean I|
    score s(w)   = mean I * D

Rank i of a layer scores s(E_i) + mean_j s(A_ij) + mean_j s(B_ji). Where the budget of the
step, summed over N layers of rank r, is (section 3.3, in the form of the authors' code)

    b(t) = N r                                            t <= warmup
           N (target + (r - target) (1 - (t - warmup) / (T - final - warmup))^3)    between
           N target                                       t >= T - final

E_i is set to zero for all ranks but the b(t) that score highest. Their A and B go on being trained,
so that a rank can come back, until at t = T - final the choice is final.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rslightning.errors import UserError
from rslightning.rslora.linear import LoRALinear, adapter_layers
from rslightning.rslora.scaling import equivalent_alpha
from rslightning.rslora.spec import RankAllocation, ResolvedAdapter


class RankAllocator:
    """Scores the ranks of a model's adapters step by step, and sets E to zero beyond the budget.

    It keeps two float32 numbers for each entry of the adapters, until the choice is final.

    Args:
        model: What holds the adapters, on the device that they are trained on.
        allocation: Target, schedule and decays.
        total_steps: T, optimizer steps of the run.

    Raises:
        UserError: If the run has no step between warm-up and final steps.
    """

    def __init__(self, model: nn.Module, allocation: RankAllocation, total_steps: int) -> None:
        self.allocation = allocation
        self.last_step = total_steps - allocation.final_steps
        if allocation.warmup_steps >= self.last_step:
            raise UserError(
                f"allocation.warmup_steps {allocation.warmup_steps} and final_steps "
                f"{allocation.final_steps} leave none of the run's {total_steps} steps to take "
                "ranks away in: lower them, or train longer."
            )
        self.layers = dict(adapter_layers(model))
        self.parameters = {
            f"{path}.{name}": parameter
            for path, layer in self.layers.items()
            for name, parameter in layer.adapter_parameters().items()
        }
        self.means = {name: _zeros_like(p) for name, p in self.parameters.items()}
        self.deviations = {name: _zeros_like(p) for name, p in self.parameters.items()}
        self.final_choice: Tensor | None = None

    def budget(self, step: int) -> int:
        """Return b(t): how many ranks all layers may have together after step t, from 1."""
        ranks = sum(layer.rank for layer in self.layers.values())
        target = self.allocation.target_rank * len(self.layers)
        warmup = self.allocation.warmup_steps
        if step <= warmup:
            return ranks
        if step >= self.last_step:
            return target
        left = 1 - (step - warmup) / (self.last_step - warmup)
        return int((ranks - target) * left**3 + target)

    @torch.no_grad()
    def update(self, step: int) -> int:
        """Take in the gradients of a step that was just made, and allocate; return the budget.

        The host does not wait for the device.

        Args:
            step: Number of the step, from 1. One that was skipped is left out.
        """
        budget = self.budget(step)
        if self.final_choice is None and step < self.last_step:
            self._observe()
        if self.final_choice is None and step >= self.last_step:
            self.final_choice = self._choose(budget)
            self.means, self.deviations = {}, {}
        if self.final_choice is not None:
            self._mask(self.final_choice)
        elif step > self.allocation.warmup_steps and step % self.allocation.every_n_steps == 0:
            self._mask(self._choose(budget))
        return budget

    def penalty(self) -> Tensor:
        """Return what the loss gets, with its gradient: the weighted gap from orthogonality."""
        weight = self.allocation.orthogonality
        return weight * orthogonality_gap(self.layers.values()) if weight else torch.tensor(0.0)

    def kept_ranks(self) -> Tensor:
        """Return how many ranks have an E that is not zero, over all layers, on the device."""
        return torch.stack([_values(x).count_nonzero() for x in self.layers.values()]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Return the scores' state and the final choice, sharing memory."""
        return {
            "means": self.means,
            "deviations": self.deviations,
            "final_choice": self.final_choice,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another allocator of the same layers."""
        device = next(iter(self.parameters.values())).device
        for name in ("means", "deviations"):
            setattr(self, name, {key: x.to(device).clone() for key, x in state[name].items()})
        choice = state["final_choice"]
        self.final_choice = None if choice is None else choice.to(device)

    def _observe(self) -> None:
        weights = [parameter.float() for parameter in self.parameters.values()]
        gradients = [_gradient(parameter) for parameter in self.parameters.values()]
        means, deviations = list(self.means.values()), list(self.deviations.values())
        importance = torch._foreach_mul(weights, gradients)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(means, importance, 1 - self.allocation.beta1)
        torch._foreach_sub_(importance, means)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(deviations, importance, 1 - self.allocation.beta2)

    def _choose(self, budget: int) -> Tensor:
        """Return which ranks are kept [sum of ranks]; of equal scores the first ones."""
        scores = torch.cat([self._scores(path) for path in self.layers])
        best = scores.argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[best] = True
        return kept

    def _scores(self, path: str) -> Tensor:
        of_a, of_b, of_e = (
            self.means[name] * self.deviations[name]
            for name in (f"{path}.lora_a", f"{path}.lora_b", f"{path}.lora_e")
        )
        return of_e + of_a.mean(1) + of_b.mean(0)

    def _mask(self, kept: Tensor) -> None:
        parts = torch.split(kept, [layer.rank for layer in self.layers.values()])
        for layer, part in zip(self.layers.values(), parts, strict=True):
            _values(layer).masked_fill_(~part, 0.0)


def orthogonality_gap(layers: Iterable[LoRALinear]) -> Tensor:
    """Return the mean over A and B of all layers of |A A^T - 1|_F and |B^T B - 1|_F, with gradient.

    It is computed in float32, under autocast, too.
    """
    gaps = []
    for layer in layers:
        a, b = layer.lora_a.float(), layer.lora_b.float()
        identity = torch.eye(layer.rank, device=a.device)
        with torch.autocast(a.device.type, enabled=False):
            gaps += [torch.linalg.matrix_norm(x - identity) for x in (a @ a.T, b.T @ b)]
    return torch.stack(gaps).mean()


def fold_values(
    lora_a: Tensor, lora_b: Tensor, lora_e: Tensor, numbers: ResolvedAdapter
) -> tuple[Tensor, Tensor, ResolvedAdapter]:
    """Return A, B and numbers of the plain adapter that computes the same: gamma B diag(E) A.

    Ranks whose E is zero are left out. Where none is left, one stays, with a B of zero: readers of
    adapters know no rank of 0.

    Shape:
        lora_a [rank, in], lora_b [out, rank], lora_e [rank] -> [kept, in], [out, kept].
    """
    kept = lora_e.nonzero().squeeze(1)
    kept = kept if len(kept) else kept.new_zeros(1)
    alpha = equivalent_alpha(numbers.gamma, len(kept), numbers.scaling)
    folded = ResolvedAdapter(len(kept), alpha, numbers.scaling)
    return lora_a[kept], lora_b[:, kept] * lora_e[kept], folded


@torch.no_grad()
def spread_values(
    layer: LoRALinear, lora_a: Tensor, lora_b: Tensor, value: float
) -> dict[str, Tensor]:
    """Return matrices for `layer` that compute a plain adapter: the inverse of `fold_values`.

    Its ranks come first, each with `value` for its E; those that `layer` has beyond keep their A
    and B, and their E is zero.
    """
    rank = len(lora_a)
    matrices = {name: x.detach().clone() for name, x in layer.adapter_parameters().items()}
    matrices["lora_a"][:rank] = lora_a
    matrices["lora_b"][:, :rank] = lora_b
    matrices["lora_e"].zero_()[:rank] = value
    return matrices


def _values(layer: LoRALinear) -> Tensor:
    assert layer.lora_e is not None
    return layer.lora_e


def _zeros_like(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    return _zeros_like(parameter) if gradient is None else gradient.float()
